"""The calls that a search measures: representative sizes of each kernel family, and how much work they are.

A schedule serves every length, so a symbolic kernel is called with a short prompt and with a full context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx

from tvm_attn.errors import TuningError
from tvm_attn.kernels import (
    Case,
    DecodeAttention,
    PortableKernel,
    PrefillAttention,
    decode_attention,
    matmul,
    prefill_attention,
    weights,
)
from tvm_attn.kernels.weights import PLAIN
from tvm_attn.storage import numpy_dtype
from tvm_attn.targets import Peak

_ROWS = (128, 1023)
"""Rows of prompts: GPT-2 124M's usual benchmark, and its full context less the token to come."""
_GROUPS = 2
"""Row groups of a short prompt or a large batch. One group alone has kernels of its own."""


@dataclass(frozen=True)
class Call:
    """One call of a kernel that a search measures.

    Attributes:
        name: its size, e.g. "128 rows".
        flops: float32 operations; None where other instructions do the work, whose peak no target states.
        bytes: memory traffic if everything were moved once.
        case: makes the inputs and their float64 reference, in seconds at most.
    """

    name: str
    flops: int | None
    bytes: int
    case: Callable[[], Case]

    def limit_seconds(self, peak: Peak | None) -> float | None:
        """The least time that the hardware's limits allow; None where a limit is not known."""
        if peak is None or self.flops is None:
            return None
        return max(self.flops / (peak.float32_gflops * 1e9), self.bytes / (peak.memory_gbytes * 1e9))


def calls_of(kernel: PortableKernel) -> tuple[Call, ...]:
    """The calls to measure.

    Raises:
        TuningError: nobody has said yet which sizes stand for this family.
    """
    if kernel.family not in _CALLS:
        raise TuningError(f"kernel family {kernel.family!r} has no sizes to measure; add them to {__name__}")
    return _CALLS[kernel.family](kernel)


def label(kernel: Any) -> str:
    """A short name for people, e.g. "linear 768x3072, one row"."""
    if hasattr(kernel, "in_features"):
        size = f"{kernel.in_features}x{kernel.out_features}"
    elif hasattr(kernel, "heads"):
        size = f"{kernel.heads}x{kernel.head_dim}"
    else:
        size = str(getattr(kernel, "width", ""))
    one_row = getattr(kernel, "groups", None) == 1 and kernel.rows == 1
    return f"{kernel.family} {size}".strip() + (", one row" if one_row else "")


def _buffer_bytes(function: tirx.PrimFunc, groups: int) -> int:
    """Bytes of a function's parameters; a buffer with a symbolic size other than the row groups counts as nothing."""
    total = 0
    for buffer in function.params:
        sizes = [groups if getattr(size, "name", None) == "g" else size for size in buffer.shape]
        if all(isinstance(size, (int, tirx.IntImm)) for size in sizes):
            total += math.prod(map(int, sizes)) * numpy_dtype(str(buffer.dtype)).itemsize
    return total


def _matmul_calls(kernel: Any) -> tuple[Call, ...]:
    if kernel.groups is not None:
        counts: tuple[int, ...] = (kernel.groups,)
    elif isinstance(kernel, matmul.Head):
        # Logits of a prompt are those of its last row, or of all its rows.
        counts = (1, -(-_ROWS[0] // kernel.rows))
    else:
        counts = (_GROUPS, *(-(-rows // kernel.rows) for rows in _ROWS))
    function, calls = kernel.prim_func(), []
    for groups in counts:
        rows = groups * kernel.rows
        traffic = _buffer_bytes(function, groups)
        if isinstance(kernel, matmul.QKVLinear):
            traffic += rows * kernel.out_features // 3 * 2 * numpy_dtype(kernel.cache_dtype).itemsize
        flops: int | None = 2 * rows * kernel.in_features * kernel.strips * kernel.columns
        if kernel.weights not in PLAIN:
            flops = 0 if rows == 1 else None  # one row is bound by memory whatever the instructions
        calls.append(Call(f"{rows} rows", flops, traffic, partial(matmul.random_case, kernel, groups)))
    return tuple(calls)


def _pack_calls(kernel: Any) -> tuple[Call, ...]:
    return (Call("all", 0, _buffer_bytes(kernel.prim_func(), 1), partial(weights.random_case, kernel)),)


def _prefill_calls(kernel: PrefillAttention) -> tuple[Call, ...]:
    lengths = sorted({min(_ROWS[0], kernel.context), max(kernel.context - 1, 1)})
    width, calls = kernel.heads * kernel.head_dim, []
    for length in lengths:
        flops = 2 * width * length * (length + 1)  # two products of D for every pair of a query and a key
        traffic = 2 * length * width * (4 + numpy_dtype(kernel.dtype).itemsize)
        case = partial(prefill_attention.random_prefill_case, kernel, length)
        calls.append(Call(f"{length} rows", flops, traffic, case))
    return tuple(calls)


def _decode_calls(kernel: DecodeAttention) -> tuple[Call, ...]:
    rows = kernel.rows * (kernel.groups or 1)
    lengths = sorted({min(_ROWS[0], kernel.context), max(kernel.context - 1, 1)})
    width, calls = kernel.heads * kernel.head_dim, []
    for length in lengths:
        traffic = 2 * rows * width * (length * numpy_dtype(kernel.dtype).itemsize + 4)
        case = partial(decode_attention.random_decode_case, kernel, (length - 1,) * rows)
        calls.append(Call(f"{rows} rows, context {length}", 4 * rows * width * length, traffic, case))
    return tuple(calls)


_CALLS: dict[str, Callable[[Any], tuple[Call, ...]]] = {
    "linear": _matmul_calls,
    "residual_linear": _matmul_calls,
    "qkv_linear": _matmul_calls,
    "head": _matmul_calls,
    "pack_plain": _pack_calls,
    "pack_words": _pack_calls,
    "prefill_attention": _prefill_calls,
    "decode_attention": _decode_calls,
}
