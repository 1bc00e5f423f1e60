"""Attention weights on GPUs: a row of a head by one block of threads."""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.attention_weights import AttentionWeights
from tvm_attn.kernels.base import TENSOR_CORE_DTYPES, row_groups
from tvm_attn.kernels.gpu.threads import PARTIALS
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.cache import CacheRows
from tvm_attn.targets import GpuTarget


def attention_weights(kernel: AttentionWeights, threads: int) -> tirx.PrimFunc:
    """The function of `AttentionWeights`. TVM inserts the barriers that shared memory needs.

    Args:
        kernel: the sizes.
        threads: threads per block, a multiple of 16.
    """
    heads, head_dim, context, rows = kernel.heads, kernel.head_dim, kernel.context, kernel.rows
    stored = CacheRows(kernel)
    width, scale, g = heads * head_dim, kernel.scale, row_groups(None)
    # Every thread takes part in every step, because of the barriers; steps past the row do nothing.
    steps = -(-context // threads)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention_weights(q_handle: T.handle, cache_handle: T.handle, slot_handle: T.handle, weights_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        cache_slots = T.int32()
        q = T.match_buffer(q_handle, (g, rows, width), kernel.activations)
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, stored.width), stored.dtype)
        slot = T.match_buffer(slot_handle, (1,), "int32")
        weights = T.match_buffer(weights_handle, (heads, g * rows, g * rows), "float32")
        for head in T.thread_binding(heads, thread="blockIdx.y"):
            for row in T.thread_binding(g * rows, thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("row"):
                        vh, vr, t = T.axis.remap("SSS", [head, row, thread])
                        T.reads(
                            q[0:g, 0:rows, 0:width], cache[0:cache_slots, 0:2, vh, 0:context, 0 : stored.width], slot[0]
                        )
                        T.writes(weights[vh, vr, 0 : g * rows])
                        all_numbers = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                        some_numbers = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                        scores = T.sblock_alloc_buffer((steps,), "float32", scope="local")
                        best = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        best[0] = T.float32(MASKED)
                        for step in range(steps):
                            scores[step] = T.float32(MASKED)
                            if step * threads + t < T.min(vr + 1, context):
                                total[0] = T.float32(0)
                                for d in range(head_dim):
                                    total[0] = total[0] + T.Cast(
                                        "float32", q[vr // rows, vr % rows, vh * head_dim + d]
                                    ) * stored.at(cache, (slot[0], 0, vh, step * threads + t), d)
                                scores[step] = stored.scaled(
                                    total[0] * T.float32(scale), cache, slot[0], 0, vh, step * threads + t
                                )
                            best[0] = T.max(best[0], scores[step])
                        all_numbers[t] = best[0]
                        if t < PARTIALS:
                            for j in range(threads // PARTIALS):
                                best[0] = T.max(best[0], all_numbers[j * PARTIALS + t])
                            some_numbers[t] = best[0]
                        for j in range(PARTIALS):
                            best[0] = T.max(best[0], some_numbers[j])
                        total[0] = T.float32(0)
                        for step in range(steps):
                            scores[step] = T.Select(
                                step * threads + t < T.min(vr + 1, context), exp(scores[step] - best[0]), T.float32(0)
                            )
                            total[0] = total[0] + scores[step]
                        all_numbers[t] = total[0]
                        if t < PARTIALS:
                            total[0] = T.float32(0)
                            for j in range(threads // PARTIALS):
                                total[0] = total[0] + all_numbers[j * PARTIALS + t]
                            some_numbers[t] = total[0]
                        total[0] = T.float32(0)
                        for j in range(PARTIALS):
                            total[0] = total[0] + some_numbers[j]
                        for step in range(steps):
                            if step * threads + t < g * rows:
                                weights[vh, vr, step * threads + t] = scores[step] / total[0]
                        # Padding of the last group can reach past the context.
                        if context + t < g * rows:
                            weights[vh, vr, context + t] = T.float32(0)

    return attention_weights


def _attention_weights(kernel: AttentionWeights, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    return attention_weights(kernel, choose("threads", (32, 64, 128, 256), min(128, target.max_threads)))


TEMPLATE = Template("gpu.attention_weights", 1, ("attention_weights",), _attention_weights)
CUDA_TEMPLATE = replace(TEMPLATE, name="cuda.attention_weights", activations=TENSOR_CORE_DTYPES)
"""For queries of models that use tensor cores; this kernel does not."""
