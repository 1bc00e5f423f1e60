"""The weights of causal attention, to look at: what `PrefillAttention` computes and never stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.attention import (
    OVERFLOWING,
    forget,
    nothing,
    random_cache,
    random_queries,
    stored_values,
)
from tvm_attn.kernels.base import Case


@dataclass(frozen=True)
class AttentionWeights:
    """softmax(scale q k^T) of one sequence whose tokens are at positions 0, 1, ... of a slot; 0 after each token.

    Parameters of the function: q (g, R, E) activations; cache as in `DecodeAttention`, of which only keys are
    read; slot (1,) int32; weights (H, N, N) float32 with N = g R >= T, the sequence's length. Row i of a head holds
    what token i gives to tokens 0 .. i, and zeros; rows from T on may hold anything.

    Attributes:
        heads: H.
        head_dim: D.
        context: P, the positions of a cache slot.
        rows: R, the rows of a group.
        dtype: dtype of the cache: a storage dtype, or int8.
        scale: factor of the scores, positive.
        activations: dtype of q.
    """

    family: ClassVar[str] = "attention_weights"

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
            for activations in dict.fromkeys(("float32", dtype if dtype != "int8" else "float32")):
                kernel = AttentionWeights(2, 64, 136, 8, dtype, 0.125, activations)
                yield _case(kernel, "whole slot", 136, slot=1)
                yield _case(kernel, "one token", 1)
                yield _case(kernel, "part of a group", 21, slot=2)
                yield _case(kernel, "scores of order 1000", 40, magnitude=OVERFLOWING)
        yield _case(AttentionWeights(3, 20, 45, 5, "float32", 0.3), "odd sizes", 45)
        yield _case(AttentionWeights(1, 80, 64, 8, "float32", 0.1), "wide head", 63)
        yield _case(AttentionWeights(3, 20, 45, 5, "int8", 0.3), "odd sizes", 45)


def _case(kernel: AttentionWeights, name: str, length: int, slot: int = 0, magnitude: float = 1.0) -> Case:
    """The rows after the sequence are finite, so that their weights can be compared too."""
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    count = -(-length // rows) * rows
    q = random_queries((count, heads, head_dim), kernel.activations, magnitude)
    cache = random_cache((3, 2, heads, kernel.context, head_dim), kernel.dtype, magnitude)
    forget(cache, slot, count)
    cache[:, 1] = nothing(cache)  # values do not matter
    expected = np.zeros((heads, count, count))
    keys = stored_values(cache[slot, 0])
    for i in range(min(count, kernel.context)):
        scores = np.einsum("hd,hjd->hj", q[i].astype(np.float64), keys[:, : i + 1]) * kernel.scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected[:, i, : i + 1] = weights / weights.sum(-1, keepdims=True)
    outputs = np.full((heads, count, count), np.nan, np.float32)
    inputs = (q.reshape(count // rows, rows, heads * head_dim), cache, np.array([slot], np.int32))
    # Scores of order 1000 are resolved to about 1e-4 in float32.
    return Case(kernel, name, inputs, (outputs,), (expected,), nmse=1e-11 if magnitude == 1.0 else 1e-6)


def random_case(kernel: AttentionWeights, length: int) -> Case:
    """A case of `length` tokens with random operands, of the sizes that a search measures."""
    return _case(kernel, f"{length} rows", length)
