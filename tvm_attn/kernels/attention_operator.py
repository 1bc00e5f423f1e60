"""Scaled dot-product attention of every kind (Vaswani et al., 2017), as the operator Attention of ai.onnx defines it.

Self and cross attention, grouped and single key-value heads (Ainslie et al., 2023), values of another size than keys,
masks, causal and sliding windows, soft caps. `PrefillAttention` and `DecodeAttention` are for the KV cache of GPT-2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import tanh
from tvm_attn.kernels.attention import OVERFLOWING
from tvm_attn.kernels.base import ROUNDED, Case
from tvm_attn.storage import numpy_dtype

BOOLEAN = "int8"
"""dtype of masks that say which keys take part (not zero)."""

EXCLUDED = -3.4e38
"""The score of a key that takes no part."""

UNSEEN = -3.3e38
"""The maximum of no scores: rows that end with it see no key, and give zeros. Above `EXCLUDED`."""

LOWEST = -3.2e38
"""The least score of a key that takes part: masks often hold float32's least number where they mean minus infinity,
and a row of such numbers has weights all the same."""

_LEAST = float(np.finfo(np.float32).min)

STAGES = ("raw", "capped", "biased", "weights")
"""What `AttentionScores` can give; `qk_matmul_output_mode` of the operator is the index."""


@dataclass(frozen=True)
class AttentionOperator:
    """o = softmax(cap(scale q k^T) + mask) v, where keys that a query may not see have no weight.

    Parameters of the function: q (b, H, n, D) dtype; k (b, G, s, D) dtype; v (b, G, s, F) dtype; bounds (b, 2) int32,
    the position of the first query and the number of keys that exist (not negative; keys beyond are not read); if
    there is a mask, mask (1 or b, 1 or H, 1 or n, m), keys from m on take no part; o (b, H, n, F) dtype. Query i is at
    the position of the first one plus i, key j at j. A row that sees no key is zero.

    Attributes:
        heads: H.
        key_heads: G, a divisor of H; head h reads key head h // (H / G).
        head_dim: D.
        value_dim: F.
        dtype: of q, k, v and o; scores and sums are float32.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        mask: dtype of the mask, `BOOLEAN` or a float dtype of numbers that are added; None without one.
        causal: whether query p sees keys up to p only.
        left, right: how many keys before and after its own position a query sees; -1 for all.
    """

    family: ClassVar[str] = "attention_operator"

    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    scale: float
    softcap: float = 0.0
    mask: str | None = None
    causal: bool = False
    left: int = -1
    right: int = -1

    @property
    def reach(self) -> int | None:
        """How many keys after its own position a query sees; None for all."""
        return 0 if self.causal else self.right if self.right >= 0 else None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for kernel, name, sizes, options in _variants():
            yield _case(kernel, name, *sizes, **options)

    # --- expressions of the loops ---

    def capped(self, score: Any) -> Any:
        """The score with the soft cap."""
        return T.float32(self.softcap) * tanh(score / T.float32(self.softcap)) if self.softcap else score

    def biased(self, score: Any, mask: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        """The score after the mask, which is read at the last key if `key` is past it."""
        if self.mask is None:
            return score
        at = [T.min(index, extent - 1) for index, extent in zip((batch, head, query, key), mask.shape, strict=True)]
        value = mask[tuple(at)]
        if self.mask == BOOLEAN:
            return T.Select(value != T.int8(0), score, T.float32(EXCLUDED))
        value = T.Cast("float32", value)
        return T.Select(value < T.float32(_LEAST), T.float32(EXCLUDED), T.max(score + value, T.float32(LOWEST)))

    def sees(self, key: Any, position: Any, count: Any) -> Any:
        """Whether the query at a position sees a key of `count`, whatever the mask says."""
        found = key < count
        if self.reach is not None:
            found = tirx.And(found, key <= position + self.reach)
        if self.left >= 0:
            found = tirx.And(found, key >= position - self.left)
        return found

    def end(self, last: Any, count: Any) -> Any:
        """One past the last key that queries up to position `last` see, at least 0."""
        return count if self.reach is None else T.max(T.min(count, last + (self.reach + 1)), 0)

    def begin(self, first: Any) -> Any:
        """The first key that queries from position `first` on see, at least 0."""
        return T.max(first - self.left, 0) if self.left >= 0 else T.int32(0)


@dataclass(frozen=True)
class AttentionScores(AttentionOperator):
    """The scores of `AttentionOperator` or their softmax, to look at.

    Parameters of the function: as `AttentionOperator`, without v; the result is scores (b, H, n, s) float32. "raw" is
    the scaled product, "capped" with the soft cap, "biased" with the mask too and minus infinity for keys that take no
    part, and "weights" the softmax.

    Attributes:
        stage: which of `STAGES`.
    """

    family: ClassVar[str] = "attention_scores"

    stage: str = "weights"

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for (kernel, name, sizes, options), stage in zip(_variants(), itertools.cycle(STAGES[::-1])):
            yield _scores_case(kernel, stage, name, *sizes, **options)
        for stage in STAGES:
            kernel = AttentionOperator(2, 1, 20, 20, "float32", 0.3, 2.0, BOOLEAN, True, 6)
            options = {"first": (4, -3), "counts": (13, 6), "mask_shape": (1, 2, 9, 13)}
            yield _scores_case(kernel, stage, f"everything, {stage}", 2, 9, 13, **options)


_Variant = tuple[AttentionOperator, str, tuple[int, int, int], dict[str, Any]]


def _variants() -> Iterator[_Variant]:
    """Kernels, a name, the sizes (b, n, s) and what `_case` takes."""
    plain = AttentionOperator(2, 2, 64, 64, "float32", 0.125)
    yield plain, "one query, one key", (1, 1, 1), {}
    yield plain, "cross attention", (2, 65, 131), {}
    yield plain, "no keys", (1, 3, 0), {}
    yield plain, "keys that do not exist", (3, 5, 40), {"counts": (40, 1, 0)}
    yield plain, "scores of order 1000", (1, 40, 70), {"magnitude": OVERFLOWING}
    causal = replace(plain, causal=True)
    yield causal, "causal", (2, 130, 130), {}
    yield causal, "full context", (1, 1024, 1024), {}
    yield causal, "causal after past keys", (2, 7, 100), {"first": (93, 20), "counts": (100, 27)}
    yield causal, "more queries than keys", (1, 9, 4), {"first": (-5,)}
    yield replace(plain, left=3, right=1), "window", (2, 70, 75), {}
    yield replace(causal, left=40), "causal window", (1, 150, 150), {}
    yield replace(plain, softcap=1.5), "soft cap", (1, 20, 33), {}
    yield replace(plain, heads=6, key_heads=2), "grouped heads", (2, 17, 35), {}
    yield replace(plain, heads=4, key_heads=1, value_dim=24), "one key head, other values", (1, 33, 34), {}
    yield replace(plain, head_dim=20, value_dim=12, scale=0.3), "odd sizes", (2, 3, 5), {}
    for mask in (BOOLEAN, "float32"):
        masked = replace(plain, mask=mask)
        for shape in ((1, 1, 1, 37), (2, 1, 19, 37), (1, 2, 19, 37), (2, 2, 19, 37), (2, 2, 19, 30)):
            yield masked, f"{mask} mask {shape}", (2, 19, 37), {"mask_shape": shape}
        everything = replace(causal, heads=4, mask=mask, left=30, softcap=3.0)
        options = {"mask_shape": (2, 1, 70, 90), "first": (20, 3), "counts": (90, 73)}
        yield everything, f"everything, {mask}", (2, 70, 90), options
    for dtype in ("float16", "bfloat16"):
        rounded = replace(plain, dtype=dtype)
        yield rounded, "cross attention", (2, 35, 66), {}
        yield replace(rounded, causal=True), "causal", (1, 97, 97), {}
        yield replace(rounded, mask=dtype, heads=4), "mask", (2, 21, 40), {"mask_shape": (1, 4, 21, 40)}


def _operands(
    kernel: AttentionOperator,
    batch: int,
    queries: int,
    keys: int,
    first: tuple[int, ...] = (),
    counts: tuple[int, ...] = (),
    mask_shape: tuple[int, ...] | None = None,
    magnitude: float = 1.0,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Random q, k, v, bounds and mask, and what each query sees, (b, H, n, s) bool. Keys that do not exist are NaN."""
    rng, dtype = np.random.default_rng(0), numpy_dtype(kernel.dtype)
    first, counts = first or (0,) * batch, counts or (keys,) * batch

    def random(heads: int, length: int, width: int) -> np.ndarray:
        return (rng.standard_normal((batch, heads, length, width)) * magnitude).astype(dtype)

    q = random(kernel.heads, queries, kernel.head_dim)
    k, v = random(kernel.key_heads, keys, kernel.head_dim), random(kernel.key_heads, keys, kernel.value_dim)
    for sequence, count in enumerate(counts):
        k[sequence, :, count:] = v[sequence, :, count:] = np.nan
    position = np.array(first)[:, None, None, None] + np.arange(queries)[:, None]
    key = np.arange(keys)
    seen = np.broadcast_to(
        key < np.array(counts)[:, None, None, None], (batch, kernel.heads, queries, keys)
    ) & np.ones_like(position, bool)
    if kernel.reach is not None:
        seen = seen & (key <= position + kernel.reach)
    if kernel.left >= 0:
        seen = seen & (key >= position - kernel.left)
    arrays = [q, k, v, np.array([*zip(first, counts, strict=True)], np.int32).reshape(batch, 2)]
    if kernel.mask is not None:
        assert mask_shape is not None
        hidden = rng.random(mask_shape) < 0.3
        hidden[..., -1:, :] = True  # the last query of a sequence sees nothing, unless all share a row
        if mask_shape[2] == 1:
            hidden[..., ::2] = False
        if kernel.mask == BOOLEAN:
            arrays.append((~hidden).astype(np.int8) * 3)
        else:
            added = np.where(hidden, -np.inf, rng.standard_normal(mask_shape))
            arrays.append(added.astype(numpy_dtype(kernel.mask)))
        seen = seen & np.pad(~hidden, [(0, 0)] * 3 + [(0, keys - mask_shape[3])])
    return arrays, seen


def _stages(kernel: AttentionOperator, arrays: list[np.ndarray], seen: np.ndarray) -> dict[str, np.ndarray]:
    """Each of `STAGES` in float64, (b, H, n, s)."""
    q, k = (array.astype(np.float64) for array in arrays[:2])
    k = np.repeat(k, kernel.heads // kernel.key_heads, axis=1)
    raw = np.einsum("bhld,bhsd->bhls", q, k) * kernel.scale
    capped = kernel.softcap * np.tanh(raw / kernel.softcap) if kernel.softcap else raw
    added = np.zeros(())
    if kernel.mask not in (None, BOOLEAN):
        mask = arrays[4].astype(np.float64)
        added = np.pad(mask, [(0, 0)] * 3 + [(0, raw.shape[3] - mask.shape[3])])
    with np.errstate(invalid="ignore"):
        biased = np.where(seen, capped + added, -np.inf)
    largest = np.max(biased, axis=-1, keepdims=True, initial=-1e300)
    weights = np.exp(biased - largest)
    total = weights.sum(-1, keepdims=True)
    return {"raw": raw, "capped": capped, "biased": biased, "weights": weights / np.where(total, total, 1.0)}


def _case(kernel: AttentionOperator, name: str, batch: int, queries: int, keys: int, **options: Any) -> Case:
    arrays, seen = _operands(kernel, batch, queries, keys, **options)
    weights = _stages(kernel, arrays, seen)["weights"]
    v = np.nan_to_num(np.repeat(arrays[2].astype(np.float64), kernel.heads // kernel.key_heads, axis=1))
    expected = np.einsum("bhls,bhsd->bhld", weights, v)
    outputs = np.full(expected.shape, 7, numpy_dtype(kernel.dtype))
    magnitude = options.get("magnitude", 1.0)
    # Scores of order 1000 are resolved to about 1e-4 in float32.
    bound = 2 * ROUNDED[kernel.dtype] if kernel.dtype != "float32" else 1e-11 if magnitude == 1.0 else 1e-6
    return Case(kernel, name, tuple(arrays), (outputs,), (expected,), nmse=bound)


def _scores_case(
    kernel: AttentionOperator, stage: str, name: str, batch: int, queries: int, keys: int, **options: Any
) -> Case:
    arrays, seen = _operands(kernel, batch, queries, keys, **options)
    for index in (1, 2):  # all products are given in the first stages
        arrays[index] = np.nan_to_num(arrays[index].astype(np.float32)).astype(arrays[index].dtype)
    expected = _stages(kernel, arrays, seen)[stage]
    given = {field.name: getattr(kernel, field.name) for field in fields(kernel)} | {"stage": stage}
    outputs = np.full(expected.shape, 7, np.float32)
    inputs = (arrays[0], arrays[1], *arrays[3:])
    bound = 1e-11 if options.get("magnitude", 1.0) == 1.0 or stage != "weights" else 1e-6
    return Case(AttentionScores(**given), name, inputs, (outputs,), (expected,), nmse=bound)


def random_case(kernel: AttentionOperator, length: int) -> Case:
    """A case of `length` queries and as many keys with random operands, of the sizes that a search measures."""
    options = {} if kernel.mask is None else {"mask_shape": (1, 1, length, length)}
    if isinstance(kernel, AttentionScores):
        return _scores_case(kernel, kernel.stage, f"{length} rows", 1, length, length, **options)
    return _case(kernel, f"{length} rows", 1, length, length, **options)
