"""A benchmark as a picture: tokens per second of every system, and the cases under the roofline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_attn.benchmark.limits import Limits
from tvm_attn.benchmark.report import write_file
from tvm_attn.benchmark.session import OURS, Benchmark
from tvm_attn.benchmark.system import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart; ours is the first.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#F0E442")


def write_plot(benchmark: Benchmark, path: Path) -> None:
    """Draws the benchmark as a PNG file, which is written completely or not at all.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained", dpi=120)
    measured = {entry.case.phase for entry in benchmark.measurements}
    phases = [phase for phase in ("prefill", "decode") if phase in measured]
    rows: list[Any] = [phases, ["roofline"] * len(phases)] if phases else [["roofline"]]
    panels = figure.subplot_mosaic(rows)
    for phase in phases:
        _bars(panels[phase], benchmark, phase)
    _roofline(panels["roofline"], benchmark)
    artifact, machine = benchmark.artifact, benchmark.machine
    where = f"{machine['processor']}, {machine['threads']} threads"
    figure.suptitle(f"{artifact['folder']}, {artifact['weight_format']} weights, on {where}", fontsize=14)
    if phases:
        handles, labels = panels[phases[0]].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_file(path, content.getvalue())


def _colour(benchmark: Benchmark, label: str) -> str:
    index = [system.label for system in benchmark.systems].index(label)
    return _COLOURS[index % len(_COLOURS)]


def _bars(axes: Axes, benchmark: Benchmark, phase: str) -> None:
    """Tokens per second, one group of bars per case."""
    entries = [entry for entry in benchmark.measurements if entry.case.phase == phase]
    labels = [system.label for system in benchmark.systems]
    width = 0.8 / len(labels)
    for index, label in enumerate(labels):
        measured = [(place, entry) for place, entry in enumerate(entries) if label in entry.rounds]
        places = [place - 0.4 + (index + 0.5) * width for place, _ in measured]
        rates = [entry.case.tokens_per_call / entry.median(label) for _, entry in measured]
        bars = axes.bar(places, rates, width, label=label, color=_colour(benchmark, label))
        if label == OURS:
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(entries)), [_tick(entry.case) for entry in entries], fontsize=9)
    # Rates for different lengths are far apart, and a short bar must still be readable.
    axes.set_yscale("log")
    axes.set_xlabel("prompt tokens" if phase == "prefill" else "context tokens, x sequences")
    axes.set_ylabel("tokens/s, logarithmic")
    axes.set_title(f"{phase.capitalize()}: higher is better")
    axes.grid(axis="y", which="major", alpha=0.3)
    axes.set_axisbelow(True)


def _tick(case: Case) -> str:
    return str(case.tokens) if case.batch == 1 else f"{case.tokens}\nx{case.batch}"


def _roofline(axes: Axes, benchmark: Benchmark) -> None:
    """GFLOP/s over operations per byte, below the limits of memory and arithmetic (Williams et al., 2009)."""
    limits, entries = benchmark.limits, benchmark.measurements
    assert isinstance(limits, Limits), "the command refuses a plot without the processor's limits"
    compute = limits.compute(benchmark.arithmetic)
    intensities = [entry.work.flops / entry.work.bytes for entry in entries]
    edge = compute / limits.read_gbytes
    span = np.geomspace(min([*intensities, edge]) / 2, max([*intensities, edge]) * 2, 200)
    roof = f"limits: memory {limits.read_gbytes:.0f} GB/s, {benchmark.arithmetic} {compute:.0f} GFLOP/s"
    axes.plot(span, np.minimum(compute, limits.read_gbytes * span), color="black", linewidth=1.5, label=roof)
    for phase, marker in (("prefill", "o"), ("decode", "s")):
        axes.scatter([], [], marker=marker, color="grey", label=phase)  # for the legend: shapes, colours are above
        for system in benchmark.systems:
            ours = system.label == OURS
            points = [
                (x, entry.work.flops / entry.median(system.label) / 1e9)
                for x, entry in zip(intensities, entries, strict=True)
                if entry.case.phase == phase and system.label in entry.rounds
            ]
            axes.scatter(
                [x for x, _ in points],
                [height for _, height in points],
                marker=marker,
                s=52 if ours else 20,
                color=_colour(benchmark, system.label),
                zorder=3 if ours else 2,
            )
    for x, entry in zip(intensities, entries, strict=True):
        # Contexts of one batch size are close together, so only prompts get a label each.
        if entry.case.phase == "prefill":
            height = entry.work.flops / entry.median(OURS) / 1e9
            axes.annotate(str(entry.case.tokens), (x, height), (8, -4), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of weights and KV cache")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("Roofline: every case, prompts with their lengths")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
