"""Cooperative matrices: TVM's WMMA calls become KHR instructions, and devices without them refuse the kernel.

Mesa's llvmpipe has none: what they compute is tested if a device has them.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from tvm_attn import targets
from tvm_attn import vulkan as backend
from tvm_attn.errors import DeviceError
from tvm_attn.kernels import Linear
from tvm_attn.kernels.linear import random_case
from tvm_attn.schedule import schedule
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


KERNEL = Linear(64, 96, 16, 32, "float16")


@pytest.fixture
def matmul() -> tvm.IRModule:
    """x W + b with W (64, 96) in float16 and sums in float32, as the template for matrices schedules it."""
    return tvm.IRModule({"main": schedule(KERNEL, targets.read("vulkan-matrix")).with_attr("global_symbol", "main")})


def test_one_tile(emitted: Emitted) -> None:
    ((record, code),) = emitted(one_tile, TARGET)
    text = disassemble(code)
    assert set(record["features"]) == FEATURES
    assert record["subgroup_size"] == 32
    assert len(re.findall("OpCooperativeMatrixMulAddKHR", text)) == 1
    assert "OpMemoryModel PhysicalStorageBuffer64 Vulkan" in text


def test_matmul_through_shared_memory(matmul: tvm.IRModule, emitted: Emitted) -> None:
    # One kernel is for few rows, and this one for the others.
    ((record, code),) = (pair for pair in emitted(matmul, TARGET) if "cooperative_matrix" in pair[0]["features"])
    text = disassemble(code)
    assert set(record["features"]) == FEATURES
    assert "OpCooperativeMatrixMulAddKHR" in text
    # Tiles are read from shared memory after a barrier, and are in registers: no index of a fragment varies.
    assert "OpControlBarrier" in text
    loads = re.findall(r"%(\d+) = OpCooperativeMatrixLoadKHR %\d+ %(\d+)", text)
    assert loads
    pointers = dict(re.findall(r"%(\d+) = OpAccessChain %(\d+)", text))
    types = dict(re.findall(r"%(\d+) = OpTypePointer (\w+)", text))
    assert {types[pointers[pointer]] for _, pointer in loads} == {"Workgroup"}


def test_matmul_where_a_device_has_them(matmul: tvm.IRModule, run: Run, has_matrices: bool) -> None:
    if not has_matrices:
        pytest.skip("vulkan:0 has no cooperative matrices")
    case = random_case(KERNEL, 8)
    got = run(matmul, *case.inputs, *case.outputs, target=TARGET)[-1]
    (want,) = case.expected
    # x is rounded to float16, by 2**-11 of an element at most.
    assert np.square(got - want).mean() <= 2.0**-22 * np.square(want).mean()


@pytest.fixture
def has_matrices(vulkan: Any) -> bool:
    del vulkan  # registers the backend; skips if there is no device
    (device,) = (device for device in backend.devices() if device["index"] == 0)
    return bool(device["features"]["cooperative_matrix"])


def test_a_device_without_them_refuses_the_kernel(run: Run, has_matrices: bool) -> None:
    if has_matrices:
        pytest.skip("this device has cooperative matrices")
    arrays = [np.zeros((16, 16), dtype) for dtype in ("float16", "float16", "float32")]
    with pytest.raises(DeviceError, match=r" lacks .*cooperative_matrix.*, which kernel .+ needs"):
        run(one_tile, *arrays, target=TARGET)
