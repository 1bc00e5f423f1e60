"""All checks and measurements of an NVIDIA GPU, in one command of under 8 minutes.

    python -m benchmarks.gpu --artifacts dist --kernels dist/kernels

Correctness first: single kernels against NumPy float64, artifacts against PyTorch, decoding with and without graphs.
Then speed: matrix products against cuBLAS, attention against PyTorch's, whole models against PyTorch (eager, with CUDA
graphs, and compiled), and the time from process start to the first token. Every part runs in its own process with a
time limit: if it crashes or hangs, its error is recorded, and the others still run. The result is a JSON file, which is
complete up to the latest entry at any time. The exit status is 1 if a check failed.

Needs TVM's runtime, PyTorch, artifacts and kernels that were compiled elsewhere; `python -m benchmarks.pack` packs
them.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts as gpu_parts
from benchmarks.gpu.figures import FIGURES, tables
from benchmarks.gpu.processes import emit_all
from tvm_attn.cli import Parser, output_file, print_tables, real, run
from tvm_attn.errors import BenchmarkError, DeviceError

ROOT = Path(__file__).parents[2]
SECONDS = 450.0


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _main(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    parser.add_argument(
        "--artifacts", type=Path, default=ROOT / "artifacts", metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer cases")
    parser.add_argument("--sanitize", action="store_true", help="kernels under compute-sanitizer as well, last")
    parser.add_argument("--only", metavar="PART,...", help="parts to run, e.g. kernels,verify; default: all")
    parser.add_argument(
        "--seconds", type=real, default=SECONDS, metavar="S", help="for all parts together; default: %(default)s"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="default: benchmarks/results/gpu-DEVICE.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the part that a child process of this command runs
    return parser


def _main(args: argparse.Namespace) -> int:
    settings = gpu_parts.Settings(args.device, args.artifacts, args.kernels, args.quick)
    if args.part:
        emit_all(gpu_parts.run_part(args.part, settings, args.seconds))
        return 0
    artifacts = gpu_parts.artifacts_of(settings.artifacts)
    planned = gpu_parts.plan(settings, artifacts, args.sanitize)
    if args.only:
        wanted = {name.strip() for name in args.only.split(",")}
        planned = [part for part in planned if wanted & {part.name, part.name.partition(":")[0]}]
    if not any(part.name != "device" for part in planned):
        raise BenchmarkError(
            f"nothing to run: neither artifacts for CUDA in {settings.artifacts} nor kernels in {settings.kernels}; "
            "python -m benchmarks.pack brings both"
        )
    begin = time.monotonic()
    results: dict[str, Any] = {}

    def command(part: gpu_parts.Part, limit: float) -> list[str]:
        return _command(args, part.name, limit)

    def changed(ran: dict[str, dict[str, Any]]) -> None:
        error = ran[planned[0].name]["error"] or ""
        if error.startswith(_NO_DEVICE):  # every part would fail with it
            raise DeviceError(error.partition(": ")[2])
        results.update(summary(ran, args.quick, time.monotonic() - begin))
        gpu_parts.write_json(results, _path(args, results))

    signal.signal(signal.SIGTERM, _terminate)
    try:
        gpu_parts.run_parts(planned, command, args.seconds, _say, changed)
        ending = "FAILED" if results["failed"] else "passed"
    except _Terminated:
        ending = "terminated"
    print_tables(tables(results))
    print(f"{ending} in {results['seconds']:.0f} s; written to {_path(args, results)}")
    return 128 + signal.SIGTERM if ending == "terminated" else int(results["failed"])


_NO_DEVICE = f"{DeviceError.__name__}: device "


class _Terminated(BaseException):
    """SIGTERM came, as from `timeout`: the tables of what there is are still printed."""


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise _Terminated


def _path(args: argparse.Namespace, result: dict[str, Any]) -> Path:
    """The file of the result; its folder exists then."""
    path: Path = args.json or ROOT / "benchmarks" / "results" / f"gpu-{_device_name(result)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)  # a bundle has no results
    return path


def _command(args: argparse.Namespace, part: str, limit: float) -> list[str]:
    # Only the runtime is measured, and it starts seconds sooner than the compiler.
    command = ["env", "TVM_USE_RUNTIME_LIB=1", sys.executable, "-m", "benchmarks.gpu"]
    command += ["--part", part, "--seconds", f"{limit:.1f}"]
    command += ["--device", args.device, "--artifacts", str(args.artifacts), "--kernels", str(args.kernels)]
    return [*command, "--quick"] if args.quick else command


def summary(parts: dict[str, dict[str, Any]], quick: bool, seconds: float) -> dict[str, Any]:
    """The JSON of a run.

    Args:
        parts: what `run_parts` returned.
        quick: whether it was a quick run.
        seconds: how long it took.
    """
    entries = [entry for part in parts.values() for entry in part["entries"]]
    return {
        "date": date.today().isoformat(),
        "quick": quick,
        "seconds": round(seconds, 1),
        "failed": gpu_parts.has_failed(parts),
        "device": next((entry for entry in entries if entry.get("what") == "device"), None),
        "figures": [figure.result(entries) for figure in FIGURES],
        "parts": parts,
    }


def _device_name(result: dict[str, Any]) -> str:
    name = result["device"]["name"] if result["device"] else "unknown"
    return "-".join(name.lower().split())


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
