"""The protocol that every kernel meets.

A kernel is a frozen dataclass of its static sizes. It says what is computed, does the same thing in NumPy float64, and
lists the cases that tests and benchmarks share. A portable kernel builds its TensorIR function, which templates of
every device class schedule; those of `tvm_attn.kernels.cuda` are for one class, and their templates build functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from tvm import ir, tirx


@dataclass(frozen=True)
class Case:
    """One input of a kernel, for tests and benchmarks.

    Attributes:
        kernel: the kernel, its static sizes filled in.
        name: what is special about the input, e.g. `"full context"`.
        inputs: arrays in the order of the function's parameters, outputs excluded.
        outputs: arrays of the outputs' shapes and dtypes; where `in_place` names an input, that input is an output.
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


@runtime_checkable
class Kernel(Protocol):
    """A function of GPT-2 with its static sizes.

    Attributes:
        family: the family's name; schedule templates are found by it.
    """

    family: ClassVar[str]

    @staticmethod
    def cases() -> Iterator[Case]:
        """Inputs with their float64 references: odd sizes, single rows, full context, extreme values."""
        ...


@runtime_checkable
class PortableKernel(Kernel, Protocol):
    """A kernel for every target."""

    def prim_func(self) -> tirx.PrimFunc:
        """The TensorIR function, unscheduled, for any target."""
        ...


def shape_of(kernel: Any) -> dict[str, Any]:
    """A kernel's family and static sizes as a plain dictionary, which keys the tuned records."""
    return {"family": kernel.family} | {field.name: getattr(kernel, field.name) for field in fields(kernel)}


def row_groups(groups: int | None) -> int | tirx.Var:
    """The number of row groups of a TensorIR function: the static one, or a symbolic "g" where that is None."""
    return tirx.Var("g", "int32") if groups is None else groups


def without_unused(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function less the parameters that were never matched with a buffer.

    TVMScript's signatures are fixed; a kernel with optional operands declares them all.
    """
    used = [parameter for parameter in function.params if not isinstance(parameter.ty, ir.PointerType)]
    return tirx.PrimFunc(used, function.body, function.ret_type, function.attrs)
