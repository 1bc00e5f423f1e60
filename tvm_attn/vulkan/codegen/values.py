"""Data types and values of TIR in the code generator: vectors are split into parts of at most four lanes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from tvm_attn.errors import CompileError

MAX_LANES = 4
_CODES = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 6: "bool"}


class DType(NamedTuple):
    """Kind ("int", "uint", "float", "bfloat", "bool", "handle" or "void"), bits and lanes."""

    kind: str
    bits: int
    lanes: int = 1

    def with_lanes(self, lanes: int) -> DType:
        return DType(self.kind, self.bits, lanes)

    @property
    def scalar(self) -> DType:
        return DType(self.kind, self.bits)

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def bytes(self) -> int:
        """Size in memory of one lane."""
        return max(self.bits, 8) // 8

    def __str__(self) -> str:
        name = (
            self.kind
            if self.kind in ("bool", "handle", "void")
            else f"{self.kind}{self.bits}".replace("bfloat", "bfloat")
        )
        return name if self.lanes == 1 else f"{name}x{self.lanes}"


def number(expr: Any) -> int | None:
    """The value of an integer constant; None for other expressions and for None."""
    return int(expr.value) if type(expr).__name__ == "IntImm" else None


def text(expr: Any) -> str:
    """The value of a string constant. Raises CompileError for other expressions."""
    if type(expr).__name__ != "StringImm":
        raise CompileError("the name in a call is not constant")
    return str(expr.value)


BOOL = DType("bool", 8)
INT32 = DType("int", 32)
UINT32 = DType("uint", 32)
INT64 = DType("int", 64)
FLOAT32 = DType("float", 32)


@cache
def _parse(code: int, bits: int, lanes: int) -> DType:
    kind = _CODES.get(code)
    if kind is None:
        return DType(f"type{code}_", bits, lanes)
    if kind == "handle" and bits == 0:
        return DType("void", 0, 1)
    if kind == "uint" and bits == 1:
        return DType("bool", 8, lanes)
    return DType(kind, bits, lanes)


_BY_NAME: dict[str, DType] = {}


def from_tvm(dtype: str) -> DType:
    """The type for a `tvm_ffi.dtype`, which is a string with `type_code`, `bits` and `lanes`."""
    known = _BY_NAME.get(dtype)
    if known is None:
        known = _parse(dtype.type_code, dtype.bits, dtype.lanes)  # type: ignore[attr-defined]
        _BY_NAME[str(dtype)] = known
    return known


@cache
def split(lanes: int) -> tuple[int, ...]:
    """Widths of the parts: 10 -> (4, 4, 2)."""
    full, rest = divmod(lanes, MAX_LANES)
    return (MAX_LANES,) * full + ((rest,) if rest else ())


class Value:
    """A TIR value: its type and one id for each part.

    `narrow` marks a 64-bit integer that is known to fit 32 bits and whose ids are 32-bit, which halves the cost of
    address arithmetic in kernels with 64-bit shapes. `Arithmetic.wide` gives the full form.
    """

    __slots__ = ("dtype", "narrow", "parts")

    def __init__(self, dtype: DType, parts: Sequence[int], narrow: bool = False) -> None:
        self.dtype = dtype
        self.parts = tuple(parts)
        self.narrow = narrow

    @property
    def id(self) -> int:
        """The id of a scalar."""
        return self.parts[0]
