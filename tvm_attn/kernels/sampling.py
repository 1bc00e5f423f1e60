"""Greedy sampling: the index of the largest logit of each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import Case, row_groups


@dataclass(frozen=True)
class Argmax:
    """token_ids = argmax(logits[:, :, :V]); the lowest index wins a tie, as in NumPy. -1 for a row with a NaN.

    Each of `lanes` lanes keeps the maximum of its columns and where it was; the lanes are merged at the end.

    Parameters of the function: logits (g, R, N) float32 with N >= V columns, token_ids (g, R) int32.
    """

    family: ClassVar[str] = "argmax"

    vocabulary: int
    columns: int
    """N, the padded vocabulary."""
    rows: int
    lanes: int = 16
    """A divisor of N; lane l looks at the columns that are l modulo `lanes`."""
    groups: int | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; blocks "row", with "lane_max", "lane_index" and "merge" inside."""
        vocabulary, columns, rows, lanes = self.vocabulary, self.columns, self.rows, self.lanes
        g = row_groups(self.groups)

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
                            # Strictly greater: the first of equal values stays. A NaN is kept once it is seen.
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

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for vocabulary, columns, rows, groups, name in (
            (50257, 50272, 8, 2, "124M"),
            (1021, 1024, 8, 3, "odd vocabulary"),
            (5, 32, 8, 1, "vocabulary below a vector"),
            (1021, 1024, 1, 1, "one row"),
        ):
            kernel = Argmax(vocabulary, columns, rows, groups=groups if rows == 1 else None)
            logits = rng.standard_normal((groups, rows, columns), dtype=np.float32)
            # What lies in the padding must not matter, and of equal maxima the first one wins.
            logits[..., vocabulary:] = 1e9
            logits[0, 0, [vocabulary - 1, vocabulary // 2]] = 100.0
            expected = logits[..., :vocabulary].argmax(-1).astype(np.float64)
            yield Case(kernel, name, (logits,), (np.zeros((groups, rows), np.int32),), (expected,), nmse=0.0)
            all_negative = -np.abs(logits) - np.float32(1e30)
            expected = all_negative[..., :vocabulary].argmax(-1).astype(np.float64)
            output = np.zeros((groups, rows), np.int32)
            yield Case(kernel, f"{name}, large negative", (all_negative,), (output,), (expected,), nmse=0.0)
            with_nan = logits.copy()
            with_nan[-1, -1, vocabulary // 3] = np.nan
            expected = logits[..., :vocabulary].argmax(-1).astype(np.float64)
            expected[-1, -1] = -1.0
            output = np.zeros((groups, rows), np.int32)
            yield Case(kernel, f"{name}, NaN", (with_nan,), (output,), (expected,), nmse=0.0)
