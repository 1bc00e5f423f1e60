"""The load test and the soak: both run here for seconds, against servers of the demo model."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import __main__ as command
from benchmarks.serving import soak as soak_module
from benchmarks.serving.load import Answer, percentiles
from benchmarks.serving.servers import _PEER_MODULES, ServerProcess

FEW = ["--clients", "1,3", "--prompt-tokens", "20", "--new-tokens", "6", "--repeats", "1", "--threads", "1"]


def run(artifact: Path, out: Path, *options: str) -> dict[str, Any]:
    assert command.main([str(artifact), *options, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def check_load(found: dict[str, Any], servers: list[str]) -> None:
    assert [run["clients"] for run in found["load"]] == [1, 3]
    for one in found["load"]:
        assert one["generate"] > 0
        for name in servers:
            load = one[name]
            assert load["requests"] == 2 * one["clients"]
            assert load["tokens_per_second"] == pytest.approx(load["requests"] * 6 / load["seconds"])
            assert 0 < load["first_token"]["p50"] <= load["first_token"]["p99"] <= load["first_token"]["max"]
            assert 0 <= load["between_tokens"]["p50"] <= load["between_tokens"]["max"] <= load["seconds"]
            assert load["server_cores"] >= 0
    long = found["long prompts"]
    assert long["chunk_seconds"] > 0
    assert long["growth_p99_in_chunks"] == pytest.approx(
        (long["while_prompts_arrive"]["p99"] - long["quiet"]["p99"]) / long["chunk_seconds"]
    )


def test_load(demo_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(demo_artifact, tmp_path / "load.json", *FEW)
    check_load(found, ["tvm_attn"])
    table = capsys.readouterr().out
    assert "Model.generate" in table and "chunks more" in table


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in _PEER_MODULES),
    reason="not installed: pip install gguf 'llama-cpp-python[server]'",
)
def test_load_beside_llama_cpp(demo_artifact: Path, tmp_path: Path) -> None:
    found = run(demo_artifact, tmp_path / "load.json", *FEW, "--peer", "llamacpp")
    assert found["peer"]["precision"] == "float32"
    check_load(found, ["tvm_attn", found["peer"]["name"]])


def test_a_missing_peer_is_named(
    demo_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.serving.servers._PEER_MODULES", ("json", "no_such_module"))
    assert command.main([str(demo_artifact), *FEW, "--peer", "llamacpp"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: no_such_module is missing") and "pip install" in last


def test_a_wrong_answer_ends_the_load_test(
    demo_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = command.run_load

    def altered(*args: Any) -> tuple[Any, list[Answer]]:
        load, answers = real(*args)
        answers[-1].token_ids[-1] ^= 1
        return load, answers

    monkeypatch.setattr(command, "run_load", altered)
    assert command.main([str(demo_artifact), *FEW]) == 2
    assert "error: 1 of 2 answers are not those of generate" in capsys.readouterr().err


def soak_for_seconds(monkeypatch: pytest.MonkeyPatch, seconds: float, spoil: bool = False) -> None:
    real, questions = command.soak, soak_module._questions

    def few_questions(*args: Any) -> list[soak_module.Question]:
        found = questions(*args)
        if spoil:
            for question in found:
                question.texts = [f"not {text}" for text in question.texts]
        return found

    def short(model: Any, server: ServerProcess, _: float, *rest: Any) -> bool:
        return real(model, server, seconds, *rest)

    monkeypatch.setattr(soak_module, "_REQUESTS", 12)
    monkeypatch.setattr(soak_module, "_questions", few_questions)
    monkeypatch.setattr(command, "soak", short)


def test_soak(demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak_for_seconds(monkeypatch, 3.0)
    report = run(demo_artifact, tmp_path / "soak.json", "--soak", "1")["soak"]
    assert report["passed"] and not report["wrong"] and not report["stuck_sequences"]
    assert report["requests"]["status 200"] > 0 and report["generated_tokens"] > 0
    assert all(used > 0 for _, used in report["memory"])


def test_the_soak_finds_wrong_answers(demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak_for_seconds(monkeypatch, 1.0, spoil=True)
    out = tmp_path / "soak.json"
    assert command.main([str(demo_artifact), "--soak", "1", "--json", str(out)]) == 1
    report = json.loads(out.read_text())["soak"]
    assert not report["passed"] and report["requests"]["wrong"] > 0


def test_percentiles_of_nothing() -> None:
    assert percentiles([]) == {}
