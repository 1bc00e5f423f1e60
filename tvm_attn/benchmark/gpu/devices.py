"""The device that is measured: TVM's and PyTorch's views of it, and its clock."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tvm_attn.errors import DeviceError
from tvm_attn.runtime.device import obstacle, parse_device
from tvm_attn.runtime.tvm_import import import_tvm


def tvm_device(name: str) -> Any:
    """TVM's device of a name such as "cuda:0".

    Raises:
        DeviceError: there is no such device.
    """
    import_tvm()
    import tvm

    kind, index = parse_device(name) or ("cpu", 0)
    if reason := obstacle(kind, index):
        raise DeviceError(f"device {name}: {reason}")
    return tvm.runtime.device(kind, index)


def describe(name: str) -> dict[str, Any]:
    """What PyTorch and NVIDIA's tools say of a CUDA device."""
    import torch

    properties = torch.cuda.get_device_properties(name)
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,ecc.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, AttributeError, subprocess.TimeoutExpired):
        answer = ""
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": dict(zip(query.split(","), answer.split(", "), strict=False)),
    }


class Clock:
    """Times work on a device.

    On CUDA, calls are captured as a CUDA graph, so that the host's time to start them is not in the result, and timed
    between two events. Elsewhere from the host's clock, for tests.

    Args:
        device: as PyTorch names it.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device, self._cuda = torch, device, device.startswith("cuda")

    def repeated(self, call: Callable[[], object]) -> Callable[[], object]:
        """A function that does the work of `_CAPTURED` calls, as one CUDA graph where that is possible."""

        def repeat() -> None:
            for _ in range(_CAPTURED):
                call()

        call()  # libraries allocate what a capture must not
        if not self._cuda:
            return repeat
        import tvm
        import tvm_ffi

        torch = self._torch
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        device = tvm.runtime.device("cuda", torch.device(self._device).index or 0)
        try:
            with torch.cuda.graph(graph, stream=stream), tvm_ffi.use_raw_stream(device, stream.cuda_stream):
                repeat()
        except Exception as problem:  # something in it cannot be captured
            print(f"timed without a graph: {problem}", file=sys.stderr)
            torch.cuda.synchronize()
            return repeat
        replay: Callable[[], object] = graph.replay
        return replay

    def seconds(self, repeated: Callable[[], object], budget: float = 0.3) -> float:
        """Median seconds of one of the calls in what `repeated` returned, over about `budget` seconds."""
        repeated()
        times: list[float] = []
        end = time.perf_counter() + budget
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
            times.append(self._measure(repeated) / _CAPTURED)
        return statistics.median(times)

    def _measure(self, call: Callable[[], object]) -> float:
        if not self._cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


_CAPTURED = 10
"""Calls that are timed together."""


def in_turns(
    clock: Clock, calls: dict[str, Callable[[], object]], rounds: int = 3, budget: float = 0.2
) -> dict[str, float]:
    """Median seconds of several calls that take turns, so that all see the device in the same state."""
    repeated = {name: clock.repeated(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in repeated.items():
            times[name].append(clock.seconds(call, budget))
    return {name: statistics.median(values) for name, values in times.items()}
