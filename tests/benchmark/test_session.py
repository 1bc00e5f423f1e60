"""What is measured, and how figures are derived, printed and written."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tvm_attn.bench import main
from tvm_attn.benchmark import machine, plot, probe, report, session
from tvm_attn.benchmark.cases import Options, make_cases
from tvm_attn.benchmark.counts import Work
from tvm_attn.benchmark.kernels import KernelTime
from tvm_attn.benchmark.session import OURS, Benchmark, Measurement, SystemInfo
from tvm_attn.benchmark.system import Case
from tvm_attn.cli import output_file
from tvm_attn.config import PRESETS
from tvm_attn.errors import BenchmarkError

LIMITS = probe.Limits(
    threads=2, float32_gflops=200.0, read_gbytes=40.0, bfloat16_gflops=400.0, int8_gops=800.0, buffer_bytes=1 << 20
)
OPTIONS = Options(Path("a"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rounds, with fixed limits instead of measured ones."""
    monkeypatch.setattr(session, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(session, "measure_limits", lambda target, threads: LIMITS)


def benchmark() -> Benchmark:
    """A benchmark of two systems with round figures: a call takes 0.5 s in ours, and 1 s in the peer."""
    work = Work(products=30 * 10**9, attention=20 * 10**9, bytes=4 * 10**9)
    prefill, decode = Measurement(Case("prefill", 100), work), Measurement(Case("decode", 60, 4), work)
    prefill.rounds = {OURS: [[0.5, 0.4], [0.5]], "torch": [[1.0], [1.0, 1.5]]}
    decode.rounds = {OURS: [[0.5]]}
    kernels = [
        KernelTime("linear_1", "linear", "8 x 8", 12, 0.3, Work(30 * 10**9, 0, 10**9)),
        KernelTime("unknown_2", "unknown", "", 1, 0.1, None),
    ]
    systems = [
        SystemInfo(OURS, "tvm_attn", "1", "float32"),
        SystemInfo("torch", "PyTorch", "2", "float32"),
    ]
    artifact = {"folder": "demo", "weight_format": "float32"}
    machine = {"processor": "Some processor", "cores": 2, "threads": 2}
    measurements, by_case = [prefill, decode], [(decode.case, kernels)]
    return Benchmark(
        machine, {"tvm": "1"}, artifact, LIMITS, False, "float32", systems, ["x: y"], measurements, by_case
    )


def test_figures_are_of_the_median() -> None:
    entry = benchmark().measurements[0]
    figures = report.case_figures(entry, OURS, benchmark())
    assert (figures["median_seconds"], figures["best_seconds"]) == (0.5, 0.4)
    assert figures["tokens_per_second"] == 200.0
    assert figures["gflops"] == 100.0
    assert figures["gbytes_per_second"] == 8.0
    assert figures["bound_by"] == "compute" and figures["fraction_of_limit"] == 0.5


def test_figures_of_bfloat16_have_its_limit() -> None:
    figures = report.case_figures(benchmark().measurements[0], OURS, replace(benchmark(), arithmetic="bfloat16"))
    assert figures["fraction_of_limit"] == pytest.approx((30 / 400 + 20 / 400) / 0.5)


def test_what_lies_in_a_cache_has_no_share_of_the_memory() -> None:
    cached = replace(benchmark(), from_cache=True)
    prefill, decode = (report.case_figures(entry, OURS, cached) for entry in cached.measurements)
    assert prefill["fraction_of_limit"] == 0.5  # bound by arithmetic
    assert decode["bound_by"] == "compute"
    moved = replace(cached.measurements[1].work, bytes=40 * 10**9)
    cached.measurements[1].work = moved
    figures = report.case_figures(cached.measurements[1], OURS, cached)
    assert (figures["bound_by"], figures["fraction_of_limit"]) == ("cache", None)
    console = Console(width=200)
    with console.capture() as capture:
        for table in report.tables(cached):
            console.print(table)
    assert "from cache" in capture.get()


def test_caches_are_counted_once(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    for core in cores:
        for index, (level, size, shared) in enumerate([("1", "48K", str(core)), ("3", "16M", "all of them")]):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n")
    assert machine.cache_bytes(tmp_path) == 16 << 20
    assert machine.cache_bytes(tmp_path / "nowhere") is None


def test_tables_show_figures_ratios_and_gaps() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        for table in report.tables(benchmark()):
            console.print(table)
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["100", "500", "400", "200.0", "100.0", "8.0", "50%", "compute"] in lines
    assert ["linear_1", "8", "x", "8", "12", "300", "75.0%", "100.0", "3.3", "50%", "compute"] in lines
    assert ["unknown_2", "1", "100", "25.0%", "-", "-", "-", "-"] in lines


def test_plot_is_a_picture_and_needs_no_peers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    alone = replace(benchmark(), systems=benchmark().systems[:1], measurements=benchmark().measurements[1:])
    for index, each in enumerate((benchmark(), alone)):
        path = tmp_path / f"{index}.png"
        plot.write_plot(each, path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="cannot be written"):
        report.write_file(tmp_path / "file" / "figures.json", b"")


def test_what_is_not_a_regular_file_stays_in_place(tmp_path: Path) -> None:
    """Replacing it would, for root, turn /dev/null into a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert output_file(str(pipe)) == pipe
        report.write_file(pipe, b"{}")
        assert pipe.is_fifo() and os.read(reader, 100) == b"{}"
    finally:
        os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_written(exists: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    report.write_file(link, b"{}")
    assert link.is_symlink() and target.read_bytes() == b"{}"


def test_default_cases_fit_the_model() -> None:
    cases = make_cases(PRESETS["gpt2"], OPTIONS)
    assert [case.tokens for case in cases if case.phase == "prefill"] == [1, 16, 128, 512, 1023]
    assert [(case.tokens, case.batch) for case in cases if case.phase == "decode"] == [
        (tokens, batch) for batch in (1, 8) for tokens in (1, 128, 512, 1000)
    ]
    cases = make_cases(replace(PRESETS["gpt2"], n_positions=256), OPTIONS)
    assert [case.tokens for case in cases if case.phase == "prefill"] == [1, 16, 128, 256]
    assert [case.tokens for case in cases if case.phase == "decode" and case.batch == 8] == [1, 128, 255]


@pytest.mark.parametrize(
    "options",
    [
        replace(OPTIONS, prefill=(1025,)),
        replace(OPTIONS, prefill=(0,)),
        replace(OPTIONS, decode=(1024,)),
        replace(OPTIONS, batch=(0,)),
    ],
)
def test_lengths_outside_the_model_are_refused(options: Options) -> None:
    with pytest.raises(BenchmarkError):
        make_cases(PRESETS["gpt2"], options)


@pytest.mark.usefixtures("quick")
def test_json_holds_every_call(demo_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    arguments = ["--prefill", "3,20", "--decode", "50", "--batch", "1,2", "--repeats", "2", "--kernels"]
    assert main([str(demo_artifact), *arguments, "--json", str(path)]) == 0
    written: dict[str, Any] = json.loads(path.read_text())
    assert set(written) == {
        *(
            "format",
            "date",
            "machine",
            "versions",
            "artifact",
            "from_cache",
            "limits",
            "systems",
            "skipped",
            "cases",
            "kernels",
        )
    }
    assert written["skipped"] == []
    assert {"processor", "cores", "threads", "memory_gib", "load_average"} <= set(written["machine"])
    assert written["artifact"]["model"]["n_positions"] == 256
    assert [system["label"] for system in written["systems"]] == [OURS]
    assert [(case["phase"], case["tokens"], case["batch"]) for case in written["cases"]] == [
        *(("prefill", 3, 1), ("prefill", 20, 1), ("decode", 50, 1), ("decode", 50, 2))
    ]
    for case in written["cases"]:
        assert case["flops"] > 0 and case["bytes"] > 0
        assert set(case["systems"]) == {OURS}
        for figures in case["systems"].values():
            calls = [seconds for times in figures["rounds_seconds"] for seconds in times]
            assert len(figures["rounds_seconds"]) == 2 and len(calls) >= 4
            assert figures["median_seconds"] == np.median(calls)
            assert figures["best_seconds"] == min(calls)
            assert figures["gflops"] == pytest.approx(case["flops"] / np.median(calls) / 1e9)
    assert [entry["case"]["tokens"] for entry in written["kernels"]] == [20, 50, 50]
    for entry in written["kernels"]:
        assert sum(kernel["share"] for kernel in entry["kernels"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "torch"], "python -m benchmarks.compare {artifact} --against torch"),
        (["--prefill", "257"], "--prefill 257 does not fit the model"),
        (["--decode", "256"], "--decode 256 does not fit the model"),
    ],
)
def test_bad_options_are_one_line(
    demo_artifact: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo_artifact), *arguments]) == 2
    error = capsys.readouterr().err
    message = message.format(artifact=demo_artifact)
    assert error.startswith("error:") and message in error and error.count("\n") == 1
