"""Prefetches of packed weights: which addresses they name. That they change no result is tested with the decisions."""

from typing import Any

import pytest
import tvm
from tvm import ir, s_tir, tirx
from tvm.script import tirx as T
from tvm.sym import Analyzer
from tvm_ffi.structural import structural_map, structural_walk

from tvm_attn.schedule.prefetch import ANNOTATION, insert_prefetches

STRIPS, K, COLUMNS = 3, 40, 32


@T.prim_func(s_tir=True)
def product(
    x: T.Buffer((1, 2, K), "float32"),
    weight: T.Buffer((STRIPS, K, COLUMNS), "float32"),
    y: T.Buffer((1, 2, STRIPS * COLUMNS), "float32"),
) -> None:
    """y = x W for a weight packed in strips of columns."""
    for g, strip, row, column, k in T.grid(1, STRIPS, 2, COLUMNS, K):
        with T.sblock("matmul"):
            group, s, r, c, step = T.axis.remap("SSSSR", [g, strip, row, column, k])
            with T.init():
                y[group, r, s * COLUMNS + c] = T.float32(0)
            y[group, r, s * COLUMNS + c] += x[group, r, step] * weight[s, step, c]


def fetched_elements(function: tirx.PrimFunc) -> list[tuple[int, ...]]:
    """Indices of the weight in the prefetches of the loops' first iteration."""
    found: list[Any] = []

    def visit(call: ir.Call) -> None:
        if call.op.name == "tirx.call_extern" and call.args[0].value == "tvm_attn_prefetch":
            found.append(call.args[1].args[0].indices)

    structural_walk(function.body, (ir.Call, visit))
    zero, simplify = tirx.IntImm("int32", 0), Analyzer().simplify
    return [
        tuple(int(simplify(structural_map(index, (ir.Var, lambda _: zero)))) for index in indices) for indices in found
    ]


@pytest.mark.parametrize("rows_per_step", [1, 2])
@pytest.mark.parametrize("ahead", [8, 16])
def test_every_line_of_a_step_is_fetched_once(rows_per_step: int, ahead: int) -> None:
    schedule = s_tir.Schedule(product)
    block = schedule.get_sblock("matmul")
    *_, row, column, k = schedule.get_loops(block)
    outer, inner = schedule.split(k, [None, 4])
    schedule.reorder(outer, inner, row, column)
    schedule.decompose_reduction(block, outer)
    schedule.annotate(inner, ANNOTATION, ahead)
    function = schedule.mod["main"]
    fetching = insert_prefetches(function, function.params[1], rows_per_step)
    assert ANNOTATION not in str(fetching)
    # A row of 32 float32 columns is two cache lines of 16.
    lines = [(0, ahead + row, column) for row in range(rows_per_step) for column in (0, 16)]
    assert fetched_elements(fetching) == lines


def test_loops_without_the_annotation_stay() -> None:
    tvm.ir.assert_structural_equal(insert_prefetches(product, product.params[1], 1), product)
