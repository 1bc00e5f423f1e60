"""The interface of kernels: arguments of every type, argument buffers, folded grids, several kernels, errors."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te
from tvm.script import tirx as T

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen import disassemble
from tvm_attn.vulkan.codegen.kernel import compile_kernel

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
Emitted = Callable[..., list[tuple[dict[str, Any], bytes]]]


def test_scalar_arguments_of_every_type(run: Run, emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def kernel(
        a: T.int8, b: T.uint16, c: T.int32, d: T.uint32, e: T.int64, f: T.float32, g: T.float64, h: T.bool,
        out: T.Buffer((8, 4), "float64"),
    ):  # fmt: skip
        for i in T.thread_binding(4, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(4, i)
                out[0, v] = T.Cast("float64", a)
                out[1, v] = T.Cast("float64", b)
                out[2, v] = T.Cast("float64", c)
                out[3, v] = T.Cast("float64", d)
                out[4, v] = T.Cast("float64", e)
                out[5, v] = T.Cast("float64", f)
                out[6, v] = g
                out[7, v] = T.if_then_else(h, T.float64(1), T.float64(2))

    values = [-5, 65_000, -(1 << 30), (1 << 32) - 1, -(1 << 40), 0.5, 1e-300, True]
    out = run(kernel, *values, np.zeros((8, 4)))[-1]
    np.testing.assert_array_equal(out, np.repeat([[*values[:-1], 1.0]], 4, 0).T)
    ((record, _),) = emitted(kernel)
    assert record["block_size"] <= 128
    for name, offset in zip(record["params"], record["block_offsets"], strict=True):
        assert offset % (8 if name in ("handle", "int64", "uint64", "float64") else 4) == 0


@pytest.mark.parametrize("count", [13, 14, 40])
def test_many_arguments(count: int, run: Run, emitted: Emitted) -> None:
    """Beyond 128 bytes the arguments are in a buffer, and the push constant is its address."""
    arrays = [te.placeholder((40,), "float32", f"x{k}") for k in range(count)]
    out = te.compute(
        (40,), lambda i: sum((x[i] * float(k + 1) for k, x in enumerate(arrays)), tvm.tirx.const(0.0)), "out"
    )
    sch = tvm.s_tir.Schedule(te.create_prim_func([*arrays, out]))
    (loop,) = sch.get_loops(sch.get_sblock("out"))
    block, thread = sch.split(loop, [None, 8])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    values = [np.random.default_rng(k).integers(-9, 9, 40).astype("float32") for k in range(count)]
    got = run(sch.mod, *values, np.zeros(40, "float32"))[-1]
    np.testing.assert_array_equal(got, sum((k + 1) * x for k, x in enumerate(values)))
    ((record, code),) = emitted(sch.mod)
    size = 8 * (count + 1) + 12
    assert record["block_size"] == -(-size // 8) * 8
    text = disassemble(code)
    (constants,) = re.findall(r"%(\d+) = OpVariable %\d+ PushConstant", text)
    members = re.findall(rf"OpAccessChain %\d+ %{constants} ", text)
    assert len(members) == (count + 4 if record["block_size"] <= 128 else 1)


@pytest.mark.parametrize("grid", [(70_000, 1, 1), (3, 70_000, 1), (2, 3, 66_000)])
def test_grids_beyond_the_limit_of_the_device(grid: tuple[int, int, int], run: Run) -> None:
    """Vulkan guarantees 65,535 workgroups along an axis; each workgroup must run once."""
    x, y, z = grid

    @T.prim_func(s_tir=True)
    def kernel(out: T.Buffer((z, y, x), "int32")):
        for i in T.thread_binding(x, "blockIdx.x"):
            for j in T.thread_binding(y, "blockIdx.y"):
                for k in T.thread_binding(z, "blockIdx.z"):
                    for _ in T.thread_binding(1, "threadIdx.x"):
                        with T.sblock("all"):
                            vi, vj, vk = T.axis.remap("SSS", [i, j, k])
                            out[vk, vj, vi] = out[vk, vj, vi] + (vk * y + vj) * x + vi + 1

    out = run(kernel, np.zeros((z, y, x), "int32"))[-1]
    np.testing.assert_array_equal(out.reshape(-1), np.arange(1, x * y * z + 1))


def test_several_kernels_in_one_module(run: Run, emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32"), z: T.Buffer((64,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("first"):
                v = T.axis.spatial(64, i)
                y[v] = x[v] * T.float32(2)
        for i in T.thread_binding(16, "blockIdx.x"):
            for j in T.thread_binding(4, "threadIdx.x"):
                with T.sblock("second"):
                    v = T.axis.spatial(64, i * 4 + j)
                    z[v] = y[63 - v] + T.float32(1)

    x = np.arange(64, dtype="float32")
    _, y, z = run(main, x, np.zeros_like(x), np.zeros_like(x))
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(z, 2 * x[::-1] + 1)
    kernels = emitted(main)
    assert [record["workgroup_size"] for record, _ in kernels] == [[64, 1, 1], [4, 1, 1]]
    assert len({record["name"] for record, _ in kernels}) == 2


# Errors ---------------------------------------------------------------------------------------------------------


def _kernel(statement: str, dtype: str = "float32") -> Any:
    """A kernel `odd` over x and y of 32 elements that consists of one statement."""
    lines = [
        "@T.prim_func(s_tir=True)",
        f'def odd(x: T.Buffer((32,), "{dtype}"), y: T.Buffer((32,), "{dtype}")):',
        '    for i in T.thread_binding(32, "threadIdx.x"):',
        '        with T.sblock("all"):',
        "            v = T.axis.spatial(32, i)",
        "            T.reads(x[0:32])",
        "            T.writes(y[0:32])",
        f"            {statement}",
    ]
    return tvm.IRModule({"odd": tvm.script.from_source("\n".join(lines))})


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('y[v] = T.call_pure_extern("float32", "besselj", x[v])', "external function besselj"),
        ('T.tvm_storage_sync("global")', r'tvm_storage_sync\("global"\)'),
        ('T.evaluate(T.call_extern("float32", "printf", x[v]))', "external function printf"),
        ("y[v] = T.tvm_warp_shuffle(0, x[v], 0, v, 8)", "width of a warp shuffle"),
        ('y[v] = T.call_intrin("float32", "tirx.cuda.clock64")', "operator tirx.cuda.clock64"),
        ("y[v] = T.exp(T.Cast('int32', x[v]))", "exp is not defined for int32"),
    ],
)
def test_errors_name_the_operator_and_the_kernel(statement: str, message: str, emitted: Emitted) -> None:
    with pytest.raises(CompileError, match=rf"Vulkan kernel odd\w*: .*{message}"):
        emitted(_kernel(statement))


def test_compile_error_is_the_type_where_no_ffi_lies_between() -> None:
    function = tvm.tirx.PrimFunc([], tvm.tirx.Evaluate(tvm.tirx.call_extern("float32", "besselj", 1.0)))
    with pytest.raises(CompileError, match="Vulkan kernel name: the external function besselj"):
        compile_kernel(function, "name")
