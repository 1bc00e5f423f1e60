"""The tune command: what it passes on, what it prints, how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tvm_attn
from tvm_attn import run_batch
from tvm_attn import tune as command
from tvm_attn.errors import TuningError
from tvm_attn.model.weights import open_config
from tvm_attn.schedule import Record
from tvm_attn.schedule.records import user_folder
from tvm_attn.tuning import tune as tuning
from tvm_attn.tuning.records import merge
from tvm_attn.tuning.tuner import Found, Progress, Tuned
from tvm_attn.tuning.whole import Verdict, WholeCall

RECORD = Record("cpu.matmul", 1, {"family": "linear", "rows": 8}, {"k_unroll": 2}, 12.5, None, "0", "2026-01-01")
FOUND = (
    Found("linear 8x8", RECORD, 1.25, 1.1, 0.7, 24, 1, 0, 0.1),
    Found("head 8x8", RECORD, None, None, 0.3, 3, 0, 0, None),
)
VERDICT = Verdict((WholeCall("prefill 128", 100.0, 110.0, (1.1,) * 6),), (RECORD,), ())


class FakeJob:
    """Stands in for a search, and remembers what it was asked."""

    result = Tuned("cpu-x", FOUND, ("embedding 8",), Path("work"), False, ("a note",), VERDICT, (Path("out/a.jsonl"),))
    arguments: tuple[Any, ...] = ()
    ran: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        FakeJob.arguments = arguments

    def run(self, progress: Callable[[Progress], None], step: Any, place: Any, whole_calls: bool) -> Tuned:
        FakeJob.ran = place, whole_calls
        progress(Progress(1, 2, "linear 8x8", 12.5, 1.25, 0.5, 90.0))
        step("whole calls: prefill 128", 0.5)
        return self.result

    def remote(self, tracker: str, key: str) -> str:
        return f"{tracker} {key}"

    def export(self, folder: Path, step: Any) -> int:
        return 7

    def import_results(self, file: Path) -> Tuned:
        return self.result


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "Job", FakeJob)
    monkeypatch.setattr(FakeJob, "result", FakeJob.result)


def test_arguments_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "cpu", "--model", "demo", "--trials", "7", "--kernels", "linear, head", "--out", "there"]
    assert command.main([*options, "--minutes", "3", "--no-whole-calls"]) == 0
    *arguments, how = FakeJob.arguments
    assert arguments == [open_config("demo"), "cpu", "float32", "none", ("linear", "head"), "there", None]
    assert (how.trials, how.minutes, how.force) == (7, 3.0, False)
    assert FakeJob.ran == (None, False)
    said = capsys.readouterr()
    progress = "linear 8x8, 1 of 2: best 12.5 us, 1.25 x the default's speed, 50% of the limit, about 2 min left"
    assert progress in said.err
    assert "whole calls: prefill 128" in said.err
    for text in ("linear 8x8", "k_unroll=2", "12.5", "1.25", "24", "wrote out/a.jsonl", "a note", "1.100"):
        assert text in said.out
    assert "demo: prefill 128 from 100 to 110 tokens/s" in said.out
    assert "not searched: embedding 8" in said.out
    assert "interrupted" not in said.out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == ["out/a.jsonl"]
    assert result["found"][0]["record"]["decisions"] == {"k_unroll": 2}
    assert result["verdict"]["calls"][0]["after"] == 110.0
    assert result["seconds"] > 0


def test_interruption_is_the_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(FakeJob, "result", Tuned("cpu-x", (), (), Path("work"), interrupted=True))
    assert command.main(["--target", "cpu"]) == 130
    assert "interrupted; the same command continues from here" in capsys.readouterr().out


def test_nothing_to_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(FakeJob, "result", Tuned("cpu-x", (), (), Path("work")))
    assert command.main(["--target", "cpu"]) == 0
    assert "no record was written" in capsys.readouterr().out


def test_other_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["--rpc", "host:9190", "--key", "board"]) == 0
    assert FakeJob.ran == ("host:9190 board", False)
    capsys.readouterr()
    assert command.main(["--export", str(tmp_path / "batch")]) == 0
    assert "with 7 candidates" in capsys.readouterr().out
    assert command.main(["--import", str(tmp_path / "results.jsonl")]) == 0
    assert "linear 8x8" in capsys.readouterr().out


def test_report(tmp_path: Path) -> None:
    assert command.main(["--report", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "tune.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--minutes", "0"], "--minutes is 0; give a positive number"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--rpc", "h:1", "--export", "b"], "different ways to measure elsewhere"),
        (["--target", "cpu-unknown"], "cpu-unknown"),
        (["--trials", "0"], "at least 1"),
    ],
)
def test_wrong_arguments(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any) -> Tuned:
        raise TuningError("no")

    monkeypatch.setattr(tuning, "Job", refuse)
    assert command.main(["--target", "cpu", "--json"]) == 2
    assert capsys.readouterr().err.endswith("error: no\n")


def test_lists_and_comparisons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    merge(user_folder() / "cpu-mine", [RECORD])
    assert command.main(["--list"]) == 0
    assert "cpu-mine" in capsys.readouterr().out
    assert command.main(["--list", "--json"]) == 0
    names = [entry["target"] for entry in json.loads(capsys.readouterr().out)["targets"]]
    assert names[0] == "cpu-mine"
    assert "cpu-znver4" in names
    folders = [str(user_folder() / "cpu-mine")] * 2
    assert command.main(["--compare", *folders]) == 0
    assert "1.00" in capsys.readouterr().out
    assert command.main(["--compare", *folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"][0]["same"] is True
    assert command.main(["--compare", str(tmp_path), str(tmp_path)]) == 2


def test_a_folder_that_is_no_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_batch.main([str(tmp_path)]) == 2
    assert "batch.json is missing" in capsys.readouterr().err


def test_the_module_is_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "tune", lambda *arguments, **options: (arguments, options))
    assert tvm_attn.tune("demo", kernels=["head"]) == (("demo",), {"kernels": ["head"]})
