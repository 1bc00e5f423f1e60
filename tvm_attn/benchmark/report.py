"""A benchmark as printed tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from tvm_attn.benchmark.counts import Work
from tvm_attn.benchmark.device import DeviceLimits
from tvm_attn.benchmark.kernels import KernelTime
from tvm_attn.benchmark.limits import Limits
from tvm_attn.benchmark.session import OURS, Benchmark, Measurement
from tvm_attn.benchmark.system import Case
from tvm_attn.cli import new_table, writing
from tvm_attn.errors import BenchmarkError

FORMAT = 2
"""Version of the JSON's layout."""


def tables(benchmark: Benchmark) -> Iterator[Table]:
    """The tables to print: limits, our cases by phase, kernels."""
    if isinstance(benchmark.limits, DeviceLimits):
        yield _device_limits_table(benchmark.limits)
    elif benchmark.limits:
        yield _limits_table(benchmark.machine, benchmark.limits)
    for phase in ("prefill", "decode"):
        measurements = [entry for entry in benchmark.measurements if entry.case.phase == phase]
        if measurements:
            yield _case_table(benchmark, phase, measurements)
    for case, times in benchmark.kernels:
        yield _kernel_table(case, times, benchmark)


def _limits_table(machine: dict[str, Any], limits: Limits) -> Table:
    title = f"Limits of this machine: {machine['processor']}, {limits.threads} of {machine['cores']} cores"
    table = new_table(title, ("limit",), ("measured", "unit"))
    table.add_row("float32 multiply-adds", f"{limits.float32_gflops:.0f}", "GFLOP/s")
    table.add_row("memory read", f"{limits.read_gbytes:.1f}", "GB/s")
    if limits.bfloat16_gflops is not None:
        table.add_row("bfloat16 dot products", f"{limits.bfloat16_gflops:.0f}", "GFLOP/s")
    if limits.int8_gops is not None:
        table.add_row("int8 dot products", f"{limits.int8_gops:.0f}", "GOP/s")
    return table


def _device_limits_table(limits: DeviceLimits) -> Table:
    table = new_table(f"Limits of this device: {limits.device}", ("limit",), ("measured", "unit"))
    table.add_row(f"{limits.dtype} matrix products, cuBLAS", f"{limits.product_gflops:.0f}", "GFLOP/s")
    table.add_row("memory copy, read and written", f"{limits.copy_gbytes:.0f}", "GB/s")
    return table


def _case_table(benchmark: Benchmark, phase: str, measurements: list[Measurement]) -> Table:
    words = ("prompt tokens",) if phase == "prefill" else ("context", "batch")
    numbers = ("median ms", "best ms", "tokens/s", "GFLOP/s", "GB/s", "of limit", "binding")
    table = new_table(f"{phase.capitalize()}{describe_artifact(benchmark)}", words, numbers)
    for entry in measurements:
        figures = case_figures(entry, OURS, benchmark)
        table.add_row(
            *case_cells(entry.case),
            _milliseconds(figures["median_seconds"]),
            _milliseconds(figures["best_seconds"]),
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['gflops']:.1f}",
            f"{figures['gbytes_per_second']:.1f}",
            *_share_cells(figures),
        )
    table.caption = "rates are of the median; of limit: the least time that the binding limit allows / median time"
    table.caption_justify = "left"
    return table


def describe_artifact(benchmark: Benchmark) -> str:
    """A description of the artifact, for a title."""
    return f" of {benchmark.artifact['folder']}, {benchmark.artifact['weight_format']} weights, greedy"


def case_cells(case: Case) -> tuple[str, ...]:
    """The cells that name a case in a table of its phase."""
    return (str(case.tokens),) if case.phase == "prefill" else (str(case.tokens), str(case.batch))


def _kernel_table(case: Case, times: list[KernelTime], benchmark: Benchmark) -> Table:
    table = new_table(
        f"Kernels of {case}",
        ("kernel", "sizes"),
        ("calls", "ms", "share", "GFLOP/s", "GB/s", "of limit", "binding"),
    )
    total = sum(entry.seconds for entry in times)
    for entry in times:
        figures = kernel_figures(entry, total, benchmark)
        table.add_row(
            entry.name,
            entry.sizes,
            str(entry.calls),
            _milliseconds(entry.seconds),
            f"{figures['share']:.1%}",
            "-" if not figures["gflops"] else f"{figures['gflops']:.1f}",
            "-" if figures["gbytes_per_second"] is None else f"{figures['gbytes_per_second']:.1f}",
            *_share_cells(figures),
        )
    table.add_row("all kernels", "", "", _milliseconds(total), "", "", "", "", "")
    table.caption = "layers are timed in parts; padding rows are counted; above 100 %, what was read lay in a cache"
    table.caption_justify = "left"
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def case_figures(entry: Measurement, label: str, benchmark: Benchmark) -> dict[str, Any]:
    """Derived figures of a system for a case: rates of the median call, and the fraction of the binding limit, or None.

    The binding limit is "compute", "memory", or "cache"; the fraction is None for "cache", whose speed is not measured.
    """
    median = entry.median(label)
    return {
        "median_seconds": median,
        "best_seconds": entry.best(label),
        "tokens_per_second": entry.case.tokens_per_call / median,
        "gflops": entry.work.flops / median / 1e9,
        "gbytes_per_second": entry.work.bytes / median / 1e9,
        **_share(entry.work, median, benchmark),
    }


def kernel_figures(entry: KernelTime, total: float, benchmark: Benchmark) -> dict[str, Any]:
    """Derived figures of a kernel, None if its work or the limits are not known; `total` is the time of all kernels."""
    figures: dict[str, Any] = {"share": entry.seconds / total}
    if entry.work is None:
        return figures | dict.fromkeys(("gflops", "gbytes_per_second", "bound_by", "fraction_of_limit"))
    return figures | {
        "gflops": entry.work.flops / entry.seconds / 1e9,
        "gbytes_per_second": entry.work.bytes / entry.seconds / 1e9,
        **_share(entry.work, entry.seconds, benchmark),
    }


def _share(work: Work, seconds: float, benchmark: Benchmark) -> dict[str, Any]:
    if benchmark.limits is None:
        return {"bound_by": None, "fraction_of_limit": None}
    bound, bound_by = benchmark.limits.bound(work, benchmark.arithmetic)
    if bound_by == "memory" and benchmark.from_cache:
        return {"bound_by": "cache", "fraction_of_limit": None}
    return {"bound_by": bound_by, "fraction_of_limit": bound / seconds}


def _share_cells(figures: dict[str, Any]) -> tuple[str, str]:
    """The cells "of limit" and "binding"."""
    if figures["bound_by"] == "cache":
        return "from cache", "-"
    if figures["bound_by"] is None:
        return "-", "-"
    return f"{figures['fraction_of_limit']:.0%}", figures["bound_by"]


def to_dict(benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark as JSON: every call's time in seconds, and the derived figures."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": benchmark.machine,
        "versions": benchmark.versions,
        "artifact": benchmark.artifact,
        "from_cache": benchmark.from_cache,
        "limits": benchmark.limits and asdict(benchmark.limits),
        "systems": [asdict(system) for system in benchmark.systems],
        "skipped": benchmark.skipped,
        "cases": [_case_dict(entry, benchmark) for entry in benchmark.measurements],
        "kernels": [
            {"case": case.to_dict(), "kernels": _kernel_dicts(times, benchmark)} for case, times in benchmark.kernels
        ],
    }


def _case_dict(entry: Measurement, benchmark: Benchmark) -> dict[str, Any]:
    systems = {
        label: case_figures(entry, label, benchmark) | {"rounds_seconds": rounds}
        for label, rounds in entry.rounds.items()
    }
    return entry.case.to_dict() | {"flops": entry.work.flops, "bytes": entry.work.bytes, "systems": systems}


def _kernel_dicts(times: list[KernelTime], benchmark: Benchmark) -> list[dict[str, Any]]:
    total = sum(entry.seconds for entry in times)
    return [asdict(entry) | kernel_figures(entry, total, benchmark) for entry in times]


def write_json(benchmark: Benchmark, path: Path) -> None:
    """Writes the JSON; the file is written completely or not at all.

    Raises:
        BenchmarkError: it cannot be written.
    """
    write_file(path, json.dumps(to_dict(benchmark), indent=1).encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all, as `tvm_attn.cli.writing` does.

    Raises:
        BenchmarkError: it cannot be written.
    """
    with writing(path, BenchmarkError) as file:
        file.write(content)
