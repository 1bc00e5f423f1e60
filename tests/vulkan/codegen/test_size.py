"""Kernels are small: no instruction twice in a block, nothing that is not read, few instructions in known kernels."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tvm import te, tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from tvm_attn.vulkan.codegen import disassemble

Emitted = Callable[..., list[tuple[dict[str, Any], bytes]]]

# Equal lines of these may occur in one block: they read or change memory, or are part of a block's structure.
EFFECTS = {"OpLoad", "OpStore", "OpLabel", "OpBranch", "OpReturn", "OpFunctionEnd", "OpVariable", "OpUnreachable"}


def blocks(code: bytes) -> list[list[tuple[str, str, str]]]:
    """The basic blocks of a module: (result or "", instruction, operands) of each line."""
    function = disassemble(code).partition("OpFunction ")[2]
    rows = re.findall(r"^ *(?:%(\d+) = )?(Op\w+) ?(.*)$", function, re.M)
    parts: list[list[tuple[str, str, str]]] = [[]]
    for row in rows:
        if row[1] == "OpLabel":
            parts.append([])
        parts[-1].append(row)
    return parts


def repeated(code: bytes) -> list[tuple[str, str]]:
    """Instructions that occur twice in one block with equal operands."""
    counts = (Counter(row[1:] for row in block if row[1] not in EFFECTS) for block in blocks(code))
    return [row for count in counts for row, n in count.items() if n > 1]


def unread(code: bytes) -> list[tuple[str, str, str]]:
    """Instructions without an effect whose result nothing reads."""
    rows = [row for block in blocks(code) for row in block]
    read = {ident for _, _, operands in rows for ident in re.findall(r"%(\d+)", operands)}
    return [row for row in rows if row[0] and row[0] not in read and row[1] not in ("OpLabel", "OpFunction")]


def instructions(code: bytes) -> Counter[str]:
    return Counter(row[1] for block in blocks(code) for row in block)


def matmul() -> Any:
    """64 x 64 x 64 in tiles of 16 x 16 through shared memory, 2 x 2 elements per thread."""
    k = te.reduce_axis((0, 64), "k")
    a, b = (te.placeholder((64, 64), "float32", name) for name in "ab")
    sch = Schedule(te.create_prim_func([a, b, te.compute((64, 64), lambda i, j: te.sum(a[i, k] * b[k, j], k), "c")]))
    block = sch.get_sblock("c")
    i, j, r = sch.get_loops(block)
    bi, ti, ii = sch.split(i, [None, 8, 2])
    bj, tj, jj = sch.split(j, [None, 8, 2])
    outer, inner = sch.split(r, [None, 16])
    sch.reorder(bi, bj, ti, tj, outer, inner, ii, jj)
    for loop, tag in ((bi, "blockIdx.y"), (bj, "blockIdx.x"), (ti, "threadIdx.y"), (tj, "threadIdx.x")):
        sch.bind(loop, tag)
    local = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(local, tj)
    for index in range(2):
        shared = sch.cache_read(block, index, "shared")
        sch.compute_at(shared, outer)
        _, y, x = sch.split(sch.fuse(*sch.get_loops(shared)[-2:]), [None, 8, 8])
        sch.bind(y, "threadIdx.y")
        sch.bind(x, "threadIdx.x")
    for loop in (ii, jj):
        sch.unroll(loop)
    sch.decompose_reduction(block, outer)
    return sch.mod


def gelu() -> Any:
    n = te.var("n", "int64")
    x = te.placeholder((n,), "float32", "x")
    cubic = te.compute(
        (n,), lambda i: x[i] * (1 + tirx.tanh(0.8 * (x[i] + 0.044715 * x[i] * x[i] * x[i]))) * 0.5, "out"
    )
    sch = Schedule(te.create_prim_func([x, cubic]))
    block, thread, vector = sch.split(sch.get_loops(sch.get_sblock("out"))[0], [None, 64, 4])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    sch.vectorize(vector)
    return sch.mod


@pytest.mark.parametrize("program", [matmul, gelu])
def test_nothing_is_computed_twice_or_in_vain(program: Callable[[], Any], emitted: Emitted) -> None:
    for _, code in emitted(program()):
        assert repeated(code) == []
        assert unread(code) == []


def test_common_values_are_shared(emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "float32"), out: T.Buffer((64,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                out[v] = (x[v] * x[v] + T.float32(1)) / (x[v] * x[v] + T.float32(1) + x[v] * x[v])

    ((_, code),) = emitted(kernel)
    count = instructions(code)
    assert {name: count[f"Op{name}"] for name in ("FMul", "FAdd", "FDiv", "Store")} == {
        "FMul": 1,
        "FAdd": 2,
        "FDiv": 1,
        "Store": 1,
    }
    loads = [row for block in blocks(code) for row in block if row[1] == "OpLoad" and "Aligned" in row[2]]
    assert len(loads) == 1


def test_values_are_shared_with_the_branches_below_but_not_across_them(emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "float32"), n: T.float32, out: T.Buffer((64,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                out[v] = x[v] * n
                if x[v] > n:
                    out[v] = x[v] * n + n / x[v]
                else:
                    out[v] = x[v] * n - n / x[v]

    ((_, code),) = emitted(kernel)
    count = instructions(code)
    assert (count["OpFMul"], count["OpFDiv"]) == (1, 2)


def test_what_nothing_reads_is_dropped(emitted: Emitted) -> None:
    """A local array that is only written, what was computed for it, and the buffer that only it read from."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "float32"), out: T.Buffer((64,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                waste = T.sblock_alloc_buffer((4,), "float32", scope="local")
                for j in T.unroll(4):
                    waste[j] = T.tanh(x[v]) * T.Cast("float32", j)
                out[v] = T.float32(1)

    ((_, code),) = emitted(kernel)
    count = instructions(code)
    assert unread(code) == []
    assert count["OpStore"] == 1
    assert count["OpExtInst"] == count["OpFMul"] == 0
    assert count["OpVariable"] == 0


def test_constants_are_folded_into_addresses(emitted: Emitted) -> None:
    """Four consecutive elements of one thread need one multiplication for all of their addresses."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((256,), "float32"), out: T.Buffer((256,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                for j in T.unroll(4):
                    out[v * 4 + j] = x[v * 4 + j] + T.float32(1)

    ((_, code),) = emitted(kernel)
    count = instructions(code)
    assert count["OpIMul"] + count["OpShiftLeftLogical"] == 1
    assert count["OpIAdd"] == 3
