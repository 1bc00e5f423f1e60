"""Loops, branches, bindings and their effect on values that are shared between them, against NumPy."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te
from tvm.script import tirx as T

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen import kernel as kernel_module
from tvm_attn.vulkan.codegen.loops import Loop, copies

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]


def test_loop_with_symbolic_bounds(run: Run) -> None:
    """Row i sums x[i, low : low + i]; nothing about it is known at compile time."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, low: T.int32, out: T.handle):
        rows, columns = T.int32(), T.int32()
        X = T.match_buffer(x, (rows, columns), "int32")
        Out = T.match_buffer(out, (rows,), "int32")
        for i in T.thread_binding(rows, "blockIdx.x"):
            with T.sblock("all"):
                row = T.axis.spatial(rows, i)
                total = T.sblock_alloc_buffer((1,), "int32", scope="local")
                total[0] = 0
                for j in range(low, low + row):
                    total[0] = total[0] + X[row, j]
                Out[row] = total[0]

    x = np.random.default_rng(0).integers(-99, 99, (9, 20), "int32")
    out = run(kernel, x, 3, np.full(9, -1, "int32"))[-1]
    np.testing.assert_array_equal(out, [x[i, 3 : 3 + i].sum() for i in range(9)])


def test_nested_loops_reuse_no_load_across_stores(run: Run) -> None:
    """Prefix sums in place: every round reads what the previous one has written."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((4, 8), "int32")):
        for i in T.thread_binding(4, "threadIdx.x"):
            with T.sblock("all"):
                row = T.axis.spatial(4, i)
                for _ in range(2):
                    for j in range(7):
                        x[row, j + 1] = x[row, j + 1] + x[row, j]

    x = np.random.default_rng(0).integers(-99, 99, (4, 8), "int32")
    np.testing.assert_array_equal(run(kernel, x)[0], np.cumsum(np.cumsum(x, 1), 1))


def test_while(run: Run) -> None:
    """Steps of the Collatz sequence down to 1; the condition reads memory that the body writes."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "int32"), steps: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                steps[v] = 0
                while x[v] > 1:
                    if x[v] % 2 == 0:
                        x[v] = x[v] // 2
                    else:
                        x[v] = x[v] * 3 + 1
                    steps[v] = steps[v] + 1

    def collatz(n: int) -> int:
        return 0 if n <= 1 else 1 + collatz(3 * n + 1 if n % 2 else n // 2)

    x = np.arange(64, dtype="int32")
    got, steps = run(kernel, x, np.full(64, -1, "int32"))
    np.testing.assert_array_equal(steps, [collatz(n) for n in range(64)])
    np.testing.assert_array_equal(got, np.minimum(x, 1))


def test_break_and_continue(run: Run) -> None:
    """The sum of odd numbers before the first one that is 0."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((16, 32), "int32"), out: T.Buffer((16,), "int32")):
        for i in T.thread_binding(16, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(16, i)
                out[v] = 0
                for j in range(32):
                    if x[v, j] == 0:
                        T.evaluate(T.break_loop())
                    if x[v, j] % 2 == 0:
                        T.evaluate(T.continue_loop())
                    out[v] = out[v] + x[v, j]

    x = np.random.default_rng(0).integers(0, 20, (16, 32), "int32")
    x[0] = 1
    want = []
    for row in x:
        end = np.flatnonzero(row == 0)
        head = row[: end[0]] if end.size else row
        want.append(head[head % 2 == 1].sum())
    np.testing.assert_array_equal(run(kernel, x, np.full(16, -1, "int32"))[-1], want)


def test_break_leaves_a_loop_of_one_round(run: Run) -> None:
    """Such a loop needs no branch back, but break must leave it and not the loop around it."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((32,), "int32"), out: T.Buffer((32,), "int32")):
        for i in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(32, i)
                for _ in range(3):
                    out[v] = out[v] + 1
                    for _ in range(1):
                        if x[v] > 0:
                            T.evaluate(T.break_loop())
                        out[v] = out[v] + 10

    x = np.random.default_rng(0).integers(-9, 9, 32, "int32")
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], np.where(x > 0, 3, 33))


def test_early_return(run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                if x[v] < 0:
                    T.evaluate(T.thread_return())
                x[v] = x[v] + 1

    x = np.random.default_rng(0).integers(-9, 9, 64, "int32")
    np.testing.assert_array_equal(run(kernel, x)[0], np.where(x < 0, x, x + 1))


def test_nested_branches(run: Run) -> None:
    """A value that both sides compute is shared neither with the other side nor with what follows."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((256,), "int32"), out: T.Buffer((256,), "int32")):
        for i in T.thread_binding(256, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(256, i)
                if x[v] > 0:
                    if x[v] > 50:
                        out[v] = x[v] * x[v] + 1
                    else:
                        if x[v] > 25:
                            out[v] = x[v] * x[v] + 2
                elif x[v] < -50:
                    out[v] = x[v] * x[v] + 3
                else:
                    out[v] = x[v] * x[v] + 4
                out[v] = out[v] + x[v] * x[v]

    x = np.random.default_rng(0).integers(-99, 99, 256, "int32")
    start = np.full(256, 7, "int32")
    branches = [(x > 50, 1), (x > 25, 2), (x > 0, None), (x < -50, 3), (x <= 0, 4)]
    want = np.select([c for c, _ in branches], [start if k is None else x * x + k for _, k in branches]) + x * x
    np.testing.assert_array_equal(run(kernel, x, start)[-1], want)


@pytest.mark.parametrize("kind", ["serial", "unroll"])
def test_loop_over_a_local_array(kind: str, run: Run) -> None:
    loop = getattr(T, kind)

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((32, 10), "float32"), out: T.Buffer((32, 10), "float32")):
        for i in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("all"):
                row = T.axis.spatial(32, i)
                held = T.sblock_alloc_buffer((10,), "float32", scope="local")
                for j in loop(10):
                    held[j] = x[row, j] * T.float32(2)
                for j in loop(10):
                    out[row, j] = held[9 - j] + held[j]

    x = np.random.default_rng(0).standard_normal((32, 10)).astype("float32")
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], 2 * x + 2 * x[:, ::-1])


def test_let_within_if_then_else_is_not_hoisted(run: Run) -> None:
    """The bound value divides by what the condition guards, and reads where only the condition makes it legal."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "int32"), out: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                T.reads(x[0:64])
                T.writes(out[v])
                at = T.int32()
                out[v] = T.if_then_else(x[v] >= 0 and x[v] < 64, T.Let(x[at] + at, where={at: x[v]}), -1)

    x = np.random.default_rng(0).integers(-(2**30), 2**30, 64, "int32")
    x[::3] = np.random.default_rng(1).integers(0, 64, x[::3].size, "int32")
    inside = (x >= 0) & (x < 64)
    safe = np.where(inside, x, 0)
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], np.where(inside, x[safe] + safe, -1))


def test_condition_guards_the_right_side_of_and(run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "int32"), out: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                if x[v] >= 0 and x[v] < 64 and x[x[v]] > 5:
                    out[v] = 1
                elif x[v] < 0 or x[v] >= 64 or x[x[v]] > 2:
                    out[v] = 2

    x = np.random.default_rng(0).integers(-(2**30), 2**30, 64, "int32")
    x[::2] = np.random.default_rng(1).integers(0, 64, 32, "int32")
    inside = (x >= 0) & (x < 64)
    there = x[np.where(inside, x, 0)]
    want = np.where(inside & (there > 5), 1, np.where(~inside | (there > 2), 2, 0))
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], want)


def test_loads_are_not_shared_across_a_conditional_store(run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "int32"), out: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                held = T.sblock_alloc_buffer((2,), "int32", scope="local")
                held[0] = x[v]
                held[1] = held[0] * 3
                if held[1] > 30:
                    held[0] = held[1] - 1
                    x[v] = 5
                out[v] = held[0] + x[v]

    x = np.random.default_rng(0).integers(-99, 99, 64, "int32")
    large = 3 * x > 30
    want = np.where(large, 3 * x - 1 + 5, 2 * x)
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], want)


def test_loop_variables_of_64_bits(run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, n), "int64")
        Out = T.match_buffer(out, (n,), "int64")
        for i in T.thread_binding(n, "blockIdx.x"):
            with T.sblock("all"):
                row = T.axis.spatial(n, i)
                Out[row] = T.int64(0)
                for j in range(T.int64(2), n):
                    Out[row] = Out[row] + X[j, row] * j * T.int64(10_000_000_000)

    x = np.random.default_rng(0).integers(-99, 99, (11, 11), "int64")
    want = (x * np.arange(11)[:, None])[2:].sum(0) * 10_000_000_000
    np.testing.assert_array_equal(run(kernel, x, np.zeros(11, "int64"))[-1], want)


# Rounds: Mesa's driver ends loops after 65,535 of them, counted over all loops -------------------------------------


@pytest.mark.parametrize(
    ("outer", "inner"), [(65536, 1), (100003, 1), (1000, 70), (300, 300), (100003, 3), (7, 99991), (1, 1000003)]
)
def test_loops_of_many_rounds(outer: int, inner: int, run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((4,), "uint32"), out: T.Buffer((4,), "uint32")):
        for i in T.thread_binding(4, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(4, i)
                out[v] = T.uint32(0)
                for a in range(outer):
                    for b in range(inner):
                        out[v] = out[v] * T.uint32(3) + (x[v] + T.Cast("uint32", a) ^ T.Cast("uint32", b))

    x = np.arange(4, dtype="uint32")
    want = [0, 0, 0, 0]
    for a in range(outer):
        for b in range(inner):
            want = [(w * 3 + (int(n) + a ^ b)) & 0xFFFFFFFF for w, n in zip(want, x, strict=True)]
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], want)


def test_bodies_are_repeated_only_where_rounds_are_too_many() -> None:
    assert copies([Loop(1, 60000, 1, True)]) == {}
    assert copies([Loop(1, 1000, 1, True), Loop(2, 70, 1000, True)]) == {2: 2}
    assert copies([Loop(1, 1000, 1, True), Loop(2, 70, 1000, False)]) == {}
    assert copies([Loop(1, 1 << 30, 1, True)]) == {}


# Depth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 20, 100])
def test_else_of_an_else(levels: int, run: Run) -> None:
    """Each decision is in the else of the previous one, and holds another one: Mesa takes 79 nested decisions."""
    lines = [
        "@T.prim_func(s_tir=True)",
        'def kernel(x: T.Buffer((32,), "int32"), out: T.Buffer((32,), "int32")):',
        '    for i in T.thread_binding(32, "threadIdx.x"):',
        '        with T.sblock("all"):',
        "            v = T.axis.spatial(32, i)",
        "            value: T.let = x[v]",
    ]
    for level in range(levels):
        lines += [
            f"            {'elif' if level else 'if'} value == {level}:",
            "                if v % 2 == 0:",
            f"                    out[v] = x[{level % 32}] + {level}",
            "                else:",
            "                    out[v] = -2",
        ]
    lines += ["            else:", "                out[v] = 1000"]
    x = np.random.default_rng(0).integers(-2, levels + 2, 32, "int32")
    chosen = np.where(np.arange(32) % 2 == 0, x[x % 32] + x, -2)
    want = np.where((x >= 0) & (x < levels), chosen, 1000)
    program = tvm.script.from_source("\n".join(lines), extra_vars={"T": T})
    np.testing.assert_array_equal(run(program, x, np.zeros_like(x))[-1], want)


def _chain(length: int) -> Any:
    x = te.placeholder((32,), "float32", "x")

    def element(i: Any) -> Any:
        value = x[i]
        for step in range(length):
            value = value * x[i] if step % 2 else value + x[i]
        return value

    sch = tvm.s_tir.Schedule(te.create_prim_func([x, te.compute((32,), element, "out")]))
    sch.bind(sch.get_loops(sch.get_sblock("out"))[0], "threadIdx.x")
    return sch.mod


def test_deep_expression(run: Run) -> None:
    x = np.linspace(0.1, 0.4, 32, dtype="float32")
    want = x.astype("float64")
    for step in range(1500):
        want = want * x if step % 2 else want + x
    np.testing.assert_allclose(run(_chain(1500), x, np.zeros_like(x))[-1], want, rtol=1e-5)


def test_beyond_the_bound_of_depth(emitted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "MAX_FRAMES", 2000)
    limit = sys.getrecursionlimit()
    with pytest.raises(CompileError, match="Vulkan kernel main_kernel: it is nested too deeply"):
        emitted(_chain(1500))
    assert sys.getrecursionlimit() == limit
