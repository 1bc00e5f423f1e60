"""Tables, JSON and pictures of a search."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tvm_attn.errors import TuningError
from tvm_attn.schedule import Record
from tvm_attn.tuning import report
from tvm_attn.tuning.records import merge
from tvm_attn.tuning.tuner import Found, Tuned
from tvm_attn.tuning.whole import Verdict, WholeCall

RECORD = Record("cpu.matmul", 2, {"family": "linear", "rows": 8}, {"k_unroll": 2}, 12.5, None, "0", "2026-01-01")
FOUND = Found("linear 8x8", RECORD, 1.25, 1.1, 0.5, 3, 1, 0, 0.1, (20.0, None, 12.5, 13.0))
VERDICT = Verdict((WholeCall("prefill 128", 100.0, 110.0, (1.1,) * 6),), (RECORD,), ())
TUNED = Tuned("cpu-x", (FOUND,), (), Path("work"), verdict=VERDICT)


def test_report(tmp_path: Path) -> None:
    files = report.write_report(TUNED, tmp_path / "there")
    assert [file.name for file in files] == ["tune.json", "convergence.png", "gains.png"]
    facts = json.loads(files[0].read_text())
    assert facts["found"][0]["record"]["decisions"] == {"k_unroll": 2}
    assert facts["verdict"]["calls"][0]["slower"] is False
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])
    report.write_report(replace(TUNED, found=(), verdict=None), tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="cannot be written"):
        report.write_report(TUNED, tmp_path / "file")


def test_sentence() -> None:
    assert report.sentence(VERDICT, "gpt2") == "gpt2: prefill 128 from 100 to 110 tokens/s"
    assert "no record stays" in report.sentence(Verdict((), (), (RECORD,)), "gpt2")


def test_lists_and_comparisons(tmp_path: Path) -> None:
    other = replace(RECORD, time_us=10.0, decisions={"k_unroll": 4}, date="2026-02-01")
    merge(tmp_path / "a" / "cpu-x", [RECORD])
    merge(tmp_path / "b" / "cpu-x", [other, replace(other, version=3)])
    rows = report.list_folders([tmp_path / "a", tmp_path / "b", tmp_path / "none"])
    assert [(row["target"], row["records"], row["to"]) for row in rows] == [
        ("cpu-x", 1, "2026-01-01"),
        ("cpu-x", 2, "2026-02-01"),
    ]
    (row,) = report.compare_folders(tmp_path / "a" / "cpu-x", tmp_path / "b" / "cpu-x")
    assert (row["speedup"], row["same"], row["kernel"]) == (1.25, False, "linear rows=8")
    with pytest.raises(TuningError, match="has no records"):
        report.compare_folders(tmp_path / "a", tmp_path / "b")
