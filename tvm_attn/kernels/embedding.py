"""Token and position embedding, and the choice of the rows that need logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.base import Case
from tvm_attn.kernels.weights import PLAIN, pack, pack_words
from tvm_attn.quantization import dequantize, quantize
from tvm_attn.storage import numpy_dtype


@dataclass(frozen=True)
class Embedding:
    """x = wte[token_ids] + wpe[positions]; padding rows (position -1) read position 0.

    The token table is the packed weight of the tied head, with K = E and N = V, so it is in memory only once.

    Parameters of the function: token_ids (g, R) int32, positions (g, R) int32, wte (one or two tensors, see
    `tvm_attn.kernels.weights`), wpe (P, E) dtype, x (g, R, E) float32.
    """

    family: ClassVar[str] = "embedding"

    vocabulary: int
    context: int
    width: int
    rows: int
    columns: int
    weights: str
    dtype: str
    """Dtype of wpe."""
    groups: int | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights, dtype in (*zip(PLAIN, PLAIN, strict=True), ("bfloat16_pairs", "bfloat16"), ("int8", "float32")):
            yield _embedding_case(Embedding(1021, 64, 128, 8, 32, weights, dtype), 3, "odd vocabulary")
        yield _embedding_case(Embedding(1021, 64, 128, 8, 32, "int4", "float16"), 3, "odd vocabulary")
        yield _embedding_case(Embedding(1021, 64, 77, 1, 32, "float32", "float32", groups=1), 1, "one row, odd width")


def _embedding_case(kernel: Embedding, groups: int, name: str) -> Case:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((kernel.width, kernel.vocabulary), dtype=np.float32)
    if kernel.weights in PLAIN:
        values = table.astype(numpy_dtype(kernel.weights))
        packed: tuple[np.ndarray, ...] = (pack(values, kernel.columns),)
    elif kernel.weights == "bfloat16_pairs":
        values = table.astype(numpy_dtype("bfloat16"))
        packed = (pack_words(values, kernel.weights, kernel.columns),)
    else:
        quantized, scales = quantize(table, kernel.weights)
        values = dequantize(quantized, scales)
        packed = (pack_words(quantized, kernel.weights, kernel.columns), pack(scales, kernel.columns))
    wpe = rng.standard_normal((kernel.context, kernel.width), dtype=np.float32).astype(numpy_dtype(kernel.dtype))
    shape = (groups, kernel.rows)
    token_ids = rng.integers(0, kernel.vocabulary, shape, dtype=np.int32)
    token_ids.flat[0] = kernel.vocabulary - 1
    positions = rng.integers(0, kernel.context, shape, dtype=np.int32)
    if positions.size > 1:
        positions.flat[-1] = -1
    expected = values.astype(np.float64).T[token_ids] + wpe.astype(np.float64)[np.maximum(positions, 0)]
    output = np.zeros((*shape, kernel.width), np.float32)
    return Case(kernel, name, (token_ids, positions, *packed, wpe), (output,), (expected,))


@dataclass(frozen=True)
class GatherRows:
    """y = x[indices]: the rows whose logits are wanted, e.g. the last row of each prompt.

    Parameters of the function: x (g, R, E) float32, indices (q, R) int32 into the g * R rows, y (q, R, E) float32.
    """

    family: ClassVar[str] = "gather_rows"

    width: int
    rows: int

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        yield _gather_case(GatherRows(96, 8), "width 96", 5, 2)
        yield _gather_case(GatherRows(77, 8), "width 77", 1, 1)


def _gather_case(kernel: GatherRows, name: str, groups: int, wanted: int) -> Case:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((groups, kernel.rows, kernel.width), dtype=np.float32)
    indices = rng.integers(0, groups * kernel.rows, (wanted, kernel.rows), dtype=np.int32)
    expected = x.reshape(-1, kernel.width)[indices].astype(np.float64)
    y = np.zeros((wanted, kernel.rows, kernel.width), np.float32)
    return Case(kernel, name, (x, indices), (y,), (expected,), nmse=0.0)


def random_case(kernel: Embedding | GatherRows, groups: int) -> Case:
    """A case of `groups` row groups with random operands, of the sizes that a search measures."""
    name = f"{groups * kernel.rows} rows"
    if isinstance(kernel, Embedding):
        return _embedding_case(kernel, groups, name)
    return _gather_case(kernel, name, groups, groups)
