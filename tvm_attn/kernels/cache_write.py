"""The KV cache in 8 bits.

A row, the key or value of a head at a position, is symmetric: value = scale * q, q in -127..127, with a float32 scale
of its own. It has D/4 + 1 int32 words: word i holds dimensions i, i + D/4, i + D/2 and i + 3 D/4, from the lowest byte
up, and the last word holds the bits of the scale. So a row is one run of memory, no device needs 8-bit types, and
neighbouring words unpack to neighbouring dimensions without a shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.base import Case
from tvm_attn.storage import CACHE_WORD, cache_row

SMALLEST = 1e-30
"""A row whose values are all below this is stored as zeros: the reciprocal of its scale would overflow."""


@dataclass(frozen=True)
class CacheWrite:
    """Splits queries, keys and values, and writes keys and values into an int8 KV cache.

    Parameters of the function: qkv (g, R, 3 E) float32; slots (g, R) int32; positions (g, R) int32; cache
    (S, 2, H, P, D/4 + 1) int32, updated in place; q (g, R, E) float32. A row whose position is -1 is padding and writes
    nothing to the cache.

    Attributes:
        heads: H.
        head_dim: D, a multiple of 4.
        context: P, the positions of a cache slot.
        rows: R, the rows of a group.
        groups: a static number of row groups, or None for a symbolic one.
    """

    family: ClassVar[str] = "cache_write"

    heads: int
    head_dim: int
    context: int
    rows: int
    groups: int | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        kernel = CacheWrite(2, 64, 16, 8)
        yield _case(kernel, 3, "ragged rows and padding")
        yield _case(kernel, 1, "magnitude 1e30", 1e30)
        yield _case(kernel, 1, "magnitude 1e-20", 1e-20)
        yield _case(CacheWrite(3, 20, 9, 6), 2, "odd number of words")
        yield _case(CacheWrite(12, 64, 1024, 1, groups=1), 1, "one row")
        yield _case(CacheWrite(2, 48, 16, 8, groups=1), 1, "one group")


def pack_rows(values: np.ndarray) -> np.ndarray:
    """The reference: float32 (..., D) -> int32 (..., D/4 + 1)."""
    peak = np.abs(values).max(-1, keepdims=True)
    reciprocal = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > SMALLEST)
    q = np.floor(values * reciprocal + np.float32(0.5)).astype(np.int32)
    q = (q & 255).astype(np.uint32).reshape(*q.shape[:-1], CACHE_WORD, -1)
    words = q[..., 0, :] | q[..., 1, :] << 8 | q[..., 2, :] << 16 | q[..., 3, :] << 24
    scales = (peak * np.float32(1 / 127)).view(np.int32)
    return np.concatenate([np.ascontiguousarray(words).view(np.int32), scales], -1)


def unpack_rows(rows: np.ndarray) -> np.ndarray:
    """The values of int32 (..., D/4 + 1), float64 (..., D)."""
    words, scales = rows[..., :-1], np.ascontiguousarray(rows[..., -1:]).view(np.float32)
    q = np.concatenate([words << (24 - 8 * place) >> 24 for place in range(CACHE_WORD)], -1)
    return q.astype(np.float64) * scales


def _case(kernel: CacheWrite, groups: int, name: str, magnitude: float = 1.0) -> Case:
    """Every row but one has its own slot and position; the last of several is padding. One head's key is zero."""
    rng = np.random.default_rng(0)
    rows, width, cache_slots = groups * kernel.rows, kernel.heads * kernel.head_dim, 3
    count = max(rows - 1, 1)
    qkv = rng.standard_normal((rows, 3 * width), dtype=np.float32) * np.float32(magnitude)
    qkv[0, width : width + kernel.head_dim] = 0
    slots, positions = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    places = rng.permutation(cache_slots * kernel.context)[:count]
    slots[:count], positions[:count] = np.divmod(places, kernel.context)
    words, dtype = cache_row("int8", kernel.head_dim)
    cache = rng.integers(-(2**31), 2**31, (cache_slots, 2, kernel.heads, kernel.context, words)).astype(dtype)
    expected = cache.copy()
    for row in range(count):
        packed = pack_rows(qkv[row, width:].reshape(2, kernel.heads, kernel.head_dim))
        expected[slots[row], :, :, positions[row]] = packed
    shape = (groups, kernel.rows)
    inputs = (qkv.reshape(*shape, -1), slots.reshape(shape), positions.reshape(shape), cache)
    q = np.full((*shape, width), np.nan, np.float32)
    wanted = (expected.astype(np.float64), qkv[:, :width].reshape(q.shape).astype(np.float64))
    return Case(kernel, name, inputs, (q,), wanted, (3,))


def random_case(kernel: CacheWrite, groups: int) -> Case:
    """A case of `groups` row groups with random operands, of the sizes that a search measures."""
    return _case(kernel, groups, f"{groups * kernel.rows} rows")
