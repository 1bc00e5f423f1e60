"""Causal attention of prompts over the KV cache, without a T x T matrix (FlashAttention-2, Dao, 2023)."""

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

ROUNDED_PROBABILITIES = 2.0**-18
"""Bound on the normalised mean squared error if each probability is rounded to bfloat16, by 2**-9 at most."""


@dataclass(frozen=True)
class PrefillAttention:
    """Causal attention of all rows of several sequences, packed one after the other.

    Parameters of the function: q (g, R, E) activations; cache (S, 2, H, P, D) dtype, or int8 rows of
    (S, 2, H, P, D/4 + 1) int32 (`tvm_attn.kernels.cache_write`); sequences (b, 4) int32, one row per
    sequence: slot, first row of the flattened (g * R) rows, number of rows, position of the first row; o (g, R, E)
    activations. Row i of a sequence attends to positions 0 .. first position + i of its slot, which must have been
    written. Rows that belong to no sequence are left unchanged.

    Attributes:
        heads: H.
        head_dim: D.
        context: P, the positions of a cache slot.
        rows: R, the rows of a group.
        dtype: dtype of the cache: a storage dtype, or int8.
        scale: factor of the scores, positive.
        activations: dtype of q and o.
    """

    family: ClassVar[str] = "prefill_attention"

    heads: int
    head_dim: int
    context: int
    rows: int
    dtype: str
    scale: float
    activations: str = "float32"

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16", "int8"):
            for name, context, sequences in (
                ("ragged batch", 128, ((2, 7, 0), (0, 1, 0), (1, 65, 0))),
                ("full context", 128, ((0, 128, 0),)),
                ("cached prefix", 100, ((1, 30, 70), (0, 33, 1))),
            ):
                kernel = PrefillAttention(2, 64, context, 8, dtype, 0.125)
                yield _case(kernel, name, sequences)
            kernel = PrefillAttention(1, 64, 96, 8, dtype, 0.125)
            yield _case(kernel, "magnitude 256", ((0, 96, 0),), magnitude=256.0)
        for dtype in ("float32", "int8"):
            yield _case(PrefillAttention(3, 20, 45, 8, dtype, 0.3), "odd head_dim", ((0, 45, 0),))
        yield _case(PrefillAttention(12, 64, 1024, 8, "float32", 0.125), "124M", ((0, 1023, 0), (1, 5, 1019)))
        ragged = ((2, 1, 0), (0, 37, 0), (3, 130, 5), (1, 63, 137))
        kernel = PrefillAttention(2, 64, 200, 8, "float16", 0.125, "float16")
        yield _case(kernel, "ragged, lengths 1 to 130, non-zero first positions", ragged)
        yield _case(kernel, "one token", ((0, 1, 0),))
        yield _case(kernel, "many short prompts", tuple((slot, slot % 5 + 1, slot) for slot in range(20)))
        yield _case(kernel, "whole slot, scores of order 1000", ((0, 200, 0),), OVERFLOWING)
        kernel = PrefillAttention(1, 64, 1024, 8, "bfloat16", 0.125, "bfloat16")
        yield _case(kernel, "ragged", ragged)
        yield _case(kernel, "full context", ((0, 1024, 0),))
        for head_dim, dtype in ((32, "bfloat16"), (80, "float16"), (128, "bfloat16")):
            kernel = PrefillAttention(1, head_dim, 75, 8, dtype, head_dim**-0.5, dtype)
            yield _case(kernel, f"head_dim {head_dim}", ((1, 70, 5), (0, 3, 0)))


def _case(
    kernel: PrefillAttention, name: str, sequences: tuple[tuple[int, int, int], ...], magnitude: float = 1.0
) -> Case:
    """A case of some sequences, each given by its slot, number of rows and first position.

    Queries of rows that belong to no sequence are NaN, and their outputs are expected to stay zero.
    """
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    count = sum(length for _, length, _ in sequences)
    groups = -(-count // rows)
    if kernel.activations != "float32":
        # The probabilities are rounded before they are multiplied with values, and so is the result.
        bound = 2 * ROUNDED[kernel.activations]
    elif kernel.dtype == "bfloat16":
        # Dot products may use bfloat16 for queries, which are exact in it, and for probabilities, which are rounded.
        bound = max(error_bound(magnitude), ROUNDED_PROBABILITIES)
    else:
        bound = error_bound(magnitude)
    q_dtype = "bfloat16" if kernel.dtype == "bfloat16" else kernel.activations
    q = random_queries((groups * rows, heads, head_dim), q_dtype, magnitude).astype(numpy_dtype(kernel.activations))
    q[count:] = np.nan
    cache = random_cache((len(sequences), 2, heads, kernel.context, head_dim), kernel.dtype, magnitude)
    expected = np.zeros((groups * rows, heads * head_dim))
    table, row = [], 0
    for slot, length, start in sequences:
        forget(cache, slot, start + length)
        table.append((slot, row, length, start))
        for i in range(length):
            expected[row + i] = attend_heads(q[row + i], cache[slot, :, :, : start + i + 1], kernel.scale)
        row += length
    shape = (groups, rows, heads * head_dim)
    inputs = (q.reshape(shape), cache, np.array(table, np.int32))
    o = np.zeros(shape, numpy_dtype(kernel.activations))
    return Case(kernel, name, inputs, (o,), (expected.reshape(shape),), nmse=bound)


def random_case(kernel: PrefillAttention, length: int, sequences: int = 1) -> Case:
    """A case of prompts of `length` tokens with random operands, of the sizes that a search measures."""
    table = tuple((slot, length, 0) for slot in range(sequences))
    return _case(kernel, f"{sequences * length} rows", table)
