"""Sums of exponentials and largest logits on GPUs."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.base import row_groups
from tvm_attn.kernels.gpu.threads import PARTIALS
from tvm_attn.kernels.logprobs import ExpSums, TopLogits
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import GpuTarget

_LAST = 2**31 - 1


def exp_sums(kernel: ExpSums, threads: int) -> tirx.PrimFunc:
    """The function of `ExpSums`, a block per row.

    Args:
        kernel: the sizes.
        threads: threads per block, a multiple of 16.
    """
    vocabulary, columns, n = kernel.vocabulary, kernel.columns, row_groups(None)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def exp_sums(logits_handle: T.handle, ids_handle: T.handle, distances_handle: T.handle, totals_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        logits = T.match_buffer(logits_handle, (n, columns), "float32")
        token_ids = T.match_buffer(ids_handle, (n,), "int32")
        distances = T.match_buffer(distances_handle, (n,), "float32")
        totals = T.match_buffer(totals_handle, (n,), "float32")
        for row in T.thread_binding(n, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("row"):
                    vr, t = T.axis.remap("SS", [row, thread])
                    T.reads(logits[vr, 0:columns], token_ids[vr])
                    T.writes(distances[vr], totals[vr])
                    all_best = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    all_nan = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                    all_sums = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    some_best = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                    some_nan = T.sblock_alloc_buffer((PARTIALS,), "int32", scope="shared")
                    some_sums = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                    best = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    nan = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    best[0] = T.float32(-math.inf)
                    nan[0] = 0
                    for step in range(-(-vocabulary // threads)):
                        if step * threads + t < vocabulary:
                            value: T.let[T.float32] = logits[vr, step * threads + t]
                            nan[0] = T.Select(tirx.isnan(value), 1, nan[0])
                            best[0] = T.Select(value > best[0], value, best[0])
                    all_best[t] = best[0]
                    all_nan[t] = nan[0]
                    if t < PARTIALS:
                        for j in range(threads // PARTIALS):
                            best[0] = T.max(best[0], all_best[j * PARTIALS + t])
                            nan[0] = T.max(nan[0], all_nan[j * PARTIALS + t])
                        some_best[t] = best[0]
                        some_nan[t] = nan[0]
                    for j in range(PARTIALS):
                        best[0] = T.max(best[0], some_best[j])
                        nan[0] = T.max(nan[0], some_nan[j])
                    total[0] = T.float32(0)
                    for step in range(-(-vocabulary // threads)):
                        if step * threads + t < vocabulary:
                            total[0] = total[0] + exp(logits[vr, step * threads + t] - best[0])
                    all_sums[t] = total[0]
                    if t < PARTIALS:
                        total[0] = T.float32(0)
                        for j in range(threads // PARTIALS):
                            total[0] = total[0] + all_sums[j * PARTIALS + t]
                        some_sums[t] = total[0]
                    if t == 0:
                        total[0] = T.float32(0)
                        for j in range(PARTIALS):
                            total[0] = total[0] + some_sums[j]
                        bad: T.let[T.bool] = tirx.any(nan[0] != 0, T.abs(best[0]) == T.float32(math.inf))
                        token: T.let[T.int32] = token_ids[vr]
                        totals[vr] = T.Select(bad, T.float32(-1), total[0])
                        distances[vr] = T.float32(0)
                        if tirx.all(tirx.Not(bad), token >= 0, token < vocabulary):
                            distances[vr] = logits[vr, token] - best[0]

    return exp_sums


def top_logits(kernel: TopLogits, threads: int, chunk: int) -> tirx.PrimFunc:
    """The function of `TopLogits` in two stages: the largest of each chunk of columns, then those of a row's chunks.

    Each stage finds one after the other: the largest of those that come after the one before.

    Args:
        kernel: the sizes.
        threads: threads per block, a multiple of 16.
        chunk: columns per block, a multiple of `threads`.
    """
    vocabulary, columns, count, n = kernel.vocabulary, kernel.columns, kernel.count, row_groups(None)
    chunks = -(-vocabulary // chunk)
    candidates = chunks * count

    @T.inline
    def keep(best, best_index, value, index):
        """Replaces the best so far, in a register, if a candidate is larger, or as large with a lower index."""
        wins: T.let[T.bool] = tirx.any(value > best[0], tirx.all(value == best[0], index < best_index[0]))
        best_index[0] = T.Select(wins, index, best_index[0])
        best[0] = T.Select(wins, value, best[0])

    @T.inline
    def keep_next(best, best_index, value, index, last, last_index):
        """As `keep`, for a candidate that comes after the last one found."""
        follows: T.let[T.bool] = tirx.all(
            value > T.float32(-math.inf), tirx.any(value < last[0], tirx.all(value == last[0], index > last_index[0]))
        )
        keep(best, best_index, T.Select(follows, value, T.float32(-math.inf)), T.Select(follows, index, _LAST))

    @T.inline
    def reduce_block(t, best, best_index, all_best, all_index, some_best, some_index, last, last_index):
        """Leaves the best candidate of all threads in `last`, for every thread."""
        all_best[t] = best[0]
        all_index[t] = best_index[0]
        if t < PARTIALS:
            for j in range(threads // PARTIALS):
                keep(best, best_index, all_best[j * PARTIALS + t], all_index[j * PARTIALS + t])
            some_best[t] = best[0]
            some_index[t] = best_index[0]
        for j in range(PARTIALS):
            keep(best, best_index, some_best[j], some_index[j])
        last[0] = best[0]
        last_index[0] = best_index[0]

    @T.prim_func(s_tir=True, check_well_formed=False)
    def top_logits(logits_handle: T.handle, ids_handle: T.handle, values_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        logits = T.match_buffer(logits_handle, (n, columns), "float32")
        ids = T.match_buffer(ids_handle, (n, count), "int32")
        values = T.match_buffer(values_handle, (n, count), "float32")
        chunk_values = T.sblock_alloc_buffer((n, candidates), "float32")
        chunk_ids = T.sblock_alloc_buffer((n, candidates), "int32")
        for row in T.thread_binding(n, thread="blockIdx.y"):
            for block in T.thread_binding(chunks, thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("chunk"):
                        vr, vk, t = T.axis.remap("SSS", [row, block, thread])
                        T.reads(logits[vr, 0:columns])
                        T.writes(chunk_values[vr, 0:candidates], chunk_ids[vr, 0:candidates])
                        columns_of_chunk = T.sblock_alloc_buffer((chunk,), "float32", scope="shared")
                        all_best = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                        all_index = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                        some_best = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                        some_index = T.sblock_alloc_buffer((PARTIALS,), "int32", scope="shared")
                        best = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        best_index = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        last = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        last_index = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        for step in range(chunk // threads):
                            column: T.let[T.int32] = vk * chunk + step * threads + t
                            columns_of_chunk[step * threads + t] = T.if_then_else(
                                column < vocabulary, logits[vr, column], T.float32(-math.inf)
                            )
                        last[0] = T.float32(math.inf)
                        last_index[0] = -1
                        for k in range(count):
                            best[0] = T.float32(-math.inf)
                            best_index[0] = _LAST
                            for step in range(chunk // threads):
                                keep_next(
                                    best,
                                    best_index,
                                    columns_of_chunk[step * threads + t],
                                    vk * chunk + step * threads + t,
                                    last,
                                    last_index,
                                )
                            reduce_block(
                                t, best, best_index, all_best, all_index, some_best, some_index, last, last_index
                            )
                            if t == 0:
                                chunk_values[vr, vk * count + k] = last[0]
                                chunk_ids[vr, vk * count + k] = last_index[0]
        for row in T.thread_binding(n, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("row"):
                    vr, t = T.axis.remap("SS", [row, thread])
                    T.reads(chunk_values[vr, 0:candidates], chunk_ids[vr, 0:candidates])
                    T.writes(ids[vr, 0:count], values[vr, 0:count])
                    all_best = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    all_index = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                    some_best = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                    some_index = T.sblock_alloc_buffer((PARTIALS,), "int32", scope="shared")
                    best = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    best_index = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    last = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    last_index = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    last[0] = T.float32(math.inf)
                    last_index[0] = -1
                    for k in range(count):
                        best[0] = T.float32(-math.inf)
                        best_index[0] = _LAST
                        for step in range(-(-candidates // threads)):
                            if step * threads + t < candidates:
                                keep_next(
                                    best,
                                    best_index,
                                    chunk_values[vr, step * threads + t],
                                    chunk_ids[vr, step * threads + t],
                                    last,
                                    last_index,
                                )
                        reduce_block(t, best, best_index, all_best, all_index, some_best, some_index, last, last_index)
                        if t == 0:
                            is_found: T.let[T.bool] = last_index[0] != _LAST
                            ids[vr, k] = T.Select(is_found, last_index[0], -1)
                            values[vr, k] = T.Select(is_found, last[0], T.float32(0))

    return top_logits


def _exp_sums(kernel: ExpSums, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    return exp_sums(kernel, target.max_threads)


def _top_logits(kernel: TopLogits, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    return top_logits(kernel, threads, choose("chunk", (512, 1024, 2048), 2048))


TEMPLATES = (
    Template("gpu.exp_sums", 1, ("exp_sums",), _exp_sums),
    Template("gpu.top_logits", 1, ("top_logits",), _top_logits),
)
