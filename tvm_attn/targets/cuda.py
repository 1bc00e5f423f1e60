"""NVIDIA GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tvm_attn.checks import integer, list_of, text
from tvm_attn.targets.gpu import GpuTarget


@dataclass(frozen=True)
class CudaTarget(GpuTarget):
    """NVIDIA GPUs.

    Attributes:
        architectures: the architectures whose machine code a library holds, as nvcc names them, e.g. ("sm_80",
            "sm_90a"). Code for sm_XY runs on X.Y and later minor versions; code for sm_90a runs only on 9.0.
        ptx: the virtual architecture whose PTX a library holds for the driver to compile if no machine code fits,
            e.g. "compute_80"; None for no PTX.
        multiprocessors: multiprocessors of the device that tiles are chosen for.
    """

    KERNELS = "cuda"
    TVM_KIND = "cuda"
    QUANTIZED_CACHE = False
    RULES = GpuTarget.RULES | {
        "cuda": {
            "architectures": list_of(text(r"sm_\d+[af]?"), "a list such as ['sm_80', 'sm_90a']", least=1),
            "ptx?": text(r"compute_\d+", "a virtual architecture such as 'compute_80', or leave it out"),
            "multiprocessors": integer(1, 1024),
        }
    }

    architectures: tuple[str, ...]
    ptx: str | None
    multiprocessors: int

    @classmethod
    def own(cls, table: dict[str, Any]) -> dict[str, Any]:
        """See `Target`."""
        cuda = table["cuda"]
        return super().own(table) | {
            "architectures": tuple(cuda["architectures"]),
            "ptx": cuda.get("ptx"),
            "multiprocessors": cuda["multiprocessors"],
        }

    def to_table(self) -> dict[str, Any]:
        """See `Target`."""
        cuda = {"architectures": self.architectures, "multiprocessors": self.multiprocessors}
        return super().to_table() | {"cuda": cuda | ({"ptx": self.ptx} if self.ptx else {})}

    @property
    def images(self) -> tuple[str, ...]:
        """The architectures that a library holds code for, machine code first."""
        return (*self.architectures, *((self.ptx,) if self.ptx else ()))

    @property
    def has_dependent_launch(self) -> bool:
        """Whether every device of the target can start a kernel before the one before it has ended: sm_90 and later."""
        return all(int(re.sub(r"\D", "", image)) >= 90 for image in self.images)

    @property
    def has_warpgroup_products(self) -> bool:
        """Whether every device of the target has Hopper's `wgmma`, which no other generation has."""
        return set(self.images) == {"sm_90a"}


TARGET_CLASS = CudaTarget
