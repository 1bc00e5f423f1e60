"""The device that is measured: TVM's and PyTorch's views of it."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from typing import Any

from tvm_attn.benchmark.device import Clock
from tvm_attn.errors import DeviceError
from tvm_attn.runtime.device import parse_device
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.tvm_import import import_tvm


def tvm_device(name: str) -> Any:
    """TVM's device for a name such as "cuda:0".

    Raises:
        DeviceError: there is no such device.
    """
    import_tvm()
    import tvm

    kind, index = parse_device(name) or ("cpu", 0)
    if reason := device_class(kind).obstacle(index):
        raise DeviceError(f"device {name}: {reason}")
    return tvm.runtime.device(kind, index)


def describe(name: str) -> dict[str, Any]:
    """A description of a CUDA device from PyTorch and NVIDIA's tools."""
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


def in_turns(
    clock: Clock, calls: dict[str, Callable[[], object]], rounds: int = 3, budget: float = 0.2
) -> dict[str, float]:
    """Median seconds of each of several calls, which take turns so that all see the device in the same state."""
    repeated = {name: clock.repeated(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in repeated.items():
            times[name].append(clock.seconds(call, budget))
    return {name: statistics.median(values) for name, values in times.items()}
