"""What a CUDA device can do at most, measured with PyTorch: copying memory, and cuBLAS on a large square product."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_attn.benchmark.counts import Work
from tvm_attn.benchmark.gpu.devices import Clock

_COPY_BYTES = 2 << 30
_FEATURES = 8192


@dataclass(frozen=True)
class DeviceLimits:
    """Measured limits of a CUDA device.

    Attributes:
        device: its name.
        dtype: of the matrix products.
        product_gflops: cuBLAS on 8192 x 8192 x 8192, random numbers.
        copy_gbytes: a copy within the device's memory, bytes read and written.
    """

    device: str
    dtype: str
    product_gflops: float
    copy_gbytes: float

    def bound(self, work: Work, arithmetic: str = "") -> tuple[float, str]:
        """The least seconds that a call can take, and what binds: "compute" or "memory"; see `Limits.bound`."""
        return max((work.flops / self.product_gflops / 1e9, "compute"), (work.bytes / self.copy_gbytes / 1e9, "memory"))


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
