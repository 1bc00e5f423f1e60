"""How a model runs beside other programs: speed with busy loops beside it, and how soon its process ends.

    python -m benchmarks.busy ARTIFACT
    python -m benchmarks.busy dist/gpt2 --against ../old/dist/gpt2@../old    # with the code of another checkout, too

Every figure is a process of its own, that of the systems in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LIMIT = 120.0
"""Seconds after which a process that does not end is killed, beyond the time it measures for."""


def _worker(artifact: str, threads: int, seconds: float, context: int) -> None:
    """Prints tokens/s of decode and prefill, then ends."""
    import numpy as np

    import tvm_attn

    model = tvm_attn.load(artifact, device="cpu", threads=threads, max_batch=1)
    engine = model.engine
    prompt = (np.arange(context) % model.config.vocab_size).astype(np.int32)
    token, slot, position = np.array([1], np.int32), np.array([0], np.int32), np.array([context], np.int32)

    def rate(call: Any, tokens: int) -> float:
        call()
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or not calls:
            call()
            calls += 1
        return tokens * calls / (time.perf_counter() - start)

    prefill = rate(lambda: engine.prefill([prompt], [0]).argmax(), context)
    decode = rate(lambda: engine.decode(token, slot, position).argmax(), 1)
    print(json.dumps({"prefill": prefill, "decode": decode, "end": time.time()}), flush=True)


@contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _measure(system: str, threads: int, seconds: float, context: int) -> dict[str, float] | None:
    """Tokens/s of decode and prefill, and the seconds that the process took to end; None where it did not."""
    artifact, _, checkout = system.partition("@")
    root = checkout or str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "TVM_USE_RUNTIME_LIB": "1"}
    call = f"busy._worker({artifact!r}, {threads}, {seconds}, {context})"
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.append({here!r}); import busy; {call}"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=2 * seconds + _LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            return None
        ended = time.time()
    if process.returncode:
        raise SystemExit(f"{system}: the process ended with status {process.returncode}")
    figures = json.loads(output)
    return {"prefill": figures["prefill"], "decode": figures["decode"], "exit": ended - figures["end"]}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--against", action="append", default=[], metavar="ARTIFACT@CHECKOUT")
    parser.add_argument("--loops", default="0,2,6", help="busy loops beside the model, a list (default: %(default)s)")
    parser.add_argument("--threads", default="2,1", help="threads of the model, a list (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of each figure (default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure (default: %(default)s)")
    options = parser.parse_args()
    systems = [str(Path(options.artifact).resolve()), *options.against]
    print("| loops | threads | system | prefill tokens/s | decode tokens/s | exit s |\n|---|---|---|---|---|---|")
    for loops in map(int, options.loops.split(",")):
        rows: dict[tuple[int, str], list[dict[str, float] | None]] = {}
        with _busy_loops(loops):
            for _ in range(options.rounds):
                for threads in map(int, options.threads.split(",")):
                    for system in systems:
                        figures = _measure(system, threads, options.seconds, options.context)
                        rows.setdefault((threads, system), []).append(figures)
        for (threads, system), runs in rows.items():
            print(f"| {loops} | {threads} | {system} | {_summary(runs)} |", flush=True)


def _summary(runs: list[dict[str, float] | None]) -> str:
    """The medians of what ended, the range of decode behind it."""
    ended = [run for run in runs if run is not None]
    if not ended:
        return "not ended | |"
    prefill, decode, end = ([run[name] for run in ended] for name in ("prefill", "decode", "exit"))
    cells = [
        f"{statistics.median(prefill):.0f}",
        f"{statistics.median(decode):.1f} ({min(decode):.1f}-{max(decode):.1f})",
        f"{max(end):.2f}",
    ]
    if len(ended) < len(runs):
        cells[-1] += f", {len(runs) - len(ended)} of {len(runs)} not ended"
    return " | ".join(cells)


if __name__ == "__main__":
    main()
