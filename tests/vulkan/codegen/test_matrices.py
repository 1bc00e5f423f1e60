"""Cooperative matrices: TVM's WMMA calls become KHR instructions, and devices without them refuse the kernel.

Mesa's llvmpipe has none of them: what they compute is tested where a device does.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te
from tvm.s_tir.dlight.gpu.matmul import MatmulTensorization
from tvm.script import tirx as T

from tvm_attn import vulkan as backend
from tvm_attn.errors import DeviceError
from tvm_attn.vulkan.codegen import disassemble

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
Emitted = Callable[..., list[tuple[dict[str, Any], bytes]]]

TARGET = {"kind": "vulkan", "thread_warp_size": 32, "max_num_threads": 256, "max_shared_memory_per_block": 32768}
FEATURES = {"cooperative_matrix", "vulkan_memory_model", "float16", "storage16"}


@T.prim_func(s_tir=True)
def one_tile(a: T.Buffer((16, 16), "float16"), b: T.Buffer((16, 16), "float16"), c: T.Buffer((16, 16), "float32")):
    """c = a b^T in one multiplication, from global memory to global memory."""
    for i in T.thread_binding(32, "threadIdx.x"):
        with T.sblock("all"):
            T.axis.spatial(32, i)
            T.reads(a[0:16, 0:16], b[0:16, 0:16])
            T.writes(c[0:16, 0:16])
            left = T.sblock_alloc_buffer((16, 16), "float16", scope="wmma.matrix_a")
            right = T.sblock_alloc_buffer((16, 16), "float16", scope="wmma.matrix_b")
            total = T.sblock_alloc_buffer((16, 16), "float32", scope="wmma.accumulator")
            T.tvm_fill_fragment(total.data, 16, 16, 16, 0, T.float32(0))
            T.tvm_load_matrix_sync(
                left.data, 16, 16, 16, 0,
                T.tvm_access_ptr(T.type_annotation("float16"), a.data, 0, 256, 1), 16, "row_major",
            )  # fmt: skip
            T.tvm_load_matrix_sync(
                right.data, 16, 16, 16, 0,
                T.tvm_access_ptr(T.type_annotation("float16"), b.data, 0, 256, 1), 16, "col_major",
            )  # fmt: skip
            T.tvm_mma_sync(total.data, 0, left.data, 0, right.data, 0, total.data, 0)
            T.tvm_store_matrix_sync(
                total.data, 16, 16, 16, 0,
                T.tvm_access_ptr(T.type_annotation("float32"), c.data, 0, 256, 2), 16, "row_major",
            )  # fmt: skip


@pytest.fixture(scope="module")  # slow: TVM parses all of its tensor intrinsics for it
def matmul() -> tvm.IRModule:
    """c = a b^T with a (128, 64), b (96, 64) in float16 and c in float32, as DLight schedules it for tensor cores."""
    k = te.reduce_axis((0, 64), "k")
    a, b = te.placeholder((1, 128, 64), "float16", "a"), te.placeholder((96, 64), "float16", "b")

    def element(z: Any, i: Any, j: Any) -> Any:
        return te.sum(a[z, i, k].astype("float32") * b[j, k].astype("float32"), axis=k)

    function = te.create_prim_func([a, b, te.compute((1, 128, 96), element, "c")])
    schedule = MatmulTensorization().apply(function, tvm.target.Target(TARGET), False)
    assert schedule is not None
    return schedule.mod


def test_one_tile(emitted: Emitted) -> None:
    ((record, code),) = emitted(one_tile, TARGET)
    text = disassemble(code)
    assert set(record["features"]) == FEATURES
    assert record["subgroup_size"] == 32
    assert len(re.findall("OpCooperativeMatrixMulAddKHR", text)) == 1
    assert "OpMemoryModel PhysicalStorageBuffer64 Vulkan" in text


@pytest.mark.slow
def test_matmul_through_shared_memory(matmul: tvm.IRModule, emitted: Emitted) -> None:
    ((record, code),) = emitted(matmul, TARGET)
    text = disassemble(code)
    assert set(record["features"]) == FEATURES
    assert "OpCooperativeMatrixMulAddKHR" in text
    # Tiles are read from shared memory, which a barrier orders, and lie in registers: no index of a fragment varies.
    assert "OpControlBarrier" in text
    loads = re.findall(r"%(\d+) = OpCooperativeMatrixLoadKHR %\d+ %(\d+)", text)
    assert loads
    pointers = dict(re.findall(r"%(\d+) = OpAccessChain %(\d+)", text))
    types = dict(re.findall(r"%(\d+) = OpTypePointer (\w+)", text))
    assert {types[pointers[pointer]] for _, pointer in loads} == {"Workgroup"}


@pytest.mark.slow
def test_matmul_where_a_device_has_them(matmul: tvm.IRModule, run: Run, has_matrices: bool) -> None:
    if not has_matrices:
        pytest.skip("vulkan:0 has no cooperative matrices")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype("float16") for shape in ((1, 128, 64), (96, 64)))
    got = run(matmul, a, b, np.zeros((1, 128, 96), "float32"), target=TARGET)[-1]
    want = a.astype("float64") @ b.T.astype("float64")
    assert np.square(got - want).mean() <= 1e-10 * np.square(want).mean()


@pytest.fixture
def has_matrices(vulkan: Any) -> bool:
    del vulkan  # registers the backend, skips where there is no device
    (device,) = (device for device in backend.devices() if device["index"] == 0)
    return bool(device["features"]["cooperative_matrix"])


def test_a_device_without_them_refuses_the_kernel(run: Run, has_matrices: bool) -> None:
    if has_matrices:
        pytest.skip("this device has cooperative matrices")
    arrays = [np.zeros((16, 16), dtype) for dtype in ("float16", "float16", "float32")]
    with pytest.raises(DeviceError, match=r"kernel .*cooperative_matrix, which .+ does not have"):
        run(one_tile, *arrays, target=TARGET)
