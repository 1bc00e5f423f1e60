"""Reductions over the threads of a workgroup along every axis and set of axes, against NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from tvm_attn.vulkan.codegen import pipeline

Array = np.ndarray[Any, Any]

EXTENTS = (1, 3, 4, 7, 8, 13, 32, 33, 64)
# Extents of the reduced axes; the other threads of a workgroup hold rows of their own.
SHAPES: dict[str, list[dict[str, int]]] = {
    **{axis: [{axis: extent} for extent in EXTENTS] for axis in "xyz"},
    "xy": [{"x": x, "y": y} for x, y in ((1, 8), (2, 2), (3, 5), (4, 4), (5, 1), (8, 2), (8, 7), (16, 4), (4, 32))],
    "yx": [{"y": y, "x": x} for y, x in ((8, 1), (2, 2), (5, 3), (4, 4), (2, 8), (7, 9))],
    "xz": [{"x": x, "z": z} for x, z in ((2, 3), (4, 4), (8, 2), (7, 5))],
    "yz": [{"y": y, "z": z} for y, z in ((2, 3), (4, 4), (8, 2), (7, 5))],
    "xyz": [{"x": x, "y": y, "z": z} for x, y, z in ((2, 2, 2), (3, 2, 5), (4, 4, 4), (8, 3, 2), (1, 7, 1))],
}


def _argmax() -> Any:
    def combine(a: Any, b: Any) -> tuple[Any, Any]:
        first = tvm.tirx.any(a[1] > b[1], tvm.tirx.all(a[1] == b[1], a[0] < b[0]))
        return tvm.tirx.Select(first, a[0], b[0]), tvm.tirx.Select(a[1] > b[1], a[1], b[1])

    def identity(index: str, value: str) -> tuple[Any, Any]:
        return tvm.tirx.const(-1, index), tvm.tirx.min_value(value)

    return te.comm_reducer(combine, identity)


def _program(name: str, reducer: str, reduced: dict[str, int], rows: dict[str, int], inner: int) -> Any:
    width, count = math.prod(reduced.values()) * inner, math.prod(rows.values())
    k = te.reduce_axis((0, width), "k")
    x = te.placeholder((count, width), "float32", "x")
    if reducer == "argmax":
        places = te.placeholder((count, width), "int32", "places")
        outs = te.compute((count,), lambda i: _argmax()((places[i, k], x[i, k]), axis=k), "out")
        function = te.create_prim_func([places, x, *outs])
    else:
        combine = te.sum if reducer == "sum" else te.max
        function = te.create_prim_func([x, te.compute((count,), lambda i: combine(x[i, k], axis=k), "out")])
    schedule = tvm.s_tir.Schedule(function.with_attr("global_symbol", name))
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    row, column = schedule.get_loops(block)
    for loop, axes in ((row, rows), (column, reduced)):
        for part, axis in zip(schedule.split(loop, [None, *axes.values()])[1:], axes, strict=True):
            schedule.bind(part, f"threadIdx.{axis}")
    return schedule.mod["main"]


def _programs(axes: str) -> list[tuple[dict[str, int], dict[str, int], int]]:
    """Reduced axes, axes of rows, and how often a thread reads: without rows, and with them on each other axis."""
    programs = []
    for index, reduced in enumerate(SHAPES[axes]):
        programs.append((reduced, {}, 1 + index % 3))
        for number, axis in enumerate(axis for axis in "xyz" if axis not in reduced):
            rows = (2, 3, 4, 8)[(index + number) % 4]
            programs.append((reduced, {axis: rows}, 1 + index % 2))
    return programs


@pytest.fixture(params=["device", "warps, stock", "warps, our pipeline"])
def lowering(request: pytest.FixtureRequest, vulkan: Any) -> tuple[Any, str]:
    """Target and pipeline: for the device as detected, and for subgroups of the device's size."""
    pipeline.register()
    target = tvm.target.Target.from_device("vulkan").export()
    if request.param.startswith("warps"):
        target = {**target, "thread_warp_size": vulkan.warp_size}
    return target, pipeline.NAME if request.param.endswith("our pipeline") else "default"


@pytest.mark.parametrize("reducer", ["sum", "max", "argmax"])
@pytest.mark.parametrize("axes", SHAPES)
def test_reductions(axes: str, reducer: str, lowering: tuple[Any, str], vulkan: Any) -> None:
    target, passes = lowering
    programs = _programs(axes)
    functions = {f"f{n}": _program(f"f{n}", reducer, *program) for n, program in enumerate(programs)}
    executable = tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline=passes)
    rng = np.random.default_rng(0)
    for name, (reduced, rows, inner) in zip(functions, programs, strict=True):
        count, width = math.prod(rows.values()), math.prod(reduced.values()) * inner
        x = rng.integers(-9, 10, (count, width)).astype("float32")
        places = [np.broadcast_to(np.arange(width, dtype="int32"), x.shape).copy()] if reducer == "argmax" else []
        out = [np.full(count, -1, "int32")] if reducer == "argmax" else []
        held = [tvm.runtime.tensor(a, vulkan) for a in (*places, x, *out, np.full(count, -1, "float32"))]
        executable[name](*held)
        got = held[len(places) + 1].numpy()
        want = {"sum": x.sum(1), "max": x.max(1), "argmax": x.argmax(1)}[reducer]
        np.testing.assert_array_equal(got, want, err_msg=f"{reduced} {rows} {inner}")
