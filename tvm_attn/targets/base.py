"""What every target file says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tvm_attn.checks import POSITIVE, TABLE, integer, list_of, one_of, power_of_two, text
from tvm_attn.errors import shorten
from tvm_attn.jsonfile import shorten_path
from tvm_attn.storage import DTYPES

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}"
"""The pattern of a target's name, which is part of file names."""


@dataclass(frozen=True)
class Peak:
    """Measured limits of the hardware with all cores.

    Attributes:
        float32_gflops: rate of float32 multiply-adds, 10^9 operations per second.
        memory_gbytes: rate of reading memory, 10^9 bytes per second.
        measured: where and how, one line.
    """

    float32_gflops: float
    memory_gbytes: float
    measured: str | None = None


@dataclass(frozen=True)
class Target(ABC):
    """One kind of hardware, as its file describes it; each device class has a subclass.

    Attributes:
        KERNELS: the folder of `tvm_attn.kernels` with the loops and templates of the device class.
        RULES: rules for the file's keys, see `tvm_attn.checks`.
        TVM_KIND: the `kind` of the TVM target.
        QUANTIZED_CACHE: whether the templates take a KV cache in 8 bits.
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
        based_on: the target whose tuned records suit this one; None if the file names none.
        file: where the target was read from; None if it comes from no file.
    """

    KERNELS: ClassVar[str]
    TVM_KIND: ClassVar[str]
    QUANTIZED_CACHE: ClassVar[bool] = True
    RULES: ClassVar[dict[str, Any]] = {
        "device": text(),
        "description": text(),
        "based_on?": text(NAME, "a target's name"),
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
    based_on: str | None = field(default=None, kw_only=True)
    file: Path | None = field(default=None, kw_only=True, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about the code for it: all fields but those that only describe it."""
        described = ("description", "peak", "based_on", "file")
        return {name: value for name, value in asdict(self).items() if name not in described}

    @classmethod
    @abstractmethod
    def own(cls, table: dict[str, Any]) -> dict[str, Any]:
        """The fields that a subclass adds, and `architecture` and `features`, from a table that follows the rules."""

    @classmethod
    def misfit(cls, table: dict[str, Any]) -> str | None:
        """A description of values that are valid one by one but contradict each other; None if there are none."""
        kind = table["tvm"].get("kind")
        return None if kind == cls.TVM_KIND else f"tvm.kind is {shorten(kind)}; give {cls.TVM_KIND!r}"

    @property
    def place(self) -> str:
        """The target for a message: its file, or its name if it has none."""
        return self.name if self.file is None else shorten_path(self.file)

    def is_akin_to(self, other: Target) -> bool:
        """Whether the tuned records of another target of the class may be used for this one, though its file does not
        say that it is based on it."""
        return False

    @classmethod
    def from_table(cls, name: str, table: dict[str, Any], file: Path | None = None) -> Target:
        """The target that a table describes, which follows the rules; `file` is where it was read."""
        peak = table.get("peak")
        return cls(
            name=name,
            device=table["device"],
            description=table["description"],
            tvm=table["tvm"],
            tile_rows=table["tile"]["rows"],
            tile_columns=table["tile"]["columns"],
            dtypes=tuple(table["dtypes"]),
            peak=Peak(**peak) if peak else None,
            based_on=table.get("based_on"),
            file=file,
            **cls.own(table),
        )

    def to_table(self) -> dict[str, Any]:
        """The table of which `from_table` makes the same target."""
        peak = {name: value for name, value in vars(self.peak).items() if value is not None} if self.peak else None
        return {
            "device": self.device,
            "description": self.description,
            **({"based_on": self.based_on} if self.based_on else {}),
            "dtypes": list(self.dtypes),
            "tvm": self.tvm,
            "tile": {"rows": self.tile_rows, "columns": self.tile_columns},
            **({"peak": peak} if peak else {}),
        }
