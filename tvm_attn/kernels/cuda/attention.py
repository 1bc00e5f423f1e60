"""Head sizes that the tensor-core attention kernels support."""

from __future__ import annotations

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.decode_attention import DecodeAttention
from tvm_attn.kernels.prefill_attention import PrefillAttention

HEAD_DIMS = range(32, 129, 16)
"""Multiples of a step of `mma.sync`, small enough that a row of the output fits in registers."""


def check_head(kernel: PrefillAttention | DecodeAttention) -> None:
    """Refuses kernels that are not supported.

    Raises:
        ScheduleError: the head size is not supported, or the cache and the queries have different dtypes.
    """
    if kernel.dtype != kernel.activations:
        dtypes = f"{kernel.activations} and {kernel.dtype}"
        raise ScheduleError(f"tensor cores take queries and a cache of the same dtype, not {dtypes}")
    if kernel.head_dim not in HEAD_DIMS:
        raise ScheduleError(
            f"tensor cores take heads of 32 to 128 dimensions, a multiple of 16, not {kernel.head_dim}; "
            "build with --dtype float32"
        )
