"""The tune command: what it passes on, what it prints, how it ends."""

import json
from pathlib import Path
from typing import Any

import pytest

import tvm_attn
from tvm_attn import tune as command
from tvm_attn.errors import TuningError
from tvm_attn.model.weights import open_config
from tvm_attn.schedule import Record
from tvm_attn.tuning import tuner
from tvm_attn.tuning.tuner import Found, Progress, Tuned

RECORD = Record("cpu.matmul", 1, {"rows": 8}, {"k_unroll": 2}, 12.5, None, "0", "2026-01-01")
FOUND = (Found("linear 8x8", RECORD, 1.25, 24, 1), Found("head 8x8", RECORD, None, 3, 0))


class FakeTune:
    """Stands in for the search, and remembers what it was asked."""

    def __init__(self, interrupted: bool = False) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.interrupted = interrupted

    def __call__(self, *arguments: Any) -> Tuned:
        *self.arguments, progress = arguments
        progress(Progress(1, 2, "linear 8x8", 12.5, 1.25))
        return Tuned("cpu-x", FOUND, (Path("out/cpu.matmul.jsonl"),), Path("work"), self.interrupted)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTune:
    fake = FakeTune()
    monkeypatch.setattr(tuner, "tune", fake)
    return fake


def test_arguments_and_table(fake: FakeTune, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "cpu", "--model", "demo", "--trials", "7", "--kernels", "linear, head", "--out", "there"]
    assert command.main(options) == 0
    assert fake.arguments == [open_config("demo"), "cpu", "float32", "none", 7, ("linear", "head"), "there", None]
    said = capsys.readouterr()
    assert said.err == "linear 8x8\n"
    for text in ("linear 8x8", "k_unroll=2", "12.5", "1.25", "24", "wrote out/cpu.matmul.jsonl"):
        assert text in said.out
    assert "interrupted" not in said.out


def test_json(fake: FakeTune, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--target", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == ["out/cpu.matmul.jsonl"]
    assert result["found"][0]["record"]["decisions"] == {"k_unroll": 2}
    assert result["seconds"] > 0


def test_interruption_is_the_status(fake: FakeTune, capsys: pytest.CaptureFixture[str]) -> None:
    fake.interrupted = True
    assert command.main(["--target", "cpu"]) == 130
    assert "interrupted; the same command continues from here" in capsys.readouterr().out


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any) -> Tuned:
        raise TuningError("no")

    monkeypatch.setattr(tuner, "tune", refuse)
    assert command.main(["--target", "cpu"]) == 2
    assert capsys.readouterr().err == "error: no\n"


def test_the_module_is_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "tune", lambda *arguments, **options: (arguments, options))
    assert tvm_attn.tune("demo", trials=3) == (("demo",), {"trials": 3})
