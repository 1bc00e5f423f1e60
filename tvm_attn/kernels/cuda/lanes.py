"""Helpers for warps: sums over lanes, consecutive registers, conditions that may be known at compile time.

The functions emit statements of the TIRx function that is being built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.script import tirx as T

ALL_LANES = 0xFFFFFFFF
"""The mask of all lanes of a warp."""


def registers(buffer: tirx.Buffer, start: tirx.Expr | int = 0, count: int = 4) -> list[tirx.Expr]:
    """Neighbouring registers of a one-dimensional buffer."""
    return [buffer[start + i] for i in range(count)]


def shuffle_xor(value: tirx.Expr, distance: int) -> tirx.Expr:
    """The value in the lane whose number differs in bit `distance`."""
    return T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), value, distance, 32, 32)


def sum_of(terms: Sequence[tirx.Expr]) -> tirx.Expr:
    """The sum of all terms, with a short chain of dependent additions."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]


def add_lanes(buffer: tirx.Buffer, place: int, lanes: int = 32) -> None:
    """Replaces buffer[place] with its sum over `lanes` neighbouring lanes, a power of two; all get the same result."""
    distance = lanes // 2
    while distance:
        T.buffer_store(buffer, buffer[place] + shuffle_xor(buffer[place], distance), [place])
        distance //= 2


@contextmanager
def only_if(condition: tirx.Expr, needed: bool = True) -> Iterator[None]:
    """Statements emitted inside run only if the condition holds; unconditionally unless `needed`."""
    if needed:
        with T.If(condition), T.Then():
            yield
    else:
        yield
