"""Comparison with other runtimes: what is measured, and how it is compared, printed and written."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import compare
from benchmarks.compare import Agreement, PeerSystem, compare_logits, main, peer_tables
from tvm_attn.benchmark import probe, session
from tvm_attn.benchmark.counts import Work
from tvm_attn.benchmark.session import OURS, Benchmark, Measurement, SystemInfo
from tvm_attn.benchmark.system import Case


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rounds, with fixed limits instead of measured ones."""
    limits = probe.Limits(
        threads=2, float32_gflops=200.0, read_gbytes=40.0, bfloat16_gflops=400.0, int8_gops=None, buffer_bytes=1 << 20
    )
    monkeypatch.setattr(session, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(session, "measure_limits", lambda target, threads: limits)


def test_tables_show_ratios_and_gaps() -> None:
    work = Work(products=30 * 10**9, attention=20 * 10**9, bytes=4 * 10**9)
    prefill, decode = Measurement(Case("prefill", 100), work), Measurement(Case("decode", 60, 4), work)
    prefill.rounds = {OURS: [[0.5, 0.4], [0.5]], "torch": [[1.0], [1.0, 1.5]]}
    decode.rounds = {OURS: [[0.5]]}
    systems = [
        SystemInfo(OURS, "tvm_attn", "1", "float32"),
        PeerSystem("torch", "PyTorch", "2", "float32", Agreement(1e-13, True, 1e-5)),
    ]
    artifact = {"folder": "demo", "weight_format": "float32"}
    found = Benchmark({}, {}, artifact, None, False, "float32", systems, [], [prefill, decode], [])
    console = Console(width=200)
    with console.capture() as capture:
        for table in peer_tables(found):
            console.print(table)
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["torch", "PyTorch", "2", "float32", "1.0e-13", "same"] in lines
    assert ["100", "200.0", "100.0", "2.00x"] in lines
    assert ["60", "4", "8.0", "-"] in lines


@pytest.mark.usefixtures("quick")
def test_peers_take_turns_with_ours(demo_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    arguments = ["--prefill", "3", "--decode", "50", "--batch", "1,2", "--repeats", "2", "--against", "torch"]
    assert main([str(demo_artifact), *arguments, "--json", str(path)]) == 0
    written: dict[str, Any] = json.loads(path.read_text())
    assert written["skipped"] == []
    assert [system["label"] for system in written["systems"]] == [OURS, "torch"]
    assert written["systems"][1]["agreement"]["nmse"] < 1e-9
    assert [(case["phase"], case["batch"]) for case in written["cases"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("decode", 2),
    ]
    for case in written["cases"]:
        assert set(case["systems"]) == {OURS, "torch"}
        assert all(len(figures["rounds_seconds"]) == 2 for figures in case["systems"].values())


def test_comparing_takes_the_worst_function() -> None:
    expected = np.array([1.0, 2.0, 3.0], np.float32)
    off = np.array([1.0, 4.0, 3.0], np.float32)
    same = compare_logits({"prefill": expected}, {"prefill": expected}, 1e-5)
    assert (same.nmse, same.top1) == (0.0, True)
    both = compare_logits({"prefill": expected, "decode": expected}, {"prefill": expected, "decode": off}, 1e-5)
    assert both.nmse == pytest.approx(4 / 14) and not both.top1
    assert math.isnan(compare_logits({"prefill": expected}, {"prefill": off * np.nan}, 1e-5).nmse)


@pytest.mark.usefixtures("quick")
def test_a_missing_peer_is_left_out(
    demo_artifact: Path, python_without: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prefill", "3", "--decode", "", "--against", "torch", "--peer-python", python_without]
    assert main([str(demo_artifact), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "left out: torch: transformers not installed; to compare: pip install torch transformers" in printed
    assert "Prefill of artifact, float32 weights, greedy" in printed


@pytest.mark.usefixtures("quick")
def test_another_model_is_not_timed(
    demo_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(artifact: Any, folder: Path) -> None:
        write_weights(artifact, folder)
        weight = np.load(folder / "h.3.mlp.c_proj.weight.npy")
        np.save(folder / "h.3.mlp.c_proj.weight.npy", weight[::-1])

    write_weights = compare.write_weights
    monkeypatch.setattr(compare, "write_weights", spoil)
    assert main([str(demo_artifact), "--prefill", "3", "--decode", "", "--against", "torch", "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [reason.partition(":")[0] for reason in written["skipped"]] == ["torch"]
    assert "not the same model" in written["skipped"][0]
    assert set(written["cases"][0]["systems"]) == {OURS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "tensorflow"], "unknown peer 'tensorflow'"),
        (["--against", "onnxruntime:int3"], "onnxruntime cannot run 'int3' here; it can run float32"),
        (["--against", ","], "',' names nothing"),
        (["--against", "torch", "--prefill", "257"], "--prefill 257 does not fit the model"),
        (["--against", "torch", "--peer-python", "/nowhere/python"], "/nowhere/python: there is no such program"),
        ([], "--against"),
    ],
)
def test_bad_options_are_one_line(
    demo_artifact: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo_artifact), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and message in error and error.count("\n") == 1
