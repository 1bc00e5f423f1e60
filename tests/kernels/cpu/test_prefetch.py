"""The addresses of prefetches. The tests of decisions check that prefetches change no result."""

import itertools
from typing import Any

import pytest
import tvm
from tvm import ir, s_tir, tirx
from tvm.script import tirx as T
from tvm.sym import Analyzer
from tvm_ffi.structural import structural_map, structural_walk

from tvm_attn import targets
from tvm_attn.kernels import ResidualLinear
from tvm_attn.kernels.cpu.prefetch import AHEAD, TILES, insert_prefetches
from tvm_attn.schedule import schedule as schedule_kernel

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


def fetches_of(function: tirx.PrimFunc, name: str = "tvm_attn_prefetch") -> list[Any]:
    """The buffer elements that calls of a prefetch function name."""
    found: list[Any] = []

    def visit(call: ir.Call) -> None:
        if call.op.name == "tirx.call_extern" and call.args[0].value == name:
            found.append(call.args[1].args[0])

    structural_walk(function.body, (ir.Call, visit))
    return found


def fetched_elements(function: tirx.PrimFunc) -> list[tuple[int, ...]]:
    """Indices of the weight elements that the loops' first iteration prefetches."""
    return [indices_at(element, {}) for element in fetches_of(function)]


def indices_at(element: Any, values: dict[str, int]) -> tuple[int, ...]:
    """Indices of a buffer element for these values of loop variables; other variables are 0."""

    def value(variable: ir.Var) -> tirx.IntImm:
        return tirx.IntImm("int32", values.get(variable.name, 0))

    simplify = Analyzer().simplify
    return tuple(int(simplify(structural_map(index, (ir.Var, value)))) for index in element.indices)


@pytest.mark.parametrize("rows_per_step", [1, 2])
@pytest.mark.parametrize("ahead", [8, 16])
def test_every_line_of_a_step_is_fetched_once(rows_per_step: int, ahead: int) -> None:
    schedule = s_tir.Schedule(product)
    block = schedule.get_sblock("matmul")
    *_, row, column, k = schedule.get_loops(block)
    outer, inner = schedule.split(k, [None, 4])
    schedule.reorder(outer, inner, row, column)
    schedule.decompose_reduction(block, outer)
    schedule.annotate(inner, AHEAD, ahead)
    function = schedule.mod["main"]
    fetching = insert_prefetches(function, function.params[1], rows_per_step)
    assert AHEAD not in str(fetching)
    # A row of 32 float32 columns is two cache lines of 16.
    lines = [(0, ahead + row, column) for row in range(rows_per_step) for column in (0, 16)]
    assert fetched_elements(fetching) == lines


def test_loops_without_the_annotation_stay() -> None:
    tvm.ir.assert_structural_equal(insert_prefetches(product, product.params[1], 1), product)


@pytest.mark.parametrize("groups", [1, 4, 5, 11])
def test_every_line_of_a_result_and_its_residual_is_fetched_once(groups: int) -> None:
    """Checks the addresses that the scheduled function computes, for all of its tasks and groups."""
    kernel = ResidualLinear(64, 96, 8, 32, "float32")
    function = schedule_kernel(kernel, targets.read("cpu-x86-64-v4"), {"group_block": 4, "prefetch_bytes": 0})
    assert TILES not in str(function)
    residual, y = function.params[3], function.params[4]
    loops: dict[str, int] = {}
    guards: list[Any] = []
    structural_walk(
        function.body,
        (
            (tirx.For, tirx.IfThenElse),
            lambda node: loops.setdefault(node.loop_var.name, 0) if isinstance(node, tirx.For) else guards.append(node),
        ),
    )
    (task, group), (guard,) = sorted(name for name in loops if name.startswith("group")), guards
    stored, added = fetches_of(function, "tvm_attn_prefetch_to_write"), fetches_of(function)
    assert all(element.source.same_as(y) for element in stored)
    assert all(element.source.same_as(residual) for element in added)
    for elements in (stored, added):
        seen = []
        for values in product_of({task: range(-(-groups // 4) * 3), group: range(4)}):
            if condition(guard.condition, {**values, "g": groups}):
                seen += [indices_at(element, values) for element in elements]
        assert sorted(seen) == [(g, r, c) for g in range(groups) for r in range(8) for c in range(0, 96, 16)]


def product_of(ranges: dict[str, range]) -> list[dict[str, int]]:
    """All assignments of values to names."""
    return [dict(zip(ranges, values, strict=True)) for values in itertools.product(*ranges.values())]


def condition(expression: Any, values: dict[str, int]) -> bool:
    """The value of a condition for these values of variables; other variables are 0."""
    replaced = structural_map(expression, (ir.Var, lambda variable: tirx.IntImm("int32", values.get(variable.name, 0))))
    return bool(int(Analyzer().simplify(replaced)))
