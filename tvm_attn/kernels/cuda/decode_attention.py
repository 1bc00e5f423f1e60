"""Decode attention at the speed of memory: Flash-Decoding (Dao et al., 2023) with float32 arithmetic.

One query reads everything once, so tensor cores would not help. A few neighbouring lanes share a key, 16 bytes each at
a time, and every such group of lanes has its own softmax over its keys; inside the loop, lanes exchange only the sum of
a score. Groups merge through shuffles, warps through shared memory.

If rows and heads are too few to fill the device, blocks split the keys of a row (`splits`) and merge their results
through a workspace; the last block merges, and finds out by a counter that it is. The number of blocks is static and
positions are read on the device, so a launch can be replayed in a CUDA graph; blocks that a row does not need end at
once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.base import TENSOR_CORE_DTYPES, ZEROED, largest_power, row_groups
from tvm_attn.kernels.cuda.attention import check_head
from tvm_attn.kernels.cuda.lanes import shuffle_xor
from tvm_attn.kernels.cuda.limits import REGISTERS, UNIT_ELEMENTS
from tvm_attn.kernels.cuda.ptx import (
    arrive,
    exp2,
    kernel_attributes,
    load_global,
    pack,
    reciprocal,
    start_next_kernel,
    wait_for_earlier_kernel,
)
from tvm_attn.kernels.cuda.tiles import choose_tiles
from tvm_attn.kernels.decode_attention import DecodeAttention
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CudaTarget

_KEY_LANES = 8
"""Most lanes that share a key. More lanes cost more shuffles; fewer lanes read from more rows at a time."""

_BLOCKS = 384
"""Blocks of threads to aim for when splitting keys: at most three per multiprocessor of a large device."""


@dataclass(frozen=True)
class DecodeTiles:
    """The sizes of `decode_attention`.

    Attributes:
        warps: warps per block.
        splits: blocks that share the keys of a row and head.
        alone: the largest number of keys that one block handles by itself, because merging would cost what it saves.
        loads: 16-byte loads of keys that a thread has in flight, and as many of values; more if one key takes more.
        last: with `splits` above 1, whether the last block of a row and head merges; otherwise a second kernel does.
            The number of row groups is static then.
    """

    warps: int
    splits: int = 1
    alone: int = 384
    loads: int = 4
    last: bool = True

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.warps

    def shared_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory per block: what its warps merge, and a flag."""
        return 4 * (self.warps * (head_dim + 2) + 1)


def default_decode_tiles(kernel: DecodeAttention) -> DecodeTiles:
    """The tiles without a record: with a static number of groups, keys are split until the blocks fill a device."""
    if kernel.groups is None:
        return DecodeTiles(8)
    return DecodeTiles(8, max(1, min(8, _BLOCKS // (kernel.groups * kernel.rows * kernel.heads))))


def decode_candidates(kernel: DecodeAttention) -> Iterator[DecodeTiles]:
    """Tiles for a search to try."""
    for warps in (4, 8, 16):
        for loads in (2, 4, 8):
            yield DecodeTiles(warps, loads=loads)
            if kernel.groups is not None:
                for splits in (2, 4, 8, 16):
                    for alone in (0, 256, 384, 512):
                        yield DecodeTiles(warps, splits, alone, loads)


def decode_attention(kernel: DecodeAttention, tiles: DecodeTiles, dependent: bool = False) -> tirx.PrimFunc:
    """The function of `DecodeAttention`: a block for each split, head and row, then a merge.

    With `dependent`, its kernels start before the kernel before them has ended.

    Indices count elements and stay below 2**31 (a cache of 64 slots of the largest GPT-2 has 2.1e8 elements); byte
    offsets are computed in 64 bits.
    """
    heads, head_dim, context, rows, dtype = kernel.heads, kernel.head_dim, kernel.context, kernel.rows, kernel.dtype
    # exp(scale * x) = 2**(exponent * x)
    g, exponent = row_groups(kernel.groups), kernel.scale * math.log2(math.e)
    warps, splits, threads = tiles.warps, tiles.splits, tiles.threads
    units = head_dim // UNIT_ELEMENTS
    key_lanes = largest_power(units, _KEY_LANES)
    lane_units, key_groups = units // key_lanes, 32 // key_lanes
    batch = max(1, tiles.loads // lane_units)
    warp_keys = key_groups * batch
    block_keys = warps * warp_keys
    # 32-bit words of two numbers each.
    head_words, unit_words = head_dim // 2, UNIT_ELEMENTS // 2
    # Numbers to merge: the outputs, the maximum and the sum.
    numbers = head_dim + 2
    # Blocks per multiprocessor that registers must leave room for; without this ptxas spills some to fit more blocks.
    needed = max(8 * batch * lane_units + 16 * lane_units + 16, 4 * max(warps, splits) + 32)
    blocks = max(1, REGISTERS // (threads * needed))
    split, by_last = splits > 1, splits > 1 and tiles.last
    # The compiler takes what a second kernel reads for constant.
    dependent = dependent and split == by_last
    arrivals = kernel.rows * heads * (kernel.groups or 0)

    def share(end):
        """Keys per split if the row sees `end` keys: all of them if they are few, else whole passes of a block."""
        part = ((end + (splits - 1)) // splits + (block_keys - 1)) // block_keys * block_keys
        return T.max(part, T.Select(end <= tiles.alone, end, 0))

    attributes = kernel_attributes(dependent)

    @T.prim_func
    def decode_attention(
        q_handle: T.handle,
        cache_handle: T.handle,
        slots_handle: T.handle,
        positions_handle: T.handle,
        o_handle: T.handle,
    ):
        T.func_attr(attributes)
        cache_slots = T.int32()
        q = T.match_buffer(q_handle, (g, rows, heads * head_dim), dtype)
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), dtype)
        slots = T.match_buffer(slots_handle, (g, rows), "int32")
        positions = T.match_buffer(positions_handle, (g, rows), "int32")
        o = T.match_buffer(o_handle, (g, rows, heads * head_dim), dtype)
        q_words = T.decl_buffer((g * rows, heads * head_words), "uint32", data=q.data)
        cache_words = T.decl_buffer((cache_slots, 2, heads, context, head_words), "uint32", data=cache.data)
        row_slots = T.decl_buffer((g * rows,), "int32", data=slots.data)
        row_positions = T.decl_buffer((g * rows,), "int32", data=positions.data)
        o_words = T.decl_buffer((g * rows, heads * head_words), "uint32", data=o.data)
        if split:
            workspace = T.alloc_buffer((g * rows * heads * splits * numbers,), "float32", scope="global")
        if by_last:
            counters = T.alloc_buffer((arrivals,), "uint32", scope="global")
            with T.attr(0, "tirx.device_entry", True):
                block = T.cta_id([-(-arrivals // 32)])
                lane = T.thread_id([32])
                wait_for_earlier_kernel(dependent)
                if block * 32 + lane < arrivals:
                    counters[block * 32 + lane] = T.uint32(0)

        with T.attr(0, "tirx.device_entry", True):
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": blocks})
            piece, head, row = T.cta_id([splits, heads, g * rows])
            warp = T.warp_id([warps])
            lane = T.lane_id([32])
            thread = T.thread_id([threads])
            warp_parts = T.alloc_buffer((warps * numbers,), "float32", scope="shared")
            is_last = T.alloc_buffer((1,), "int32", scope="shared")
            words = T.alloc_local((unit_words,), "uint32")
            keys = T.alloc_local((batch, lane_units, unit_words), "uint32")
            values = T.alloc_local((batch, lane_units, unit_words), "uint32")
            query = T.alloc_local((lane_units, UNIT_ELEMENTS), "float32")
            output = T.alloc_local((lane_units, UNIT_ELEMENTS), "float32")
            scores = T.alloc_local((batch,), "float32")
            part = T.alloc_local((max(warps, splits), 4), "float32")
            result = T.alloc_local((2,), "float32")
            maximum = T.alloc_local((1,), "float32")
            largest = T.alloc_local((1,), "float32")
            total = T.alloc_local((1,), "float32")
            factor = T.alloc_local((1,), "float32")
            word = T.alloc_local((1,), "uint32")
            arrived = T.alloc_local((1,), "uint32")
            merger = T.meta_var(_Merger(kernel, thread, part, result, maximum, total, factor, word))
            # The keys that the row sees, those of each split in whole passes of a block, and those of this split.
            end: T.let[T.int32] = row_positions[row] + 1
            own_keys: T.let[T.int32] = share(end)
            first: T.let[T.int32] = piece * own_keys
            last: T.let[T.int32] = T.min(first + own_keys, end)
            slot: T.let[T.int32] = row_slots[row]
            # Neighbouring groups of lanes take neighbouring keys, and the lanes of a group neighbouring units.
            group: T.let[T.int32] = lane // key_lanes
            first_unit: T.let[T.int32] = lane % key_lanes
            start_next_kernel(dependent)
            wait_for_earlier_kernel(dependent)
            if end <= 0:
                if piece == 0 and thread < head_words:
                    o_words[row, head * head_words + thread] = T.uint32(0)
            elif first < last:
                for j in T.unroll(lane_units):
                    unit = T.meta_var(j * key_lanes + first_unit)
                    load_global(
                        [words[i] for i in range(4)], q_words.ptr_to([row, head * head_words + unit * unit_words])
                    )
                    for i in T.unroll(unit_words):
                        query[j, 2 * i] = low(words[i], dtype) * T.float32(exponent)
                        query[j, 2 * i + 1] = high(words[i], dtype) * T.float32(exponent)
                    for i in T.unroll(UNIT_ELEMENTS):
                        output[j, i] = T.float32(0.0)
                maximum[0] = T.float32(MASKED)
                total[0] = T.float32(0.0)
                warp_first: T.let[T.int32] = first + warp * warp_keys
                for step in range(T.max(last - warp_first + (block_keys - 1), 0) // block_keys):
                    key: T.let[T.int32] = warp_first + step * block_keys + group
                    for u in T.unroll(batch):
                        # Keys past the last one repeat it, with a weight of zero.
                        for j in T.unroll(lane_units):
                            place = T.meta_var(T.min(key + u * key_groups, last - 1))
                            at = T.meta_var((j * key_lanes + first_unit) * unit_words)
                            load_global(
                                [keys[u, j, i] for i in range(4)], cache_words.ptr_to([slot, 0, head, place, at])
                            )
                    for u in T.unroll(batch):
                        for j in T.unroll(lane_units):
                            place = T.meta_var(T.min(key + u * key_groups, last - 1))
                            at = T.meta_var((j * key_lanes + first_unit) * unit_words)
                            load_global(
                                [values[u, j, i] for i in range(4)], cache_words.ptr_to([slot, 1, head, place, at])
                            )
                    for u in T.unroll(batch):
                        scores[u] = T.float32(0.0)
                        for j in T.unroll(lane_units):
                            for i in T.unroll(unit_words):
                                scores[u] = scores[u] + query[j, 2 * i] * low(keys[u, j, i], dtype)
                                scores[u] = scores[u] + query[j, 2 * i + 1] * high(keys[u, j, i], dtype)
                    for i in T.unroll(int(math.log2(key_lanes))):
                        for u in T.unroll(batch):
                            scores[u] = scores[u] + shuffle_xor(scores[u], T.shift_left(1, i))
                    largest[0] = maximum[0]
                    for u in T.unroll(batch):
                        if key + u * key_groups >= last:
                            scores[u] = T.float32(-math.inf)
                        largest[0] = T.max(largest[0], scores[u])
                    exp2(factor[0], maximum[0] - largest[0])
                    maximum[0] = largest[0]
                    total[0] = total[0] * factor[0]
                    for j in T.unroll(lane_units):
                        for i in T.unroll(UNIT_ELEMENTS):
                            output[j, i] = output[j, i] * factor[0]
                    for u in T.unroll(batch):
                        exp2(scores[u], scores[u] - maximum[0])
                        total[0] = total[0] + scores[u]
                        for j in T.unroll(lane_units):
                            for i in T.unroll(unit_words):
                                output[j, 2 * i] = output[j, 2 * i] + scores[u] * low(values[u, j, i], dtype)
                                output[j, 2 * i + 1] = output[j, 2 * i + 1] + scores[u] * high(values[u, j, i], dtype)
                # Merge the groups of a warp; all end up with the same result.
                for i in T.unroll(int(math.log2(key_groups))):
                    lanes = T.meta_var(T.shift_left(key_lanes, i))
                    largest[0] = T.max(maximum[0], shuffle_xor(maximum[0], lanes))
                    exp2(factor[0], maximum[0] - largest[0])
                    maximum[0] = largest[0]
                    total[0] = total[0] * factor[0]
                    total[0] = total[0] + shuffle_xor(total[0], lanes)
                    for j in T.unroll(lane_units):
                        for d in T.unroll(UNIT_ELEMENTS):
                            output[j, d] = output[j, d] * factor[0]
                            output[j, d] = output[j, d] + shuffle_xor(output[j, d], lanes)
                if group == 0:
                    for j in T.unroll(lane_units):
                        for d in T.unroll(UNIT_ELEMENTS):
                            warp_parts[warp * numbers + (j * key_lanes + first_unit) * UNIT_ELEMENTS + d] = output[j, d]
                    if lane == 0:
                        warp_parts[warp * numbers + head_dim] = maximum[0]
                        warp_parts[warp * numbers + head_dim + 1] = total[0]
                T.cuda.cta_sync()
                if thread < head_words:
                    merger.gather(warp_parts, 0, warps, warps)
                if split:
                    used: T.let[T.int32] = (end + (own_keys - 1)) // own_keys
                    parts_at: T.let[T.int32] = (row * heads + head) * (splits * numbers)
                    if used == 1 and by_last:
                        if thread < head_words:
                            merger.store(o_words, row, head)
                    else:
                        if thread < head_words:
                            for j in T.unroll(2):
                                workspace[parts_at + piece * numbers + 2 * thread + j] = result[j]
                        if thread == 0:
                            workspace[parts_at + piece * numbers + head_dim] = maximum[0]
                            workspace[parts_at + piece * numbers + head_dim + 1] = total[0]
                        if by_last:
                            T.cuda.cta_sync()
                            if thread == 0:
                                arrive(arrived[0], counters.ptr_to([row * heads + head]), used)
                                is_last[0] = T.Select(arrived[0] == T.Cast("uint32", used - 1), 1, 0)
                            T.cuda.cta_sync()
                            if is_last[0] == 1 and thread < head_words:
                                merger.gather(workspace, parts_at, splits, used)
                                merger.store(o_words, row, head)
                elif thread < head_words:
                    merger.store(o_words, row, head)
        if split and not by_last:
            with T.attr(0, "tirx.device_entry", True):
                head, row = T.cta_id([heads, g * rows])
                thread = T.thread_id([-(-head_words // 32) * 32])
                part = T.alloc_local((splits, 4), "float32")
                result = T.alloc_local((2,), "float32")
                maximum = T.alloc_local((1,), "float32")
                total = T.alloc_local((1,), "float32")
                factor = T.alloc_local((1,), "float32")
                word = T.alloc_local((1,), "uint32")
                merger = T.meta_var(_Merger(kernel, thread, part, result, maximum, total, factor, word))
                end: T.let[T.int32] = row_positions[row] + 1
                if end > 0 and thread < head_words:
                    merger.gather(
                        workspace,
                        (row * heads + head) * (splits * numbers),
                        splits,
                        (end + share(end) - 1) // share(end),
                    )
                    merger.store(o_words, row, head)

    return decode_attention.with_attr(ZEROED, "counters") if by_last else decode_attention


@dataclass(frozen=True)
class _Merger:
    """Merges partial outputs of a row and head: thread t, one of the first D / 2, has numbers 2 t and 2 t + 1.

    Attributes:
        kernel: the kernel.
        thread: t.
        part: (parts, 4) float32: two numbers of the output, the maximum and the sum of each part.
        result: (2,) float32: the merged numbers of the output.
        maximum: (1,) float32: the maximum of all parts.
        total: (1,) float32: the sum of all parts.
        factor: (1,) float32, scratch.
        word: (1,) uint32, scratch.
    """

    kernel: DecodeAttention
    thread: tirx.Expr
    part: tirx.Buffer
    result: tirx.Buffer
    maximum: tirx.Buffer
    total: tirx.Buffer
    factor: tirx.Buffer
    word: tirx.Buffer

    @T.inline
    def gather(self, parts, first, most, count):
        """Merges `count` consecutive parts, at most `most`, from `first` on; all loads are in flight at once."""
        for i in T.unroll(most):
            at = T.meta_var(first + i * (self.kernel.head_dim + 2))
            for j in T.unroll(4):
                self.part[i, j] = T.Select(j == 2, T.float32(MASKED), T.float32(0.0))
            if i < count:
                for j in T.vectorized(2):
                    self.part[i, j] = parts[at + 2 * self.thread + j]
                for j in T.vectorized(2):
                    self.part[i, 2 + j] = parts[at + self.kernel.head_dim + j]
        self.maximum[0] = self.part[0, 2]
        for i in T.unroll(most):
            self.maximum[0] = T.max(self.maximum[0], self.part[i, 2])
        self.total[0] = T.float32(0.0)
        for j in T.unroll(2):
            self.result[j] = T.float32(0.0)
        for i in T.unroll(most):
            exp2(self.factor[0], self.part[i, 2] - self.maximum[0])
            self.total[0] = self.total[0] + self.part[i, 3] * self.factor[0]
            for j in T.unroll(2):
                self.result[j] = self.result[j] + self.part[i, j] * self.factor[0]

    @T.inline
    def store(self, o_words, row, head):
        """Writes the output."""
        reciprocal(self.factor[0], self.total[0])
        pack(self.word[0], self.result[0] * self.factor[0], self.result[1] * self.factor[0], self.kernel.dtype)
        o_words[row, head * (self.kernel.head_dim // 2) + self.thread] = self.word[0]


def low(word: tirx.Expr, dtype: str) -> tirx.Expr:
    """The first of two numbers in a word, as float32."""
    if dtype == "bfloat16":
        return T.reinterpret("float32", T.shift_left(word, T.uint32(16)))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", T.bitwise_and(word, T.uint32(0xFFFF)))))


def high(word: tirx.Expr, dtype: str) -> tirx.Expr:
    """The second of two numbers in a word, as float32."""
    if dtype == "bfloat16":
        return T.reinterpret("float32", T.bitwise_and(word, T.uint32(0xFFFF0000)))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", T.shift_right(word, T.uint32(16)))))


def _decode_attention(kernel: DecodeAttention, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    check_head(kernel)
    tiles = choose_tiles(choose, default_decode_tiles(kernel), decode_candidates(kernel))
    return decode_attention(kernel, tiles, target.has_dependent_launch)


TEMPLATE = Template("cuda.decode_attention", 1, ("decode_attention",), _decode_attention, TENSOR_CORE_DTYPES)
