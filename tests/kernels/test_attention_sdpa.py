"""The attention kernels against torch.nn.functional.scaled_dot_product_attention in float64.

The cache always holds NaN beyond each sequence: it must not matter.
"""

from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch.nn.functional import scaled_dot_product_attention

from tvm_attn import targets
from tvm_attn.kernels import DecodeAttention, PrefillAttention
from tvm_attn.schedule import schedule
from tvm_attn.storage import numpy_dtype

ROWS = 8
DTYPES = ("float32", "float16", "bfloat16")
# heads, head_dim, context, dtype
SHAPES = (
    *((2, 64, 130, dtype) for dtype in DTYPES),
    (1, 48, 45, "float16"),
    (3, 20, 61, "float32"),
    (2, 80, 100, "bfloat16"),
)
# A float32 sum of 64 products and a softmax: about 1e-7 each; measured NMSE 1e-13.
NMSE = 1e-12
# Prefill with a bfloat16 cache may round each probability to bfloat16, by 2**-9 at most.
PREFILL_NMSE = {"float32": NMSE, "float16": NMSE, "bfloat16": 2.0**-18}


@cache
def compiled(kernel: Any) -> Any:
    target = targets.detect_cpu()
    module = tvm.IRModule({"main": schedule(kernel, target).with_attr("global_symbol", "main")})
    return tvm.tirx.build(module, target=tvm.target.Target(target.tvm))["main"]


def new_cache(kernel: Any, lengths: dict[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random keys and values up to each slot's length, (S, 2, H, P, D) in the storage dtype."""
    cache = rng.standard_normal((len(lengths) + 1, 2, kernel.heads, kernel.context, kernel.head_dim), dtype=np.float32)
    cache = cache.astype(numpy_dtype(kernel.dtype))
    forget(cache, lengths)
    return cache


def forget(cache: np.ndarray, lengths: dict[int, int]) -> None:
    for slot in range(len(cache)):
        cache[slot, :, :, lengths.get(slot, 0) :] = np.nan


def sdpa(q: np.ndarray, cache: np.ndarray, slot: int, start: int, scale: float) -> np.ndarray:
    """Rows q (T, H, D) at positions start .. start + T - 1 of a slot -> (T, H * D), float64."""
    count, end = len(q), start + len(q)
    queries = torch.from_numpy(q.astype(np.float64)).transpose(0, 1)
    keys, values = torch.from_numpy(cache[slot, :, :, :end].astype(np.float64))
    visible = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
    output = scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale)
    return output.transpose(0, 1).reshape(count, -1).numpy()


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    assert not np.isnan(actual).any()
    return float(np.square(actual - expected).sum() / np.square(expected).sum())


def prefill(
    kernel: PrefillAttention, q: np.ndarray, cache: np.ndarray, sequences: list[tuple[int, int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Runs sequences (slot, rows, first position), consecutive in q (n, H, D); returns actual and expected (n, E)."""
    count, width = len(q), kernel.heads * kernel.head_dim
    padded = np.full((-(-count // ROWS) * ROWS, width), np.nan, np.float32)
    padded[:count] = q.reshape(count, width)
    starts = list(accumulate((rows for _, rows, _ in sequences), initial=0))
    table = np.array(
        [(slot, row, rows, at) for (slot, rows, at), row in zip(sequences, starts, strict=False)], np.int32
    )
    # Rows that belong to no sequence are left unchanged.
    output = tvm.runtime.tensor(np.full((len(padded) // ROWS, ROWS, width), 7.0, np.float32))
    inputs = (padded.reshape(-1, ROWS, width), cache, table)
    compiled(kernel)(*map(tvm.runtime.tensor, inputs), output)
    actual = output.numpy().reshape(-1, width)
    assert (actual[count:] == 7.0).all()
    expected = [
        sdpa(q[row : row + rows], cache, slot, at, kernel.scale)
        for (slot, rows, at), row in zip(sequences, starts, strict=False)
    ]
    return actual[:count], np.concatenate(expected)


def decode(
    kernel: DecodeAttention, q: np.ndarray, cache: np.ndarray, slots: list[int], positions: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Runs one row of q (n, H, D) per sequence; returns actual and expected (n, E)."""
    count, width, rows = len(q), kernel.heads * kernel.head_dim, kernel.rows
    groups = -(-count // rows)
    padded = np.full((groups * rows, width), np.nan, np.float32)
    padded[:count] = q.reshape(count, width)
    all_slots, all_positions = np.zeros(groups * rows, np.int32), np.full(groups * rows, -1, np.int32)
    all_slots[:count], all_positions[:count] = slots, positions
    output = tvm.runtime.tensor(np.full((groups, rows, width), np.nan, np.float32))
    inputs = (
        padded.reshape(groups, rows, width),
        cache,
        all_slots.reshape(groups, rows),
        all_positions.reshape(groups, rows),
    )
    compiled(kernel)(*map(tvm.runtime.tensor, inputs), output)
    actual = output.numpy().reshape(-1, width)
    assert (actual[count:] == 0.0).all()
    expected = [
        sdpa(q[row : row + 1], cache, slot, position, kernel.scale)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True))
    ]
    return actual[:count], np.concatenate(expected)


def queries(kernel: Any, count: int, rng: np.random.Generator) -> np.ndarray:
    """(n, H, D) float32; rounded to bfloat16 if the cache is, as in a model of that dtype."""
    q = rng.standard_normal((count, kernel.heads, kernel.head_dim), dtype=np.float32)
    return q.astype(numpy_dtype("bfloat16")).astype(np.float32) if kernel.dtype == "bfloat16" else q


@pytest.mark.parametrize(("heads", "head_dim", "context", "dtype"), SHAPES)
def test_prefill(heads: int, head_dim: int, context: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    kernel = PrefillAttention(heads, head_dim, context, ROWS, dtype, head_dim**-0.5)
    # The whole context, one token, a cached prefix up to the context's last position, and one that starts at 1.
    sequences = [(2, context, 0), (0, 1, 0), (3, 13, context - 13), (1, 33, 1)]
    cache = new_cache(kernel, {slot: at + rows for slot, rows, at in sequences}, rng)
    q = queries(kernel, sum(rows for _, rows, _ in sequences), rng)
    actual, expected = prefill(kernel, q, cache, sequences)
    assert nmse(actual, expected) <= PREFILL_NMSE[dtype]
    # Outputs are below 5.
    assert np.abs(actual - expected).max() <= (5 * 2.0**-9 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize(("heads", "head_dim", "context", "dtype"), SHAPES)
def test_decode(heads: int, head_dim: int, context: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    batch = DecodeAttention(heads, head_dim, context, ROWS, dtype, head_dim**-0.5)
    positions = [0, context - 1, 15, 16, 17, 31, 7, 40, 1, context - 2, 32]
    slots = rng.permutation(len(positions)).tolist()
    lengths = {slot: position + 1 for slot, position in zip(slots, positions, strict=True)}
    cache = new_cache(batch, lengths, rng)
    q = queries(batch, len(positions), rng)
    actual, expected = decode(batch, q, cache, slots, positions)
    assert nmse(actual, expected) <= NMSE
    assert np.abs(actual - expected).max() <= 1e-5
    one = DecodeAttention(heads, head_dim, context, 1, dtype, head_dim**-0.5, groups=1)
    for row in (0, 1, 3):
        actual, expected = decode(one, q[row : row + 1], cache, slots[row : row + 1], positions[row : row + 1])
        assert nmse(actual, expected) <= NMSE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_full_context_of_124m(dtype: str) -> None:
    rng = np.random.default_rng(0)
    sizes = (12, 64, 1024)
    cache = new_cache(PrefillAttention(*sizes, ROWS, dtype, 0.125), {0: 1024, 1: 1024}, rng)
    prefill_kernel = PrefillAttention(*sizes, ROWS, dtype, 0.125)
    q = queries(prefill_kernel, 1024, rng)
    actual, expected = prefill(prefill_kernel, q, cache, [(1, 1024, 0)])
    assert nmse(actual, expected) <= NMSE
    q = queries(prefill_kernel, 3, rng)
    actual, expected = decode(DecodeAttention(*sizes, ROWS, dtype, 0.125), q, cache, [1, 0, 1], [1023, 1023, 511])
    assert nmse(actual, expected) <= NMSE
    actual, expected = decode(DecodeAttention(*sizes, 1, dtype, 0.125, groups=1), q[:1], cache, [1], [1023])
    assert nmse(actual, expected) <= NMSE


def _large_integers(kernel: Any, length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """q (rows, H, D) and a cache of magnitude 256 whose scores float32 computes without rounding.

    Products and sums of these integers stay below 2**24. The keys of a slot share all but their first component, so the
    scores are near 2**17 and differ by a few: a softmax that did not subtract its maximum would overflow, and one with
    scores rounded to float16 would be wrong.
    """
    rng = np.random.default_rng(0)
    q = rng.integers(128, 257, (rows, kernel.heads, kernel.head_dim)).astype(np.float32)
    q[..., 0] = rng.integers(1, 9, (rows, kernel.heads))
    shape = (1, 2, kernel.heads, kernel.context, kernel.head_dim)
    cache = np.broadcast_to(rng.integers(128, 257, (*shape[:3], 1, kernel.head_dim)), shape).astype(np.float32)
    cache[:, 0, :, :, 0] = rng.integers(0, 8, (1, kernel.heads, kernel.context))
    cache[:, 1] = rng.integers(-256, 257, cache[:, 1].shape)
    cache = cache.astype(numpy_dtype(kernel.dtype))
    forget(cache, {0: length})
    assert 2**16 < np.abs(q[0, 0].astype(np.float64) @ cache[0, 0, 0, 0].astype(np.float64)) * kernel.scale < 2**21
    return q, cache


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_beyond_float16(dtype: str) -> None:
    length = 96
    kernel = PrefillAttention(2, 64, 128, ROWS, dtype, 0.125)
    q, cache = _large_integers(kernel, length, length)
    actual, expected = prefill(kernel, q, cache, [(0, length, 0)])
    assert nmse(actual, expected) <= PREFILL_NMSE[dtype]
    q, cache = _large_integers(kernel, length, 1)
    actual, expected = decode(DecodeAttention(2, 64, 128, ROWS, dtype, 0.125), q, cache, [0], [length - 1])
    assert nmse(actual, expected) <= NMSE


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_inputs_of_magnitude_256(dtype: str) -> None:
    """Scores of order 1e5 with float32 rounding of about 1e-2: nearly one-hot weights, and no NaN."""
    rng = np.random.default_rng(0)
    kernel = PrefillAttention(2, 64, 128, ROWS, dtype, 0.125)
    cache = (new_cache(kernel, {0: 96}, rng).astype(np.float32) * 256).astype(numpy_dtype(dtype))
    q = queries(kernel, 96, rng) * 256
    actual, expected = prefill(kernel, q, cache, [(0, 96, 0)])
    assert nmse(actual, expected) <= max(1e-8, PREFILL_NMSE[dtype])
    actual, expected = decode(DecodeAttention(2, 64, 128, ROWS, dtype, 0.125), q[-1:], cache, [0], [95])
    assert nmse(actual, expected) <= 1e-8
