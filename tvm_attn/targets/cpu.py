"""Processors with vector units."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tvm_attn.checks import integer, list_of, power_of_two, text
from tvm_attn.errors import shorten
from tvm_attn.targets.base import Target


@dataclass(frozen=True)
class CpuTarget(Target):
    """A processor with vector units.

    Attributes:
        processor: LLVM's name of the processor, or None in a generic file.
        rank: of the generic targets that fit, the one with the highest rank is used; 0 if `processor` is given.
        lanes: float32 values in a vector register.
        l2_bytes: level-2 cache of a core.
    """

    KERNELS = "cpu"
    TVM_KIND = "llvm"
    RULES = Target.RULES | {
        "features": list_of(text(r"[\w.-]+"), "a list of instruction sets"),
        "detect": {"architecture": text(r"\w+"), "processor?": text(r"[\w.-]+"), "rank?": integer(0, 1000)},
        "vector": {"lanes": power_of_two(1, 64)},
        "cache": {"l2_bytes": integer(1, 1 << 40)},
    }

    processor: str | None
    rank: int
    lanes: int
    l2_bytes: int

    def missing(self, features: Collection[str]) -> list[str]:
        """What this machine's processor, which has the instruction sets `features`, lacks."""
        if self.architecture != platform.machine():
            return [f"architecture {self.architecture}"]
        return [feature for feature in self.features if feature not in features]

    def is_akin_to(self, other: Target) -> bool:
        """See `Target`: the same registers and tiles, for which the same decisions are right."""
        shape = self.architecture, self.lanes, self.tile_rows, self.tile_columns
        return isinstance(other, CpuTarget) and shape == (
            other.architecture,
            other.lanes,
            other.tile_rows,
            other.tile_columns,
        )

    @classmethod
    def own(cls, table: dict[str, Any]) -> dict[str, Any]:
        """See `Target`."""
        detect = table["detect"]
        return {
            "architecture": detect["architecture"],
            "features": tuple(table["features"]),
            "processor": detect.get("processor"),
            "rank": detect.get("rank", 0),
            "lanes": table["vector"]["lanes"],
            "l2_bytes": table["cache"]["l2_bytes"],
        }

    def to_table(self) -> dict[str, Any]:
        """See `Target`."""
        detect: dict[str, Any] = {"architecture": self.architecture}
        detect |= {"rank": self.rank} if self.processor is None else {"processor": self.processor}
        return super().to_table() | {
            "features": list(self.features),
            "detect": detect,
            "vector": {"lanes": self.lanes},
            "cache": {"l2_bytes": self.l2_bytes},
        }

    @classmethod
    def misfit(cls, table: dict[str, Any]) -> str | None:
        """See `Target`."""
        columns, lanes = table["tile"]["columns"], table["vector"]["lanes"]
        if columns % lanes:
            return f"tile.columns is {columns}; give a multiple of vector.lanes, {lanes}"
        architecture, triple = table["detect"]["architecture"], table["tvm"].get("mtriple")
        if type(triple) is str and triple.partition("-")[0] != architecture:
            return (
                f"tvm.mtriple is {shorten(triple)}; give one for detect.architecture, such as {architecture}-linux-gnu"
            )
        return super().misfit(table)


TARGET_CLASS = CpuTarget
