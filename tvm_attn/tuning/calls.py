"""The calls that a search measures: representative sizes of each kernel family, and how much work each call does.

One schedule serves every length, so a symbolic kernel is called with a short prompt and with a full context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm_attn.errors import TuningError
from tvm_attn.kernels import (
    Advance,
    Argmax,
    AttentionOperator,
    AttentionScores,
    AttentionWeights,
    CacheWrite,
    Case,
    DecodeAttention,
    Embedding,
    ExpSums,
    Head,
    Kernel,
    LinearKernel,
    PackPairs,
    PrefillAttention,
    QKVLinear,
    ResidualLinear,
    TopLogits,
    attention_operator,
    attention_weights,
    cache_write,
    decode_attention,
    embedding,
    linear,
    logprobs,
    norm,
    prefill_attention,
    quant,
    sampling,
    weights,
)
from tvm_attn.kernels.weights import PLAIN
from tvm_attn.storage import GROUP, cache_row, numpy_dtype
from tvm_attn.targets import Peak

_ROWS = (128, 1023)
"""Rows of prompts: the usual benchmark of GPT-2 124M, and its full context minus the next token."""
_GROUPS = 2
"""Row groups of a short prompt or a large batch. A single group has kernels of its own."""


@dataclass(frozen=True)
class Call:
    """One call of a kernel that a search measures.

    Attributes:
        name: the call's size, e.g. "128 rows".
        flops: number of float32 operations; None if the work uses other instructions, whose peak no target states.
        bytes: memory traffic if everything were moved once.
        case: creates the inputs and their float64 reference, within seconds.
    """

    name: str
    flops: int | None
    bytes: int
    case: Callable[[], Case]

    def limit_seconds(self, peak: Peak | None) -> float | None:
        """The least time that the hardware's limits allow; None if a limit is not known."""
        if peak is None or self.flops is None:
            return None
        return max(self.flops / (peak.float32_gflops * 1e9), self.bytes / (peak.memory_gbytes * 1e9))


def calls_of(kernel: Kernel) -> tuple[Call, ...]:
    """The calls to measure.

    Raises:
        TuningError: no representative sizes are defined for this family.
    """
    if kernel.family not in _CALLS:
        raise TuningError(f"kernel family {kernel.family!r} has no sizes to measure; add them to {__name__}")
    return _CALLS[kernel.family](kernel)


def _cache_bytes(kernel: PrefillAttention | DecodeAttention) -> float:
    """Bytes of a value in the KV cache, with its share of a scale."""
    width, dtype = cache_row(kernel.dtype, kernel.head_dim)
    return width * _bytes(dtype) / kernel.head_dim


def _bytes(dtype: str) -> int:
    return numpy_dtype(dtype).itemsize


def _tensor_bytes(types: list[tuple[tuple[int, int, int], str]]) -> int:
    return sum(math.prod(shape) * _bytes(dtype) for shape, dtype in types)


def _group_counts(kernel: Any) -> tuple[int, ...]:
    """Numbers of row groups to measure, for batches and prompts; at most as many as the kernel takes."""
    if kernel.groups is not None:
        return (kernel.groups,)
    most = getattr(kernel, "max_groups", None) or math.inf
    if isinstance(kernel, Head):
        # Logits are computed for a prompt's last row, or for all its rows.
        counts = [1, -(-_ROWS[0] // kernel.rows)]
    else:
        counts = [_GROUPS, *(-(-rows // kernel.rows) for rows in _ROWS)]
    return tuple(sorted({int(min(count, most)) for count in counts}))


def _linear_row_bytes(kernel: LinearKernel) -> int:
    """Bytes that a row reads and writes: x, y, the residual, or its place in the cache."""
    k, width = kernel.in_features, kernel.strips * kernel.columns
    if kernel.epsilon is not None:
        x = 4 * k
    elif kernel.activations != "float32" or kernel.weights in PLAIN:
        x = k * _bytes(kernel.activations)
    else:
        x = 2 * k if kernel.weights == "bfloat16_pairs" else k + k // GROUP * 8
    if isinstance(kernel, QKVLinear):
        third = kernel.out_features // 3
        return x + third * _bytes(kernel.activations) + 2 * third * _bytes(kernel.cache_dtype) + 8
    return x + width * _bytes(kernel.output_dtype) + (4 * width if isinstance(kernel, ResidualLinear) else 0)


def _linear_calls(kernel: LinearKernel) -> tuple[Call, ...]:
    once = _tensor_bytes(kernel.weight_types) + 4 * kernel.strips * kernel.columns * kernel.has_bias
    once += 8 * kernel.in_features if kernel.epsilon is not None else 0
    calls = []
    for groups in _group_counts(kernel):
        rows = groups * kernel.rows
        flops: int | None = 2 * rows * kernel.in_features * kernel.strips * kernel.columns
        if kernel.weights not in PLAIN or kernel.activations != "float32":
            flops = 0 if rows == 1 else None  # one row is memory-bound with any instructions
        case = partial(linear.random_case, kernel, groups)
        calls.append(Call(f"{rows} rows", flops, once + rows * _linear_row_bytes(kernel), case))
    return tuple(calls)


def _pack_calls(kernel: Any) -> tuple[Call, ...]:
    k, n, columns = kernel.in_features, kernel.out_features, kernel.columns
    kind = getattr(kernel, "weights", None) or kernel.dtype
    packed = weights.packed_types(kind, k, n, columns)[:1]
    stored = {"bfloat16_pairs": 2 * k * n, "int8": k * n, "int4": k * n // 2}
    given = stored[kind] if kind in stored else k * n * _bytes(kind)
    return (Call("all", 0, given + _tensor_bytes(packed), partial(weights.random_case, kernel)),)


def _prefill_calls(kernel: PrefillAttention) -> tuple[Call, ...]:
    lengths = sorted({min(_ROWS[0], kernel.context), max(kernel.context - 1, 1)})
    width, calls = kernel.heads * kernel.head_dim, []
    for length in lengths:
        flops = 2 * width * length * (length + 1)  # two dot products of length D for every query and key
        traffic = round(2 * length * width * (_bytes(kernel.activations) + _cache_bytes(kernel)))
        case = partial(prefill_attention.random_case, kernel, length)
        calls.append(Call(f"{length} rows", flops if kernel.activations == "float32" else None, traffic, case))
    return tuple(calls)


def _weights_calls(kernel: AttentionWeights) -> tuple[Call, ...]:
    length = max(kernel.context - 1, 1)
    flops = kernel.heads * kernel.head_dim * length * (length + 1)
    case = partial(attention_weights.random_case, kernel, length)
    return (Call(f"{length} rows", flops, 4 * kernel.heads * length**2, case),)


def _decode_calls(kernel: DecodeAttention) -> tuple[Call, ...]:
    rows = kernel.rows * (kernel.groups or 1)
    lengths = sorted({min(_ROWS[0], kernel.context), max(kernel.context - 1, 1)})
    width, calls = kernel.heads * kernel.head_dim, []
    for length in lengths:
        traffic = round(2 * rows * width * (length * _cache_bytes(kernel) + _bytes(kernel.activations)))
        case = partial(decode_attention.random_case, kernel, (length - 1,) * rows)
        calls.append(Call(f"{rows} rows, context {length}", 4 * rows * width * length, traffic, case))
    return tuple(calls)


def _row_calls(row_bytes: Callable[[Any], int], random_case: Callable[[Any, int], Case]) -> Callable[[Any], Any]:
    """Calls of a kernel that takes one row after another, and moves `row_bytes(kernel)` bytes for each."""

    def calls(kernel: Any) -> tuple[Call, ...]:
        counts = (_GROUPS, -(-_ROWS[1] // kernel.rows)) if getattr(kernel, "groups", None) is None else (kernel.groups,)
        return tuple(
            Call(
                f"{groups * kernel.rows} rows",
                0,
                groups * kernel.rows * row_bytes(kernel),
                partial(random_case, kernel, groups),
            )
            for groups in counts
        )

    return calls


def _embedding_bytes(kernel: Embedding) -> int:
    table = _tensor_bytes(weights.packed_types(kernel.weights, kernel.width, kernel.columns, kernel.columns))
    return 8 + table // kernel.columns + kernel.width * (_bytes(kernel.dtype) + 4)


def _packed_row_bytes(kernel: Any) -> int:
    packed = kernel.width * 2 if isinstance(kernel, PackPairs) else kernel.width + kernel.width // GROUP * 8
    return kernel.width * 4 + packed


def _cache_write_bytes(kernel: CacheWrite) -> int:
    width, dtype = cache_row("int8", kernel.head_dim)
    return kernel.heads * (16 * kernel.head_dim + 2 * width * _bytes(dtype)) + 8


def _logit_bytes(kernel: Argmax | Advance | ExpSums | TopLogits) -> int:
    return 4 * kernel.vocabulary


def _operator_calls(kernel: AttentionOperator) -> tuple[Call, ...]:
    length, is_scores = _ROWS[-1], isinstance(kernel, AttentionScores)
    widths = kernel.head_dim if is_scores else kernel.head_dim + kernel.value_dim
    flops = kernel.heads * widths * length * (length + 1 if kernel.causal else 2 * length)
    traffic = length * (kernel.heads + kernel.key_heads) * widths * _bytes(kernel.dtype)
    if is_scores:
        traffic += 4 * kernel.heads * length**2
    case = partial(attention_operator.random_case, kernel, length)
    return (Call(f"{length} rows", flops, traffic, case),)


_CALLS: dict[str, Callable[[Any], tuple[Call, ...]]] = {
    "linear": _linear_calls,
    "residual_linear": _linear_calls,
    "qkv_linear": _linear_calls,
    "head": _linear_calls,
    "pack_plain": _pack_calls,
    "pack_words": _pack_calls,
    "prefill_attention": _prefill_calls,
    "decode_attention": _decode_calls,
    "attention_weights": _weights_calls,
    "attention_operator": _operator_calls,
    "attention_scores": _operator_calls,
    "layer_norm": _row_calls(lambda kernel: kernel.width * (4 + _bytes(kernel.activations)), norm.random_case),
    "embedding": _row_calls(_embedding_bytes, embedding.random_case),
    "gather_rows": _row_calls(lambda kernel: 4 + 8 * kernel.width, embedding.random_case),
    "pack_pairs": _row_calls(_packed_row_bytes, quant.random_case),
    "cache_write": _row_calls(_cache_write_bytes, cache_write.random_case),
    "quantize_rows": _row_calls(_packed_row_bytes, quant.random_case),
    "argmax": _row_calls(_logit_bytes, sampling.random_case),
    "advance": _row_calls(_logit_bytes, sampling.random_case),
    "exp_sums": _row_calls(_logit_bytes, logprobs.random_case),
    "top_logits": _row_calls(_logit_bytes, logprobs.random_case),
}
