"""What a search found, as tables, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from tvm_attn.errors import TuningError, one_line
from tvm_attn.jsonfile import shorten_path
from tvm_attn.schedule.records import Record, read_records
from tvm_attn.tuning.tuner import Found, Tuned
from tvm_attn.tuning.whole import Verdict

FILES = ("tune.json", "convergence.png", "gains.png")


def to_dict(tuned: Tuned) -> dict[str, Any]:
    """Everything, for JSON."""
    facts: dict[str, Any] = json.loads(json.dumps(asdict(tuned), default=str))
    if tuned.verdict is not None:
        for entry, call in zip(facts["verdict"]["calls"], tuned.verdict.calls, strict=True):
            entry |= {"ratio": call.ratio, "error": call.error, "slower": call.is_slower}
    return facts


def sentence(verdict: Verdict, what: str) -> str:
    """One line that says what whole calls gain."""
    gains = (f"{call.case} from {call.before:.4g} to {call.after:.4g} tokens/s" for call in verdict.calls)
    return f"{what}: " + (", ".join(gains) if verdict.calls else "no record stays, so nothing changes")


def write_report(tuned: Tuned, folder: Path) -> list[Path]:
    """Writes `tune.json`, and pictures of the convergence and of the gains.

    Raises:
        TuningError: matplotlib is missing, or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_text(json.dumps(to_dict(tuned), indent=1), encoding="utf-8")
        _plot_convergence(tuned.found, folder / FILES[1])
        _plot_gains(tuned, folder / FILES[2])
    except ImportError:
        raise TuningError("--report draws with matplotlib: pip install matplotlib (the extra plot)") from None
    except OSError as error:
        raise TuningError(f"{shorten_path(folder)} cannot be written: {one_line(error)}") from error
    return [folder / name for name in FILES]


def _plot_convergence(found: Iterable[Found], file: Path) -> None:
    """The best time so far, relative to the first one, over the candidates of each kernel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for entry in found:
        times = [time for time in entry.times_us if time is not None]
        if len(times) > 1:
            best = [times[0] / time for time in accumulate(times, min)]
            axes.step(range(1, len(best) + 1), best, where="post", label=entry.kernel)
    axes.set_xlabel("candidates measured")
    axes.set_ylabel("speed, the first candidate = 1")
    axes.set_title("Convergence of the search")
    if axes.lines:
        axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=120)


def _plot_gains(tuned: Tuned, file: Path) -> None:
    """Speed after over speed before, of each kernel alone and of whole calls."""
    from matplotlib.figure import Figure

    bars = [(entry.kernel, entry.gain or 1.0, "tab:blue") for entry in tuned.found]
    if tuned.verdict is not None:
        bars += [(f"whole call: {call.case}", call.ratio, "tab:orange") for call in tuned.verdict.calls]
    figure = Figure(figsize=(9, 1 + 0.28 * max(1, len(bars))), layout="constrained")
    axes = figure.add_subplot()
    names, values, colours = zip(*reversed(bars), strict=True) if bars else ((), (), ())
    axes.barh(names, values, color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed with the new records / before")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(file, dpi=120)


# --- records that are there ---


def list_folders(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The tuned targets in folders: name, folder, number of records, and the days of the oldest and the newest."""
    found = []
    for folder in folders:
        for target in sorted(path for path in folder.glob("*") if path.is_dir()):
            records = [record for file in sorted(target.glob("*.jsonl")) for record in read_records(file)]
            if records:
                days = sorted(record.date for record in records)
                facts = {"target": target.name, "folder": str(target), "records": len(records)}
                found.append(facts | {"from": days[0], "to": days[-1]})
    return found


def compare_folders(first: Path, second: Path) -> list[dict[str, Any]]:
    """The kernels that both folders have records for: the times, and how much faster the second is.

    Raises:
        TuningError: a folder has no records.
        ScheduleError: a file is malformed.
    """
    one, two = (_records_in(folder) for folder in (first, second))
    rows = []
    for key in sorted(one.keys() & two.keys()):
        a, b = one[key], two[key]
        facts = {"template": a.template, "kernel": _describe(a.shape), "first_us": a.time_us, "second_us": b.time_us}
        rows.append(facts | {"speedup": a.time_us / b.time_us, "same": a.decisions == b.decisions})
    return rows


def _records_in(folder: Path) -> dict[tuple[str, int, str], Record]:
    records = {record.key: record for file in sorted(folder.glob("*.jsonl")) for record in read_records(file)}
    if not records:
        raise TuningError(f"{shorten_path(folder)} has no records; name a folder such as those that tune --list prints")
    return records


def _describe(shape: dict[str, Any]) -> str:
    names = ("in_features", "out_features", "heads", "head_dim", "width", "rows", "groups", "weights", "dtype")
    return " ".join([str(shape["family"]), *(f"{name}={shape[name]}" for name in names if shape.get(name) is not None)])
