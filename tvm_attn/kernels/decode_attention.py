"""Causal attention of one token per row over the KV cache: Flash-Decoding (Dao et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.attention import (
    OVERFLOWING,
    attend_heads,
    error_bound,
    forget,
    random_cache,
    random_queries,
)
from tvm_attn.kernels.base import ROUNDED, Case
from tvm_attn.storage import numpy_dtype


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one query per row over its slot, up to and including its own position.

    Parameters of the function: q (g, R, E) activations; cache (S, 2, H, P, D) dtype, or int8 rows of
    (S, 2, H, P, D/4 + 1) int32 (`tvm_attn.kernels.cache_write`); slots (g, R) int32; positions
    (g, R) int32, each row's position, whose key and value are already in the cache; o (g, R, E) activations. A row
    whose position is -1 is padding and gets zeros.

    Attributes:
        heads: H.
        head_dim: D.
        context: P, the positions of a cache slot.
        rows: R, the rows of a group.
        dtype: dtype of the cache: a storage dtype, or int8.
        scale: factor of the scores, positive.
        groups: a static number of row groups, or None for a symbolic one.
        activations: dtype of q and o.
    """

    family: ClassVar[str] = "decode_attention"

    heads: int
    head_dim: int
    context: int
    rows: int
    dtype: str
    scale: float
    groups: int | None = None
    activations: str = "float32"

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16", "int8"):
            kernel = DecodeAttention(2, 64, 600, 8, dtype, 0.125)
            yield _case(kernel, "ragged, chunk borders", (0, 1, 15, 16, 255, 256, 599, 511, 512, -1, -1, 7))
            kernel = DecodeAttention(12, 64, 1024, 1, dtype, 0.125, groups=1)
            yield _case(kernel, "one row, full context", (1023,))
            yield _case(kernel, "magnitude 256", (100,), magnitude=256.0)
        for dtype in ("float32", "int8"):
            yield _case(DecodeAttention(3, 20, 45, 8, dtype, 0.3), "odd head_dim", (44, 3))
        for dtype in ("float32", "int8"):
            yield _case(DecodeAttention(1, 64, 8, 1, dtype, 0.125, groups=1), "first token", (0,))
        yield _case(DecodeAttention(2, 48, 75, 1, "int8", 0.1, 1), "scores of order 1000", (74,), OVERFLOWING)
        kernel = DecodeAttention(2, 64, 600, 8, "float16", 0.125, activations="float16")
        yield _case(kernel, "ragged, padding", (0, 1, 15, 16, 63, 64, 599, 511, 512, -1, -1, 7))
        kernel = DecodeAttention(3, 64, 1024, 1, "bfloat16", 0.125, 1, "bfloat16")
        for position in (0, 64, 1023):
            yield _case(kernel, f"one row at position {position}", (position,))
        yield _case(kernel, "scores of order 1000", (300,), OVERFLOWING)
        kernel = DecodeAttention(2, 64, 300, 8, "float16", 0.125, 1, "float16")
        yield _case(kernel, "one group with padding", (299, -1, 0, 131, -1))
        for head_dim, dtype in ((48, "bfloat16"), (96, "float16"), (128, "bfloat16")):
            kernel = DecodeAttention(2, head_dim, 75, 1, dtype, head_dim**-0.5, 1, dtype)
            yield _case(kernel, f"head_dim {head_dim}", (74,))


def _case(kernel: DecodeAttention, name: str, positions: tuple[int, ...], magnitude: float = 1.0) -> Case:
    """One row per position, with slots in another order than rows; the rest of the last group is padding."""
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    groups = -(-len(positions) // rows)
    q = random_queries((groups * rows, heads, head_dim), kernel.activations, magnitude)
    cache = random_cache((len(positions), 2, heads, kernel.context, head_dim), kernel.dtype, magnitude)
    slots, ends = np.zeros(groups * rows, np.int32), np.full(groups * rows, -1, np.int32)
    slots[: len(positions)] = np.arange(len(positions))[::-1]
    ends[: len(positions)] = positions
    expected = np.zeros((groups * rows, heads * head_dim))
    for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
        if end < 0:
            continue
        forget(cache, int(slot), end + 1)
        expected[row] = attend_heads(q[row], cache[slot, :, :, : end + 1], kernel.scale)
    shape = (groups, rows, heads * head_dim)
    inputs = (q.reshape(shape), cache, slots.reshape(groups, rows), ends.reshape(groups, rows))
    output = np.full(shape, np.nan, numpy_dtype(kernel.activations))
    # Only the result is rounded.
    bound = ROUNDED[kernel.activations] or error_bound(magnitude)
    return Case(kernel, name, inputs, (output,), (expected.reshape(shape),), nmse=bound)


def random_case(kernel: DecodeAttention, positions: tuple[int, ...]) -> Case:
    """A case of one row per position with random operands, of a size that a search measures."""
    return _case(kernel, f"{len(positions)} rows", positions)
