"""What the target file of every GPU says."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

from tvm_attn.checks import integer, list_of, power_of_two
from tvm_attn.errors import shorten
from tvm_attn.targets.base import Target


@dataclass(frozen=True)
class GpuTarget(Target):
    """A GPU. The host part of its libraries is compiled for any processor of this machine's architecture.

    Attributes:
        max_threads: the most threads in a block (a workgroup).
        shared_bytes: the most shared (workgroup) memory of a block.
        subgroup: size of a subgroup (a warp), whose threads may exchange registers; None if no size may be assumed.
        vector_bytes: size of a thread's widest load.
        matrix: M, N, K of the matrices that a subgroup multiplies, float16 with float32 sums; None if none may be
            assumed.
    """

    KERNELS = "gpu"
    RULES = Target.RULES | {
        "gpu": {
            "max_threads": power_of_two(32, 1024),
            "shared_bytes": integer(1, 1 << 20),
            "subgroup?": power_of_two(1, 128),
            "vector_bytes": power_of_two(4, 16),
            "matrix?": list_of(power_of_two(1, 64), "three sizes such as [16, 16, 16]", least=3, most=3),
        }
    }

    max_threads: int
    shared_bytes: int
    subgroup: int | None
    vector_bytes: int
    matrix: tuple[int, int, int] | None

    @classmethod
    def own(cls, table: dict[str, Any]) -> dict[str, Any]:
        """See `Target`."""
        gpu = table["gpu"]
        return {
            "architecture": platform.machine(),
            "features": (),
            "max_threads": gpu["max_threads"],
            "shared_bytes": gpu["shared_bytes"],
            "subgroup": gpu.get("subgroup"),
            "vector_bytes": gpu["vector_bytes"],
            "matrix": tuple(gpu["matrix"]) if "matrix" in gpu else None,
        }

    def to_table(self) -> dict[str, Any]:
        """See `Target`."""
        names = ("max_threads", "shared_bytes", "subgroup", "vector_bytes", "matrix")
        gpu = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return super().to_table() | {"gpu": gpu}

    @classmethod
    def misfit(cls, table: dict[str, Any]) -> str | None:
        """See `Target`."""
        gpu, warp = table["gpu"], table["tvm"].get("thread_warp_size")
        if "matrix" in gpu and "subgroup" not in gpu:
            return "gpu.matrix needs gpu.subgroup"
        if "subgroup" in gpu and warp != gpu["subgroup"]:
            return f"tvm.thread_warp_size is {shorten(warp)}; give the value of gpu.subgroup"
        return super().misfit(table)
