"""Attention weights on processors: a row of a head by one thread."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.attention_weights import AttentionWeights
from tvm_attn.kernels.base import largest_power, row_groups
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.cache import CacheRows
from tvm_attn.targets import CpuTarget


def attention_weights(kernel: AttentionWeights, lanes: int) -> tirx.PrimFunc:
    """Block "row", with "products" inside, which is vectorised over `lanes` dimensions, a divisor of a `run`."""
    heads, head_dim, context, rows = kernel.heads, kernel.head_dim, kernel.context, kernel.rows
    stored = CacheRows(kernel)
    width, scale, g = heads * head_dim, kernel.scale, row_groups(None)

    @T.prim_func(s_tir=True)
    def attention_weights(q_handle: T.handle, cache_handle: T.handle, slot_handle: T.handle, weights_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        cache_slots = T.int32()
        q = T.match_buffer(q_handle, (g, rows, width), kernel.activations)
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, stored.width), stored.dtype)
        slot = T.match_buffer(slot_handle, (1,), "int32")
        weights = T.match_buffer(weights_handle, (heads, g * rows, g * rows), "float32")
        for head, row in T.grid(heads, g * rows):
            with T.sblock("row"):
                vh, vr = T.axis.remap("SS", [head, row])
                T.reads(q[0:g, 0:rows, 0:width], cache[0:cache_slots, 0:2, vh, 0:context, 0 : stored.width], slot[0])
                T.writes(weights[vh, vr, 0 : g * rows])
                partial = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                query = T.sblock_alloc_buffer((head_dim,), "float32", scope="local")
                maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                maximum[0] = T.float32(MASKED)
                total[0] = T.float32(0)
                for d in range(head_dim):
                    query[d] = T.Cast("float32", q[vr // rows, vr % rows, vh * head_dim + d]) * T.float32(scale)
                for key in range(vr + 1):
                    # Rows past the context's end are padding.
                    position: T.let[T.int32] = T.min(key, context - 1)
                    for plane, d, lane in T.grid(stored.planes, stored.run // lanes, lanes):
                        with T.sblock("products"):
                            vp, vd, vl = T.axis.remap("RRS", [plane, d, lane])
                            with T.init():
                                partial[vl] = T.float32(0)
                            partial[vl] = partial[vl] + query[vp * stored.run + vd * lanes + vl] * stored.value(
                                cache[slot[0], 0, vh, position, vd * lanes + vl], vp
                            )
                    for lane in range(1, lanes):
                        partial[0] = partial[0] + partial[lane]
                    partial[0] = stored.scaled(partial[0], cache, slot[0], 0, vh, position)
                    weights[vh, vr, key] = partial[0]
                    maximum[0] = T.max(maximum[0], partial[0])
                for key in range(vr + 1):
                    weights[vh, vr, key] = exp(weights[vh, vr, key] - maximum[0])
                    total[0] = total[0] + weights[vh, vr, key]
                for key in range(vr + 1):
                    weights[vh, vr, key] = weights[vh, vr, key] / total[0]
                for key in range(g * rows - (vr + 1)):
                    weights[vh, vr, vr + 1 + key] = T.float32(0)

    return attention_weights


def _attention_weights(kernel: AttentionWeights, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    lanes = largest_power(CacheRows(kernel).run, target.lanes)
    schedule = s_tir.Schedule(attention_weights(kernel, lanes), enable_check=False)
    schedule.parallel(schedule.fuse(*schedule.get_loops(schedule.get_sblock("row"))))
    products = schedule.get_sblock("products")
    plane, _, lane = schedule.get_loops(products)[-3:]
    schedule.vectorize(lane)
    init = schedule.decompose_reduction(products, plane)
    schedule.vectorize(schedule.get_loops(init)[-1])
    return schedule.mod["main"]


TEMPLATE = Template("cpu.attention_weights", 1, ("attention_weights",), _attention_weights)
