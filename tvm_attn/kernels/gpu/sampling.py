"""Greedy sampling on GPUs."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import row_groups
from tvm_attn.kernels.gpu.threads import PARTIALS
from tvm_attn.kernels.sampling import Argmax
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import GpuTarget


def _better(value: tirx.Expr, index: tirx.Expr, best: tirx.Expr, best_index: tirx.Expr) -> tirx.Expr:
    """Whether a candidate beats the best so far: NaN beats everything, then the larger value, then the lower index."""
    first = index < best_index
    return tirx.any(
        tirx.all(tirx.isnan(value), tirx.any(tirx.Not(tirx.isnan(best)), first)),
        tirx.all(tirx.Not(tirx.isnan(best)), tirx.any(value > best, tirx.all(value == best, first))),
    )


def argmax(kernel: Argmax, threads: int, chunk: int) -> tirx.PrimFunc:
    """The function of `Argmax` in two stages: the best of each chunk of columns, then the best of a row's chunks.

    Args:
        kernel: the sizes.
        threads: threads per block, a multiple of 16.
        chunk: columns per block.
    """
    vocabulary, columns, rows, g = kernel.vocabulary, kernel.columns, kernel.rows, row_groups(kernel.groups)
    chunks = -(-vocabulary // chunk)
    last = 2**31 - 1

    @T.inline
    def keep(best, best_index, value, index):
        """Replaces the best so far, in a register, if a candidate is better."""
        wins: T.let[T.bool] = _better(value, index, best[0], best_index[0])
        best_index[0] = T.Select(wins, index, best_index[0])
        best[0] = T.Select(wins, value, best[0])

    @T.inline
    def reduce_block(t, best, best_index, all_best, all_index, some_best, some_index):
        """Leaves the best candidate of all threads in the registers of thread 0."""
        all_best[t] = best[0]
        all_index[t] = best_index[0]
        if t < PARTIALS:
            for j in range(threads // PARTIALS):
                keep(best, best_index, all_best[j * PARTIALS + t], all_index[j * PARTIALS + t])
            some_best[t] = best[0]
            some_index[t] = best_index[0]
        if t == 0:
            for j in range(PARTIALS):
                keep(best, best_index, some_best[j], some_index[j])

    @T.prim_func(s_tir=True, check_well_formed=False)
    def argmax(logits_handle: T.handle, token_ids_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        logits = T.match_buffer(logits_handle, (g, rows, columns), "float32")
        token_ids = T.match_buffer(token_ids_handle, (g, rows), "int32")
        chunk_best = T.sblock_alloc_buffer((g, rows, chunks), "float32")
        chunk_index = T.sblock_alloc_buffer((g, rows, chunks), "int32")
        for group_row in T.thread_binding(g * rows, thread="blockIdx.y"):
            for block in T.thread_binding(chunks, thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("chunk"):
                        vg = T.axis.spatial(g, group_row // rows)
                        vr = T.axis.spatial(rows, group_row % rows)
                        vk, t = T.axis.remap("SS", [block, thread])
                        T.reads(logits[vg, vr, 0:columns])
                        T.writes(chunk_best[vg, vr, vk], chunk_index[vg, vr, vk])
                        all_best = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                        all_index = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                        some_best = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                        some_index = T.sblock_alloc_buffer((PARTIALS,), "int32", scope="shared")
                        best = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        best_index = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        best[0] = T.float32(-math.inf)
                        best_index[0] = last
                        for step in range(-(-chunk // threads)):
                            column: T.let[T.int32] = vk * chunk + step * threads + t
                            if step * threads + t < chunk and column < vocabulary:
                                keep(best, best_index, logits[vg, vr, column], column)
                        reduce_block(t, best, best_index, all_best, all_index, some_best, some_index)
                        if t == 0:
                            chunk_best[vg, vr, vk] = best[0]
                            chunk_index[vg, vr, vk] = best_index[0]
        for group_row in T.thread_binding(g * rows, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("row"):
                    vg = T.axis.spatial(g, group_row // rows)
                    vr = T.axis.spatial(rows, group_row % rows)
                    t = T.axis.spatial(threads, thread)
                    T.reads(chunk_best[vg, vr, 0:chunks], chunk_index[vg, vr, 0:chunks])
                    T.writes(token_ids[vg, vr])
                    all_best = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    all_index = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                    some_best = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                    some_index = T.sblock_alloc_buffer((PARTIALS,), "int32", scope="shared")
                    best = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    best_index = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    best[0] = T.float32(-math.inf)
                    best_index[0] = last
                    for step in range(-(-chunks // threads)):
                        if step * threads + t < chunks:
                            keep(
                                best,
                                best_index,
                                chunk_best[vg, vr, step * threads + t],
                                chunk_index[vg, vr, step * threads + t],
                            )
                    reduce_block(t, best, best_index, all_best, all_index, some_best, some_index)
                    if t == 0:
                        token_ids[vg, vr] = T.Select(tirx.isnan(best[0]), -1, best_index[0])

    return argmax


def _argmax(kernel: Argmax, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    return argmax(kernel, threads, choose("chunk", (512, 1024, 2048, 4096), 2048))


TEMPLATE = Template("gpu.argmax", 1, ("argmax",), _argmax)
