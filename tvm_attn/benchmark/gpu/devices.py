"""The device that is measured: TVM's and PyTorch's views of it, and its clock."""

from __future__ import annotations

import statistics
import subprocess
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
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={properties.uuid}"]
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

    On CUDA between two events on PyTorch's current stream, which is the default stream, as TVM's is; each call is many
    runs, so that starting them costs nothing. Elsewhere from the host's clock, for tests.

    Args:
        device: as PyTorch names it.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._cuda = torch, device.startswith("cuda")
        # Larger than the second-level cache of every GPU so far: inputs come from memory, as between other work.
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if self._cuda else None

    def seconds(self, call: Callable[[], object], budget: float = 0.5, cold: bool = False) -> float:
        """Median seconds of a call over several measurements of about `budget` seconds in all.

        Args:
            call: starts the work.
            budget: about how long to go on.
            cold: whether the second-level cache is emptied before each run.
        """
        call()
        once = max(self._measure(call, 1), 1e-7)
        runs = 1 if cold else max(1, min(1000, int(budget / 10 / once)))
        times: list[float] = []
        end = time.perf_counter() + budget
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
            if cold and self._flush is not None:
                self._flush.zero_()
            times.append(self._measure(call, runs) / runs)
        return statistics.median(times)

    def _measure(self, call: Callable[[], object], runs: int) -> float:
        if not self._cuda:
            start = time.perf_counter()
            for _ in range(runs):
                call()
            return time.perf_counter() - start
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(runs):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def in_turns(
    clock: Clock, calls: dict[str, Callable[[], object]], rounds: int = 3, budget: float = 0.3
) -> dict[str, float]:
    """Median seconds of several calls that take turns, so that all see the device in the same state."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock.seconds(call, budget))
    return {name: statistics.median(values) for name, values in times.items()}
