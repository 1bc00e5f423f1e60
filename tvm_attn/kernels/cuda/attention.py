"""Causal attention for tensor cores: what the two kernels compute, their float64 references and cases.

Queries, the KV cache and outputs are float16 or bfloat16 (`dtype`); scores, softmax and sums are float32. What lies in
the cache beyond a sequence's length may be anything, as in `tvm_attn.kernels.attention`.

The loops are in `tvm_attn.kernels.cuda.prefill_attention` and `tvm_attn.kernels.cuda.decode_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.attention import attend, forget, random_cache
from tvm_attn.kernels.base import Case
from tvm_attn.storage import numpy_dtype

HEAD_DIMS = range(32, 129, 16)
"""Sizes of a head that the kernels take: whole steps of `mma.sync`, and registers for a row of the output."""

ROUNDED = {"float16": 2.0**-22, "bfloat16": 2.0**-16}
"""Bound on the normalised mean squared error of numbers rounded to `dtype`: half a unit in the last place of 11 or 8
bits, squared."""

OVERFLOWING = 16.0
"""Standard deviation of queries and keys whose scores are of order 1000, far beyond what exp takes in float32."""


@dataclass(frozen=True)
class PrefillAttention:
    """Causal attention of all rows of several sequences, packed one after the other.

    Parameters of the function: q (g, R, E) dtype; cache (S, 2, H, P, D) dtype; sequences (b, 4) int32, one row a
    sequence: slot, first row of the flattened (g * R) rows, number of rows, position of the first row; o (g, R, E)
    dtype. Row i of a sequence attends to the positions 0 .. first position + i of its slot, which must be written.
    Rows that belong to no sequence are left as they are.

    Attributes:
        heads: H.
        head_dim: D, one of `HEAD_DIMS`.
        context: P, the positions of a cache slot.
        rows: R, the rows of a group.
        dtype: float16 or bfloat16.
        scale: what scores are multiplied with, positive.
    """

    family: ClassVar[str] = "cuda_prefill_attention"

    heads: int
    head_dim: int
    context: int
    rows: int
    dtype: str
    scale: float

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        ragged = ((2, 1, 0), (0, 37, 0), (3, 130, 5), (1, 63, 137))
        kernel = PrefillAttention(2, 64, 200, 8, "float16", 0.125)
        yield _prefill_case(kernel, "ragged, lengths 1 to 130, non-zero first positions", ragged)
        yield _prefill_case(kernel, "one token", ((0, 1, 0),))
        yield _prefill_case(kernel, "many short prompts", tuple((slot, slot % 5 + 1, slot) for slot in range(20)))
        yield _prefill_case(kernel, "whole slot, scores of order 1000", ((0, 200, 0),), OVERFLOWING)
        kernel = PrefillAttention(1, 64, 1024, 8, "bfloat16", 0.125)
        yield _prefill_case(kernel, "ragged", ragged)
        yield _prefill_case(kernel, "full context", ((0, 1024, 0),))
        for head_dim, dtype in ((32, "bfloat16"), (80, "float16"), (128, "bfloat16")):
            kernel = PrefillAttention(1, head_dim, 75, 8, dtype, head_dim**-0.5)
            yield _prefill_case(kernel, f"head_dim {head_dim}", ((1, 70, 5), (0, 3, 0)))


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one new token a row over everything its slot holds.

    Parameters of the function: q (g, R, E) dtype; cache (S, 2, H, P, D) dtype; slots (g, R) int32; positions (g, R)
    int32, of the row's token, whose key and value are written; o (g, R, E) dtype. A row whose position is -1 is padding
    and gets zeros.

    Attributes:
        heads: H.
        head_dim: D, one of `HEAD_DIMS`.
        context: P, the positions of a cache slot.
        rows: R, the rows of a group.
        dtype: float16 or bfloat16.
        scale: what scores are multiplied with, positive.
        groups: 1, or None for a symbolic number of row groups.
    """

    family: ClassVar[str] = "cuda_decode_attention"

    heads: int
    head_dim: int
    context: int
    rows: int
    dtype: str
    scale: float
    groups: int | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        kernel = DecodeAttention(2, 64, 600, 8, "float16", 0.125)
        yield _decode_case(kernel, "ragged, padding", (0, 1, 15, 16, 63, 64, 599, 511, 512, -1, -1, 7))
        kernel = DecodeAttention(3, 64, 1024, 1, "bfloat16", 0.125, groups=1)
        for position in (0, 64, 1023):
            yield _decode_case(kernel, f"one row at position {position}", (position,))
        yield _decode_case(kernel, "scores of order 1000", (300,), OVERFLOWING)
        kernel = DecodeAttention(2, 64, 300, 8, "float16", 0.125, groups=1)
        yield _decode_case(kernel, "one group with padding", (299, -1, 0, 131, -1))
        for head_dim, dtype in ((48, "bfloat16"), (96, "float16"), (128, "bfloat16")):
            kernel = DecodeAttention(2, head_dim, 75, 1, dtype, head_dim**-0.5, groups=1)
            yield _decode_case(kernel, f"head_dim {head_dim}", (74,))


def _prefill_case(
    kernel: PrefillAttention, name: str, sequences: tuple[tuple[int, int, int], ...], magnitude: float = 1.0
) -> Case:
    """`sequences`: slot, number of rows, first position of each.

    Queries of rows that belong to no sequence are NaN, and their outputs are expected to stay zero.
    """
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    count = sum(length for _, length, _ in sequences)
    groups = -(-count // rows)
    q = _queries((groups * rows, heads, head_dim), kernel.dtype, magnitude)
    q[count:] = np.nan
    cache = random_cache((len(sequences), 2, heads, kernel.context, head_dim), kernel.dtype, magnitude)
    expected = np.zeros((groups * rows, heads * head_dim))
    table, row = [], 0
    for slot, length, start in sequences:
        forget(cache, slot, start + length)
        table.append((slot, row, length, start))
        for i in range(length):
            expected[row + i] = _attend_heads(q[row + i], cache[slot, :, :, : start + i + 1], kernel.scale)
        row += length
    shape = (groups, rows, heads * head_dim)
    inputs = (q.reshape(shape), cache, np.array(table, np.int32))
    output = np.zeros(shape, numpy_dtype(kernel.dtype))
    # The probabilities are rounded before they are multiplied with values, and the result is.
    return Case(kernel, name, inputs, (output,), (expected.reshape(shape),), nmse=2 * ROUNDED[kernel.dtype])


def _decode_case(kernel: DecodeAttention, name: str, positions: tuple[int, ...], magnitude: float = 1.0) -> Case:
    """One row a position, in slots in another order than rows; the rest of the last group is padding."""
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    groups = -(-len(positions) // rows)
    q = _queries((groups * rows, heads, head_dim), kernel.dtype, magnitude)
    cache = random_cache((len(positions), 2, heads, kernel.context, head_dim), kernel.dtype, magnitude)
    slots, ends = np.zeros(groups * rows, np.int32), np.full(groups * rows, -1, np.int32)
    slots[: len(positions)] = np.arange(len(positions))[::-1]
    ends[: len(positions)] = positions
    expected = np.zeros((groups * rows, heads * head_dim))
    for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
        if end < 0:
            continue
        forget(cache, int(slot), end + 1)
        expected[row] = _attend_heads(q[row], cache[slot, :, :, : end + 1], kernel.scale)
    shape = (groups, rows, heads * head_dim)
    inputs = (q.reshape(shape), cache, slots.reshape(groups, rows), ends.reshape(groups, rows))
    output = np.full(shape, np.nan, numpy_dtype(kernel.dtype))
    # Only the result is rounded.
    return Case(kernel, name, inputs, (output,), (expected.reshape(shape),), nmse=ROUNDED[kernel.dtype])


def random_prefill_case(kernel: PrefillAttention, length: int, sequences: int = 1) -> Case:
    """A case of prompts of `length` tokens with random operands, of the sizes that a search measures."""
    table = tuple((slot, length, 0) for slot in range(sequences))
    return _prefill_case(kernel, f"{sequences} x {length} rows", table)


def random_decode_case(kernel: DecodeAttention, positions: tuple[int, ...]) -> Case:
    """A case of one row a position with random operands, of the sizes that a search measures."""
    return _decode_case(kernel, f"{len(positions)} rows", positions)


def _queries(shape: tuple[int, int, int], dtype: str, magnitude: float) -> np.ndarray:
    q = np.random.default_rng(1).standard_normal(shape, dtype=np.float32) * np.float32(magnitude)
    return q.astype(numpy_dtype(dtype))


def _attend_heads(q: np.ndarray, cache: np.ndarray, scale: float) -> np.ndarray:
    """q (H, D), cache (2, H, T, D) -> (H * D,) float64."""
    return np.concatenate([attend(q[h], cache[0, h], cache[1, h], scale) for h in range(len(q))])


def shuffle_xor(value: tirx.Expr, lanes: int | tirx.Expr) -> tirx.Expr:
    """The value of the lane whose number differs in the bits of `lanes`; all lanes of the warp take part."""
    return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, lanes, 32, 32)
