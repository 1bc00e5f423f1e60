"""Runs the cases of a kernel library on a device, in a process that is started again after every crash or hang.

`python -m benchmarks.gpu.cases FOLDER` runs them in one process, which compute-sanitizer can check.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.kernel_library import CaseResult, KernelLibrary
from benchmarks.gpu.processes import emit_all, run_child
from tvm_attn.runtime.tvm_import import runtime_only

MOST_CRASHES = 10
"""After this many consecutive cases without a result, something else is wrong, and the remaining cases are skipped."""
SANITIZER_TOOLS = ("memcheck", "racecheck")


def command(folder: Path, device: str, first: int, last: int) -> list[str]:
    """The command that runs the cases first .. last - 1."""
    module = [sys.executable, "-m", "benchmarks.gpu.cases", str(folder), "--device", device]
    return [*module, "--first", str(first), "--last", str(last)]


def run_cases(
    folder: Path, device: str, seconds: float, on_result: Callable[[CaseResult], None] = lambda result: None
) -> list[CaseResult]:
    """Runs all cases of a library.

    Args:
        folder: the library.
        device: "cpu" or "cuda:0".
        seconds: time limit, after which the remaining cases are skipped.
        on_result: called with each result.

    Returns:
        Results in order; fewer than cases if time ran out, or after `MOST_CRASHES`. A case that crashed or hung has an
        NMSE of NaN.

    Raises:
        BenchmarkError: the folder holds no library.
    """
    library, results, end = KernelLibrary(folder), [], time.monotonic() + seconds

    def collect(result: CaseResult) -> None:
        results.append(result)
        on_result(result)

    crashes = 0
    while len(results) < len(library.cases) and crashes < MOST_CRASHES and (left := end - time.monotonic()) > 0:
        first = len(results)
        outcome = run_child(
            command(folder, device, first, len(library.cases)), left, lambda entry: collect(CaseResult(**entry))
        )
        crashes = crashes + 1 if len(results) == first else 1
        if len(results) < len(library.cases) and (outcome.error is None or time.monotonic() < end):
            case = library.cases[len(results)]
            reason = f"{case}: {outcome.error or 'ended without a result'}"
            collect(CaseResult(case.index, reason, math.nan, case.nmse, False, outcome.seconds))
    return results


def sanitize(folder: Path, device: str, seconds: float) -> dict[str, str]:
    """What each compute-sanitizer tool finds in all cases: "0 errors ...", its findings, or why it did not run."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return dict.fromkeys(SANITIZER_TOOLS, "compute-sanitizer is not installed: it comes with NVIDIA's CUDA toolkit")
    count = len(KernelLibrary(folder).cases)
    return {
        tool: sanitizer_verdict([sanitizer], tool, command(folder, device, 0, count), seconds / len(SANITIZER_TOOLS))
        for tool in SANITIZER_TOOLS
    }


def sanitizer_verdict(sanitizer: Sequence[str], tool: str, program: Sequence[str], seconds: float) -> str:
    """Runs a program under a tool; "0 errors" if it found none."""
    lines: list[str] = []
    # The tool's own exit status if it found something, regardless of the program's.
    options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    outcome = run_child([*sanitizer, *options, *program], seconds)
    failed = [entry["name"] for entry in outcome.entries if not entry.get("passed", True)]
    if outcome.error:
        lines.append(outcome.error)
    if failed:
        lines.append(f"{len(failed)} cases failed, the first: {failed[0]}")
    return "; ".join(lines) or f"0 errors in {len(outcome.entries)} cases"


def main(argv: list[str] | None = None) -> int:
    """Runs cases and prints one result per line."""
    parser = argparse.ArgumentParser(description="Run a kernel library's cases on a device; prints JSON lines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int)
    args = parser.parse_args(argv)
    from benchmarks.gpu.devices import tvm_device

    with runtime_only():  # starts in a second
        library, device = KernelLibrary(args.folder), tvm_device(args.device)
    emit_all(asdict(library.check(case, device)) for case in library.cases[args.first : args.last])
    return 0


if __name__ == "__main__":
    sys.exit(main())
