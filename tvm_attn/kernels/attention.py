"""What prefill and decode attention share: the mask, the float64 reference, random operands.

Keys and values are read from the KV cache, (S, 2, H, P, D) in their storage dtype, or in 8 bits, (S, 2, H, P, D/4 + 1)
int32 (`tvm_attn.kernels.cache_write`); scores, softmax and sums are float32. The cache may hold anything beyond a
sequence's length: masked scores are replaced before the exponential, and values beyond the length are never read into a
sum.
"""

from __future__ import annotations

import numpy as np

from tvm_attn.kernels.cache_write import pack_rows, unpack_rows
from tvm_attn.storage import numpy_dtype

# Below every score that occurs in practice, and far enough from float32's limit that differences stay finite.
MASKED = -1.0e30

OVERFLOWING = 16.0
"""Standard deviation of queries and keys whose scores are of order 1000, far beyond what exp takes in float32."""


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention of one query in float64: q (D,), keys and values (T, D) -> (D,)."""
    scores = keys.astype(np.float64) @ q.astype(np.float64) * scale
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values.astype(np.float64)


def attend_heads(q: np.ndarray, cache: np.ndarray, scale: float) -> np.ndarray:
    """`attend` for all heads of a row: q (H, D), cache (2, H, T, D) as stored -> (H * D,)."""
    cache = stored_values(cache)
    return np.concatenate([attend(q[h], cache[0, h], cache[1, h], scale) for h in range(len(q))])


def random_queries(shape: tuple[int, int, int], dtype: str, magnitude: float) -> np.ndarray:
    """Queries (rows, H, D), normally distributed with standard deviation `magnitude`."""
    q = np.random.default_rng(1).standard_normal(shape, dtype=np.float32) * np.float32(magnitude)
    return q.astype(numpy_dtype(dtype))


def random_cache(shape: tuple[int, int, int, int, int], dtype: str, magnitude: float) -> np.ndarray:
    """A cache of values (S, 2, H, P, D) as stored, normally distributed with standard deviation `magnitude`."""
    rng = np.random.default_rng(0)
    cache = rng.standard_normal(shape, dtype=np.float32) * np.float32(magnitude)
    return pack_rows(cache) if dtype == "int8" else cache.astype(numpy_dtype(dtype))


def stored_values(cache: np.ndarray) -> np.ndarray:
    """The values of rows of a cache, float64 (..., D)."""
    return unpack_rows(cache) if cache.dtype == np.int32 else cache.astype(np.float64)


def forget(cache: np.ndarray, slot: int, length: int) -> None:
    """Fills a slot with NaN beyond a sequence's length: it must not matter."""
    cache[slot, :, :, length:] = nothing(cache)


def nothing(cache: np.ndarray) -> float:
    """What makes rows of a cache NaN; for int8, the bits of a scale that is NaN."""
    return -1 if cache.dtype == np.int32 else np.nan


def error_bound(magnitude: float) -> float:
    """Bound on the normalised mean squared error of float32 attention over a `random_cache` of this magnitude.

    At magnitude 256 a score is of order 1e5, and float32 resolves it to about 1e-2.
    """
    return 1e-11 if magnitude == 1.0 else 1e-5
