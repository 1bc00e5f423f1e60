"""The protocol that every kernel meets.

A kernel is a frozen dataclass of its static sizes and dtypes. It says what is computed, does the same thing in NumPy
float64, and lists the cases that tests and benchmarks share. How it is computed is up to each device class's templates
(`tvm_attn.kernels.template`): they choose tiles, vector widths and instructions, and no field here describes those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
from tvm import ir, tirx
from tvm.script import tirx as T

ROUNDED = {"float32": 0.0, "float16": 2.0**-22, "bfloat16": 2.0**-16}
"""Bound on the normalised mean squared error of rounding to a dtype: the square of half a unit in the last place of 24,
11 or 8 bits. The error of float32 results depends on the order of their sums instead."""


TENSOR_CORE_DTYPES = ("float16", "bfloat16")
"""Activation dtypes that tensor cores multiply with float32 sums; everywhere else activations are float32."""


ZEROED = "tvm_attn.zeroed"
"""Attribute of a scheduled function: the name of a scratch buffer that its first kernel fills with zeros, and that the
others leave filled with zeros. A caller that keeps the buffer, and shares it with no call that may run at the same
time, needs the first kernel only once."""


@dataclass(frozen=True)
class Case:
    """One input of a kernel, for tests and benchmarks.

    Attributes:
        kernel: the kernel with its static sizes.
        name: what is special about the input, e.g. `"full context"`.
        inputs: arrays in the order of the function's parameters, outputs excluded.
        outputs: arrays with the outputs' shapes and dtypes, without the inputs that `in_place` names.
        expected: float64 results, one per output (the in-place inputs first).
        in_place: indices of the inputs that the kernel updates.
        nmse: bound on the normalised mean squared error, ``sum((x - y)**2) / sum(y**2)``, of each output.
    """

    kernel: Kernel
    name: str
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    in_place: tuple[int, ...] = ()
    nmse: float = 1e-12


class Kernel(Protocol):
    """A function of GPT-2 with its static sizes.

    Attributes:
        family: the family's name; templates are found by it.
    """

    family: ClassVar[str]

    @staticmethod
    def cases() -> Iterator[Case]:
        """Inputs with their float64 references: odd sizes, single rows, full context, extreme values."""
        ...


def shape_of(kernel: Any) -> dict[str, Any]:
    """A kernel's family and static sizes as a plain dictionary, the key of its tuned records."""
    return {"family": kernel.family} | {field.name: getattr(kernel, field.name) for field in fields(kernel)}


def label(kernel: Any) -> str:
    """A short name, e.g. "linear 768x3072, one row"."""
    if hasattr(kernel, "in_features"):
        size = f"{kernel.in_features}x{kernel.out_features}"
    elif hasattr(kernel, "heads"):
        size = f"{kernel.heads}x{kernel.head_dim}"
    else:
        size = str(getattr(kernel, "width", ""))
    rows = ""
    if getattr(kernel, "groups", None) == 1:
        rows = ", one row" if kernel.rows == 1 else f", {kernel.rows} rows"
    elif getattr(kernel, "max_groups", None) is not None:
        rows = f", up to {kernel.max_groups * kernel.rows} rows"
    return f"{kernel.family} {size}".strip() + rows


def row_groups(groups: int | None) -> int | tirx.Var:
    """The number of row groups of a TensorIR function: `groups`, or a symbolic "g" if that is None."""
    return tirx.Var("g", "int32") if groups is None else groups


def operand(used: bool, handle: Any, shape: Any, dtype: str | None) -> Any:
    """The buffer of a parameter that the function may do without; see `without_unused`."""
    return T.match_buffer(handle, shape, dtype) if used else None


def without_unused(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function without the parameters that were never matched with a buffer.

    TVMScript's signatures are fixed; a kernel with optional operands declares them all.
    """
    used = [parameter for parameter in function.params if not isinstance(parameter.ty, ir.PointerType)]
    return tirx.PrimFunc(used, function.body, function.ret_type, function.attrs)


def largest_power(extent: int, most: int) -> int:
    """The largest power of two up to `most`, a power of two, that divides `extent`."""
    while extent % most:
        most //= 2
    return most
