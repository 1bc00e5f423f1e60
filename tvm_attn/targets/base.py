"""What every target file says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_attn.checks import POSITIVE, TABLE, integer, list_of, one_of, power_of_two, text
from tvm_attn.errors import shorten
from tvm_attn.storage import DTYPES


@dataclass(frozen=True)
class Peak:
    """Measured limits of the hardware with all cores.

    Attributes:
        float32_gflops: rate of float32 multiply-adds, 10^9 operations per second.
        memory_gbytes: rate of reading memory, 10^9 bytes per second.
    """

    float32_gflops: float
    memory_gbytes: float


@dataclass(frozen=True)
class Target(ABC):
    """One kind of hardware, as its file describes it; each device class has a subclass.

    Attributes:
        KERNELS: the folder of `tvm_attn.kernels` with the loops and templates of the device class.
        RULES: rules for the file's keys, see `tvm_attn.checks`.
        TVM_KIND: the `kind` of the TVM target.
        name: the file's name without `.toml`, e.g. "cpu-znver4".
        device: one of `tvm_attn.backends.BACKENDS`.
        description: one line for readers.
        tvm: the argument of `tvm.target.Target`.
        tile_rows: rows of a register tile and of a row group.
        tile_columns: columns of a packed weight strip, a power of two.
        dtypes: storage dtypes that can be compiled.
        peak: measured limits, or None if they have not been measured.
        architecture: `platform.machine()` of the processor that runs the code, or its host part, e.g. "x86_64".
        features: instruction sets of that processor that the code may use, as Linux names them.
    """

    KERNELS: ClassVar[str]
    TVM_KIND: ClassVar[str]
    RULES: ClassVar[dict[str, Any]] = {
        "device": text(),
        "description": text(),
        "dtypes": list_of(one_of(*DTYPES), f"a list of {', '.join(DTYPES)}", least=1, most=3),
        "tvm": TABLE,
        "tile": {"rows": integer(1, 64), "columns": power_of_two(1, 1024)},
        "peak?": {"float32_gflops": POSITIVE, "memory_gbytes": POSITIVE, "measured?": text()},
    }

    name: str
    device: str
    description: str
    tvm: dict[str, Any]
    tile_rows: int
    tile_columns: int
    dtypes: tuple[str, ...]
    peak: Peak | None
    architecture: str
    features: tuple[str, ...]

    @classmethod
    @abstractmethod
    def own(cls, table: dict[str, Any]) -> dict[str, Any]:
        """The fields that a subclass adds, and `architecture` and `features`, from a table that follows the rules."""

    @classmethod
    def misfit(cls, table: dict[str, Any]) -> str | None:
        """A description of values that are valid one by one but contradict each other; None if there are none."""
        kind = table["tvm"].get("kind")
        return None if kind == cls.TVM_KIND else f"tvm.kind is {shorten(kind)}; give {cls.TVM_KIND!r}"

    @classmethod
    def from_table(cls, name: str, table: dict[str, Any]) -> Target:
        """The target that a file's table describes; the table follows the rules."""
        peak = table.get("peak")
        return cls(
            name=name,
            device=table["device"],
            description=table["description"],
            tvm=table["tvm"],
            tile_rows=table["tile"]["rows"],
            tile_columns=table["tile"]["columns"],
            dtypes=tuple(table["dtypes"]),
            peak=Peak(peak["float32_gflops"], peak["memory_gbytes"]) if peak else None,
            **cls.own(table),
        )
