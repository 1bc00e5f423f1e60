"""Greedy sampling on processors: every lane keeps the maximum of its columns and its index."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import largest_power, row_groups
from tvm_attn.kernels.cpu.vector import is_one_row
from tvm_attn.kernels.sampling import Argmax
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CpuTarget


def argmax(kernel: Argmax, lanes: int) -> tirx.PrimFunc:
    """Blocks "row", with "lane_max", "lane_index" and "merge" inside; the lanes are merged at the end.

    Args:
        kernel: the sizes.
        lanes: number of lanes, a divisor of N; lane l looks at columns l, l + `lanes`, ...
    """
    vocabulary, columns, rows = kernel.vocabulary, kernel.columns, kernel.rows
    g = row_groups(kernel.groups)

    @T.prim_func(s_tir=True)
    def argmax(logits_handle: T.handle, token_ids_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        logits = T.match_buffer(logits_handle, (g, rows, columns), "float32")
        token_ids = T.match_buffer(token_ids_handle, (g, rows), "int32")
        for group, row in T.grid(g, rows):
            with T.sblock("row"):
                vg, vr = T.axis.remap("SS", [group, row])
                T.reads(logits[vg, vr, 0:columns])
                T.writes(token_ids[vg, vr])
                best = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                index = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                for lane in range(lanes):
                    with T.sblock("init"):
                        vl = T.axis.spatial(lanes, lane)
                        best[vl] = T.Select(vl < vocabulary, logits[vg, vr, vl], T.min_value("float32"))
                        index[vl] = vl
                for step, lane in T.grid(columns // lanes, lanes):
                    with T.sblock("lane_max"):
                        vs, vl = T.axis.remap("RS", [step, lane])
                        # Strictly greater, so the first of equal values stays. A NaN, once seen, stays.
                        better = T.meta_var(
                            tirx.all(
                                vs * lanes + vl < vocabulary,
                                tirx.Not(tirx.isnan(best[vl])),
                                tirx.any(
                                    logits[vg, vr, vs * lanes + vl] > best[vl],
                                    tirx.isnan(logits[vg, vr, vs * lanes + vl]),
                                ),
                            )
                        )
                        index[vl] = T.Select(better, vs * lanes + vl, index[vl])
                        best[vl] = T.Select(better, logits[vg, vr, vs * lanes + vl], best[vl])
                for lane in range(1, lanes):
                    with T.sblock("merge"):
                        vl = T.axis.opaque(lanes, lane)
                        better = T.meta_var(
                            tirx.all(
                                tirx.Not(tirx.isnan(best[0])),
                                tirx.any(
                                    best[vl] > best[0],
                                    tirx.isnan(best[vl]),
                                    tirx.all(best[vl] == best[0], index[vl] < index[0]),
                                ),
                            )
                        )
                        index[0] = T.Select(better, index[vl], index[0])
                        best[0] = T.Select(better, best[vl], best[0])
                token_ids[vg, vr] = T.Select(tirx.isnan(best[0]), -1, index[0])

    return argmax


def _argmax(kernel: Argmax, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    function = argmax(kernel, largest_power(kernel.columns, target.lanes))
    schedule = s_tir.Schedule(function, enable_check=False)
    if not is_one_row(kernel):
        schedule.parallel(schedule.fuse(*schedule.get_loops(schedule.get_sblock("row"))))
    for name in ("init", "lane_max"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    return schedule.mod["main"]


TEMPLATE = Template("cpu.argmax", 1, ("argmax",), _argmax)
