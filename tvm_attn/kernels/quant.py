"""Activations in the form of the dot product instructions: bfloat16 pairs, or 8-bit integers with a scale per group.

The order of rows inside a word is that of the packed weights (`tvm_attn.kernels.weights`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.base import Case
from tvm_attn.kernels.weights import OFFSETS
from tvm_attn.storage import GROUP, numpy_dtype


@dataclass(frozen=True)
class PackPairs:
    """Rounds activations to bfloat16 and pairs element p with element p + K/2.

    Parameters of the function: x (g, R, K) float32, pairs (g, R, K/2) int32.
    """

    family: ClassVar[str] = "pack_pairs"

    width: int
    rows: int
    groups: int | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for width, rows, groups in ((768, 8, 3), (54, 8, 1), (768, 1, 1)):
            kernel = PackPairs(width, rows, groups if rows == 1 else None)
            yield _case(kernel, f"width {width}", _random_rows(kernel, groups))


def pair_words(x: np.ndarray) -> np.ndarray:
    """The reference of `PackPairs`: float32 (..., K) -> int32 (..., K/2)."""
    bits = x.astype(numpy_dtype("bfloat16")).view(np.uint16).astype(np.uint32)
    half = x.shape[-1] // 2
    return (bits[..., :half] | (bits[..., half:] << 16)).view(np.int32)


@dataclass(frozen=True)
class QuantizeRows:
    """Quantizes activations to signed bytes, symmetric, with a scale per group of G = 32: x = scale * q, q in
    -127..127.

    Parameters of the function: x (g, R, K) float32, words (g, R, K/4) int32 with 4 bytes each, scales (g, R, K/G)
    float32, corrections (g, R, K/G) float32: scale * offset * sum(q), which the weights' offset adds to a dot product.
    """

    family: ClassVar[str] = "quantize_rows"

    width: int
    rows: int
    weights: str
    groups: int | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for width, rows, groups, weights in ((768, 8, 3, "int8"), (96, 8, 1, "int4"), (768, 1, 1, "int8")):
            kernel = QuantizeRows(width, rows, weights, groups if rows == 1 else None)
            x = _random_rows(kernel, groups)
            x[0, 0, :GROUP] = 0.0
            yield _case(kernel, f"width {width}", x)


def quantize_rows(x: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference of `QuantizeRows`: words, scales and corrections of float32 (..., K)."""
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    peak = np.abs(groups).max(-1)
    reciprocal = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    scales = peak * np.float32(1 / 127)
    q = np.floor(groups * reciprocal[..., None] + np.float32(0.5)).astype(np.int32)
    places = (q & 255).astype(np.uint32).reshape(*q.shape[:-1], 4, GROUP // 4)
    words = places[..., 0, :] | places[..., 1, :] << 8 | places[..., 2, :] << 16 | places[..., 3, :] << 24
    words = np.ascontiguousarray(words).view(np.int32).reshape(*x.shape[:-1], -1)
    return words, scales, scales * (q.sum(-1) * OFFSETS[weights]).astype(np.float32)


def _random_rows(kernel: PackPairs | QuantizeRows, groups: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((groups, kernel.rows, kernel.width), dtype=np.float32)


def _case(kernel: PackPairs | QuantizeRows, name: str, x: np.ndarray) -> Case:
    expected = (pair_words(x),) if isinstance(kernel, PackPairs) else quantize_rows(x, kernel.weights)
    outputs = tuple(np.zeros_like(array) for array in expected)
    wanted = tuple(array.astype(np.float64) for array in expected)
    return Case(kernel, name, (x,), outputs, wanted, nmse=0.0 if isinstance(kernel, PackPairs) else 1e-12)


def random_case(kernel: PackPairs | QuantizeRows, groups: int) -> Case:
    """A case of `groups` row groups with random operands, of the sizes that a search measures."""
    return _case(kernel, f"{groups * kernel.rows} rows", _random_rows(kernel, groups))
