"""The limits of a CUDA device, measured with PyTorch: copying memory, and cuBLAS on a large square product."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tvm_attn.benchmark.counts import Work

_COPY_BYTES = 2 << 30
_FEATURES = 8192


@dataclass(frozen=True)
class DeviceLimits:
    """Measured limits of a CUDA device.

    Attributes:
        device: its name.
        dtype: dtype of the matrix products.
        product_gflops: GFLOP/s of cuBLAS on 8192 x 8192 x 8192 random numbers.
        copy_gbytes: GB/s of a copy within the device's memory, bytes read and written.
    """

    device: str
    dtype: str
    product_gflops: float
    copy_gbytes: float

    def bound(self, work: Work, arithmetic: str = "") -> tuple[float, str]:
        """The least seconds that a call can take, and the binding limit, "compute" or "memory"; see `Limits.bound`."""
        return max((work.flops / self.product_gflops / 1e9, "compute"), (work.bytes / self.copy_gbytes / 1e9, "memory"))


def torch_device(device: str) -> str:
    """PyTorch's name of a CUDA device, with its index."""
    return device if ":" in device else f"{device}:0"


def measure_copy(device: str, bytes_: int = _COPY_BYTES) -> float:
    """GB/s of a copy within a device's memory, bytes read and written."""
    import torch

    source = torch.empty(bytes_ // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    clock = Clock(device)
    return 2 * bytes_ / clock.seconds(clock.repeated(lambda: target.copy_(source))) / 1e9


def measure_product(device: str, dtype: str, features: int = _FEATURES) -> float:
    """GFLOP/s of cuBLAS on a square product of random numbers: zeros would run faster."""
    import torch

    kind = getattr(torch, dtype)
    left, right = (torch.randn(features, features, device=device).to(kind) for _ in range(2))
    out = torch.empty_like(left)
    clock = Clock(device)
    return 2 * features**3 / clock.seconds(clock.repeated(lambda: torch.mm(left, right.t(), out=out))) / 1e9


def measure_device_limits(device: str, dtype: str) -> DeviceLimits:
    """Measures the limits of a CUDA device in about two seconds."""
    import torch

    name = torch.cuda.get_device_name(device)
    return DeviceLimits(name, dtype, measure_product(device, dtype), measure_copy(device))


class Clock:
    """Times work on a device.

    On CUDA, calls are captured as a CUDA graph, so that the result excludes the host's time to start them, and timed
    between two events. Elsewhere, which is for tests, the host's clock is used.

    Args:
        device: the device's name in PyTorch.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device, self._cuda = torch, device, device.startswith("cuda")

    def repeated(self, call: Callable[[], object]) -> Callable[[], object]:
        """A function that does the work of `_CAPTURED` calls, as one CUDA graph if possible."""

        def repeat() -> None:
            for _ in range(_CAPTURED):
                call()

        call()  # libraries allocate memory now, which they must not do during capture
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
        except Exception as problem:  # something in the call cannot be captured
            print(f"timed without a graph: {problem}", file=sys.stderr)
            torch.cuda.synchronize()
            return repeat
        replay: Callable[[], object] = graph.replay
        return replay

    def seconds(self, repeated: Callable[[], object], budget: float = 0.3) -> float:
        """Median seconds per call of a function that `repeated` returned, measured for about `budget` seconds."""
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
