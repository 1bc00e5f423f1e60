"""Sums of exponentials and largest logits on processors: each row by one thread, in vectors."""

from __future__ import annotations

import math

from tvm import s_tir, tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.base import largest_power, row_groups
from tvm_attn.kernels.logprobs import ExpSums, TopLogits
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CpuTarget

_STEPS = 8  # vectors of a chunk whose maximum says whether it can hold one of the largest


def exp_sums(kernel: ExpSums, lanes: int) -> tirx.PrimFunc:
    """Blocks "row", with "init", "lane_max" and "lane_sum" inside, which are vectorised.

    Args:
        kernel: the sizes.
        lanes: number of lanes, a divisor of N; lane l looks at columns l, l + `lanes`, ...
    """
    vocabulary, columns, n = kernel.vocabulary, kernel.columns, row_groups(None)

    @T.prim_func(s_tir=True)
    def exp_sums(logits_handle: T.handle, ids_handle: T.handle, distances_handle: T.handle, totals_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        logits = T.match_buffer(logits_handle, (n, columns), "float32")
        token_ids = T.match_buffer(ids_handle, (n,), "int32")
        distances = T.match_buffer(distances_handle, (n,), "float32")
        totals = T.match_buffer(totals_handle, (n,), "float32")
        for row in range(n):
            with T.sblock("row"):
                vr = T.axis.spatial(n, row)
                T.reads(logits[vr, 0:columns], token_ids[vr])
                T.writes(distances[vr], totals[vr])
                best = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                total = T.sblock_alloc_buffer((lanes,), "float64", scope="local")
                nan = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                for lane in range(lanes):
                    with T.sblock("init"):
                        vl = T.axis.spatial(lanes, lane)
                        best[vl] = T.float32(-math.inf)
                        total[vl] = T.float64(0)
                        nan[vl] = 0
                for step, lane in T.grid(columns // lanes, lanes):
                    with T.sblock("lane_max"):
                        vs, vl = T.axis.remap("RS", [step, lane])
                        column = T.meta_var(vs * lanes + vl)
                        nan[vl] = T.Select(tirx.all(column < vocabulary, tirx.isnan(logits[vr, column])), 1, nan[vl])
                        best[vl] = T.Select(
                            tirx.all(column < vocabulary, logits[vr, column] > best[vl]), logits[vr, column], best[vl]
                        )
                for lane in range(1, lanes):
                    with T.sblock("merge"):
                        vl = T.axis.opaque(lanes, lane)
                        best[0] = T.max(best[0], best[vl])
                        nan[0] = T.max(nan[0], nan[vl])
                for step, lane in T.grid(columns // lanes, lanes):
                    with T.sblock("lane_sum"):
                        vs, vl = T.axis.remap("RS", [step, lane])
                        column = T.meta_var(vs * lanes + vl)
                        total[vl] = total[vl] + T.Cast(
                            "float64",
                            T.Select(column < vocabulary, exp(logits[vr, column] - best[0]), T.float32(0)),
                        )
                for lane in range(1, lanes):
                    with T.sblock("merge_sums"):
                        vl = T.axis.opaque(lanes, lane)
                        total[0] = total[0] + total[vl]
                bad = T.meta_var(tirx.any(nan[0] != 0, T.abs(best[0]) == T.float32(math.inf)))
                token = T.meta_var(token_ids[vr])
                totals[vr] = T.Select(bad, T.float32(-1), T.Cast("float32", total[0]))
                distances[vr] = T.float32(0)
                if tirx.all(tirx.Not(bad), token >= 0, token < vocabulary):
                    distances[vr] = logits[vr, token] - best[0]

    return exp_sums


def top_logits(kernel: TopLogits, lanes: int) -> tirx.PrimFunc:
    """Blocks "row", with "init" and "lane_max" inside, which are vectorised.

    A chunk is looked at value by value only if its maximum is among the largest so far: by far most are not.
    """
    vocabulary, columns, count, n = kernel.vocabulary, kernel.columns, kernel.count, row_groups(None)
    chunk = largest_power(columns, lanes * _STEPS)

    @T.prim_func(s_tir=True)
    def top_logits(logits_handle: T.handle, ids_handle: T.handle, values_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        logits = T.match_buffer(logits_handle, (n, columns), "float32")
        ids = T.match_buffer(ids_handle, (n, count), "int32")
        values = T.match_buffer(values_handle, (n, count), "float32")
        for row in range(n):
            with T.sblock("row"):
                vr = T.axis.spatial(n, row)
                T.reads(logits[vr, 0:columns])
                T.writes(ids[vr, 0:count], values[vr, 0:count])
                best = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                for k in range(count):
                    ids[vr, k] = -1
                    values[vr, k] = T.float32(-math.inf)
                for block in range(columns // chunk):
                    for lane in range(lanes):
                        with T.sblock("init"):
                            vl = T.axis.spatial(lanes, lane)
                            best[vl] = T.float32(-math.inf)
                    for step, lane in T.grid(chunk // lanes, lanes):
                        with T.sblock("lane_max"):
                            vb = T.axis.opaque(columns // chunk, block)
                            vs, vl = T.axis.remap("RS", [step, lane])
                            column = T.meta_var(vb * chunk + vs * lanes + vl)
                            best[vl] = T.Select(
                                tirx.all(column < vocabulary, logits[vr, column] > best[vl]),
                                logits[vr, column],
                                best[vl],
                            )
                    for lane in range(1, lanes):
                        with T.sblock("merge"):
                            vl = T.axis.opaque(lanes, lane)
                            best[0] = T.max(best[0], best[vl])
                    if best[0] > values[vr, count - 1]:
                        for i in range(chunk):
                            column = T.meta_var(block * chunk + i)
                            if tirx.all(column < vocabulary, logits[vr, column] > values[vr, count - 1]):
                                for j in range(count - 1):
                                    # From the last place to the first: what is smaller moves down by one place.
                                    place = T.meta_var(count - 1 - j)
                                    if values[vr, place - 1] < logits[vr, column]:
                                        values[vr, place] = values[vr, place - 1]
                                        ids[vr, place] = ids[vr, place - 1]
                                    elif values[vr, place] < logits[vr, column]:
                                        values[vr, place] = logits[vr, column]
                                        ids[vr, place] = column
                                if values[vr, 0] < logits[vr, column]:
                                    values[vr, 0] = logits[vr, column]
                                    ids[vr, 0] = column
                for k in range(count):
                    values[vr, k] = T.Select(ids[vr, k] < 0, T.float32(0), values[vr, k])

    return top_logits


def _rows(function: tirx.PrimFunc, vectors: tuple[str, ...]) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(function, enable_check=False)
    schedule.parallel(schedule.get_loops(schedule.get_sblock("row"))[0])
    for name in vectors:
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    return schedule.mod["main"]


def _exp_sums(kernel: ExpSums, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    lanes = largest_power(kernel.columns, target.lanes)
    return _rows(exp_sums(kernel, lanes), ("init", "lane_max", "lane_sum"))


def _top_logits(kernel: TopLogits, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    return _rows(top_logits(kernel, largest_power(kernel.columns, target.lanes)), ("init", "lane_max"))


TEMPLATES = (
    Template("cpu.exp_sums", 1, ("exp_sums",), _exp_sums),
    Template("cpu.top_logits", 1, ("top_logits",), _top_logits),
)
