"""What kernels of warps share: sums over lanes, registers in a row, conditions that may be known.

The functions emit statements of the TIRx function that is being built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.script import tirx as T

ALL_LANES = 0xFFFFFFFF
"""The mask of a warp."""


def registers(buffer: tirx.Buffer, start: tirx.Expr | int = 0, count: int = 4) -> list[tirx.Expr]:
    """Neighbouring registers of a one-dimensional buffer."""
    return [buffer[start + i] for i in range(count)]


def shuffle_xor(value: tirx.Expr, distance: int) -> tirx.Expr:
    """The value of the lane whose number differs in the bit `distance`."""
    return T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), value, distance, 32, 32)


def sum_of(terms: Sequence[tirx.Expr]) -> tirx.Expr:
    """The sum of all terms, in few steps that depend on one another."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]


def add_lanes(buffer: tirx.Buffer, place: int, lanes: int = 32) -> None:
    """buffer[place] = its sum over `lanes` neighbouring lanes, a power of two; all of them get the same."""
    distance = lanes // 2
    while distance:
        T.buffer_store(buffer, buffer[place] + shuffle_xor(buffer[place], distance), [place])
        distance //= 2


@contextmanager
def only_if(condition: tirx.Expr, needed: bool = True) -> Iterator[None]:
    """What is emitted within depends on the condition, unless it is known to hold."""
    if needed:
        with T.If(condition), T.Then():
            yield
    else:
        yield
