"""Schedule templates for GPUs: Vulkan devices, and CUDA where it has no better one. Linear layers use matrix units.

What a device can do comes from its target: threads of a block, shared memory, width of a load, subgroups. Reductions
over the threads of a block are TVM's: through the registers of subgroups where the target has them, else through shared
memory.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import (
    Argmax,
    DecodeAttention,
    Embedding,
    GatherRows,
    LayerNorm,
    PackPairs,
    PackPlain,
    PackWords,
    PrefillAttention,
    QuantizeRows,
)
from tvm_attn.kernels.attention_gpu import DecodeChunks, PrefillTiles, decode_attention, prefill_attention
from tvm_attn.kernels.sampling_gpu import argmax
from tvm_attn.kernels.weights import strip_columns as largest_power
from tvm_attn.schedule.base import Chooser, Template
from tvm_attn.schedule.gpu_matmul import matmul
from tvm_attn.targets import GpuTarget


def _elementwise(schedule: s_tir.Schedule, block: Any, target: GpuTarget, choose: Chooser, lanes: int = 1) -> None:
    """One thread for `lanes` neighbouring elements of the last dimension."""
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    *outer, last = schedule.get_loops(block)
    last, lane = schedule.split(last, [None, lanes])
    block_x, thread = schedule.split(schedule.fuse(*outer, last), [None, threads])
    schedule.bind(block_x, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    if lanes > 1:
        schedule.vectorize(lane)


def _rows(kernel: Embedding | GatherRows, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(kernel.prim_func())
    block = schedule.get_sblock("embed" if isinstance(kernel, Embedding) else "gather")
    # A column of the packed token table is spread over K: only a gather reads neighbours.
    lanes = largest_power(kernel.width, target.vector_bytes // 4) if isinstance(kernel, GatherRows) else 1
    _elementwise(schedule, block, target, choose, lanes)
    return schedule.mod["main"]


def _pack(kernel: PackPlain | PackWords, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(kernel.prim_func())
    _elementwise(schedule, schedule.get_sblock("pack"), target, choose)
    return schedule.mod["main"]


def _pack_pairs(kernel: PackPairs, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(kernel.prim_func())
    _elementwise(schedule, schedule.get_sblock("pack"), target, choose)
    return schedule.mod["main"]


def _quantize_rows(kernel: QuantizeRows, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """One thread for a group of 32 elements."""
    schedule = s_tir.Schedule(kernel.prim_func())
    _elementwise(schedule, schedule.get_sblock("group"), target, choose)
    for name in ("largest", "words"):
        schedule.unroll(schedule.get_loops(schedule.get_sblock(name))[-1])
    return schedule.mod["main"]


def _layer_norm(kernel: LayerNorm, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """One block for a row; both sums are reductions over its threads.

    With subgroups of s threads, the sums of up to s of them are added by the first, after one barrier.
    """
    schedule = s_tir.Schedule(kernel.prim_func())
    most = target.max_threads if target.subgroup is None else min(target.max_threads, target.subgroup**2)
    widest = largest_power(1 << (kernel.width.bit_length() - 1), most)
    candidates = [threads for threads in (32, 64, 128, 256) if threads <= widest] or [widest]
    threads = choose("threads", candidates, candidates[-1])
    total, squares, normalize = (schedule.get_sblock(name) for name in ("sum", "squares", "normalize"))
    group, row, column = schedule.get_loops(normalize)
    block_x = schedule.fuse(group, row)
    schedule.bind(block_x, "blockIdx.x")
    _, thread = schedule.split(column, [None, threads])
    schedule.bind(thread, "threadIdx.x")
    for block in (squares, total):
        schedule.compute_at(block, block_x, preserve_unit_loops=True)
        schedule.set_scope(block, 0, "shared")
        _, thread = schedule.split(schedule.get_loops(block)[-1], [None, threads])
        schedule.bind(thread, "threadIdx.x")
    return schedule.mod["main"]


# Queries, keys, threads across and down; see `PrefillTiles`. Records name them by index: new ones go to the end.
_PREFILL_TILES = (
    (64, 32, 16, 16),
    (32, 32, 16, 8),
    (32, 16, 16, 8),
    (16, 16, 16, 8),
    (16, 8, 8, 16),
    (8, 8, 8, 8),
    (4, 4, 4, 4),
)


def _prefill_attention(kernel: PrefillAttention, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """The first tiles of `_PREFILL_TILES` that the device's threads and shared memory allow, or any of those after."""
    tiles = [PrefillTiles(*sizes, target.vector_bytes // 4) for sizes in _PREFILL_TILES]
    fitting = [
        index
        for index, tile in enumerate(tiles)
        if tile.across * tile.down <= target.max_threads and tile.shared_bytes(kernel.head_dim) <= target.shared_bytes
    ]
    if not fitting:
        raise ScheduleError(f"heads of {kernel.head_dim} do not fit {target.shared_bytes} bytes of shared memory")
    return prefill_attention(kernel, tiles[choose("tiles", fitting, fitting[0])])


def _decode_attention(kernel: DecodeAttention, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    keys = choose("key_chunk", (32, 64, 128, 256), 128)
    key_threads = choose("key_threads", (1, 2, 4, 8, 16), 8)
    chunks = DecodeChunks(keys, threads, key_threads, target.vector_bytes // 4)
    if chunks.shared_bytes(kernel.head_dim) > target.shared_bytes:
        raise ScheduleError(f"chunks of {keys} keys do not fit {target.shared_bytes} bytes of shared memory")
    return decode_attention(kernel, chunks)


def _argmax(kernel: Argmax, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    return argmax(kernel, threads, choose("chunk", (512, 1024, 2048, 4096), 2048))


TEMPLATES: tuple[Template, ...] = (
    Template("gpu.matmul", 1, ("linear", "residual_linear", "qkv_linear", "head"), matmul),
    Template("gpu.pack", 1, ("pack_plain", "pack_words"), _pack),
    Template("gpu.pack_pairs", 1, ("pack_pairs",), _pack_pairs),
    Template("gpu.quantize_rows", 1, ("quantize_rows",), _quantize_rows),
    Template("gpu.rows", 1, ("embedding", "gather_rows"), _rows),
    Template("gpu.layer_norm", 1, ("layer_norm",), _layer_norm),
    Template("gpu.prefill_attention", 1, ("prefill_attention",), _prefill_attention),
    Template("gpu.decode_attention", 1, ("decode_attention",), _decode_attention),
    Template("gpu.argmax", 1, ("argmax",), _argmax),
)
"""The templates of this device class."""
