"""The benchmark of the attention function: what it measures and prints; times are not judged."""

import json
from typing import Any

import pytest

from benchmarks import attention

SMALL = ["--heads", "2", "--queries", "40", "--keys", "20", "--width", "8", "--pairs", "3", "--threads", "1"]
CASES = ["causal", "not causal", "cross", "boolean mask", "added mask"]


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of some machine: measuring this one takes seconds."""
    from tvm_attn.benchmark import probe
    from tvm_attn.benchmark.limits import Limits

    monkeypatch.setattr(probe, "measure_limits", lambda target, threads: Limits(threads, 100.0, 10.0, None, None, 1))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main([*SMALL, "--json"]) == 0
    printed = capsys.readouterr()
    result: dict[str, Any] = json.loads(printed.out)
    assert [case["case"] for case in result["cases"]] == CASES
    assert result["sizes"] == {"heads": 2, "queries": 40, "keys": 20, "width": 8, "dtype": "float32"}
    for case in result["cases"]:
        assert case["lowest"] <= case["ratio"] <= case["highest"]
        assert case["of_limit"] == pytest.approx(case["gflops"] / 100.0)
        assert min(case["ours"], case["torch"]) > 0
    cross = result["cases"][2]
    assert cross["gflops"] == pytest.approx(4 * 40 * 20 * 2 * 8 / cross["ours"] / 1e9)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main([*SMALL, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "2 heads x 40 x 8, bfloat16, 1 threads" in printed
    assert all(case in printed for case in CASES)


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(["--pairs", "2"]) == 2
    assert "must be at least 3" in capsys.readouterr().err
