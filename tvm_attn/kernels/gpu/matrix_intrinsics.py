"""Tensor intrinsics for float16 matrices with float32 sums, written with TVM's matrix calls, for `linear_matrix`.

The code generators of CUDA and of `tvm_attn.vulkan` know these calls. TVM has such intrinsics too, in a module that
takes half a minute to import.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import s_tir, tirx
from tvm.script import tirx as T


@cache
def intrinsics(m: int, n: int, k: int) -> dict[str, str]:
    """Registers the tensor intrinsics for float16 matrices of M x K and K x N with float32 sums: operation -> name."""
    pairs = {
        "fill": _fill(m, n, k),
        "load_a": _move((m, n, k), (m, k), "float16", "shared", "wmma.matrix_a"),
        "load_b": _move((m, n, k), (k, n), "float16", "shared", "wmma.matrix_b"),
        "multiply": _multiply(m, n, k),
        "store": _move((m, n, k), (m, n), "float32", "wmma.accumulator", "shared"),
    }
    names = {operation: f"tvm_attn.matrix_{m}x{n}x{k}.{operation}" for operation in pairs}
    for operation, (description, implementation) in pairs.items():
        s_tir.TensorIntrin.register(names[operation], description, implementation, override=True)
    return names


def _at(fragment: Any, stride: Any, sizes: tuple[int, int]) -> Any:
    """The index of the first fragment in a region of fragments: TVM counts them in rows of the buffer."""
    row = fragment.elem_offset // stride // sizes[0]
    return row * (stride // sizes[1]) + fragment.elem_offset % stride // sizes[1]


def _fill(m: int, n: int, k: int) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    @T.prim_func(s_tir=True)
    def description(c: T.handle) -> None:
        sums = T.match_buffer(c, (m, n), "float32", align=64, offset_factor=n, scope="wmma.accumulator")
        with T.sblock("root"):
            T.reads()
            T.writes(sums[0:m, 0:n])
            for i, j in T.grid(m, n):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    sums[vi, vj] = T.float32(0)

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle) -> None:
        row, element = T.int32(), T.int32()
        sums = T.match_buffer(
            c, (m, n), "float32", align=64, offset_factor=n, scope="wmma.accumulator", strides=[row, element]
        )
        with T.sblock("root"):
            T.reads()
            T.writes(sums[0:m, 0:n])
            T.evaluate(T.tvm_fill_fragment(sums.data, m, n, k, _at(sums, row, (m, n)), T.float32(0), dtype="void"))

    return description, implementation


def _move(
    sizes: tuple[int, int, int], shape: tuple[int, int], dtype: str, source: str, target: str
) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    """Copies between shared memory and a fragment; the scopes say which is which."""
    (m, n, k), (rows, columns), loads = sizes, shape, source == "shared"

    def move(a: Any, a_row: Any, b: Any, b_row: Any) -> Any:
        if loads:
            pointer = a.access_ptr("r", ptr_type=dtype)
            call, at, stride = T.tvm_load_matrix_sync, _at(b, b_row, shape), a_row
        else:
            pointer = b.access_ptr("w", ptr_type=dtype)
            call, at, stride = T.tvm_store_matrix_sync, _at(a, a_row, shape), b_row
        return call((b if loads else a).data, m, n, k, at, pointer, stride, "row_major", dtype="void")

    @T.prim_func(s_tir=True)
    def description(a_handle: T.handle, b_handle: T.handle) -> None:
        a = T.match_buffer(a_handle, shape, dtype, align=64, offset_factor=columns, scope=source)
        b = T.match_buffer(b_handle, shape, dtype, align=64, offset_factor=columns, scope=target)
        with T.sblock("root"):
            T.reads(a[0:rows, 0:columns])
            T.writes(b[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    b[vi, vj] = a[vi, vj]

    @T.prim_func(s_tir=True)
    def implementation(a_handle: T.handle, b_handle: T.handle) -> None:
        a_row, a_element, b_row, b_element = T.int32(), T.int32(), T.int32(), T.int32()
        a = T.match_buffer(
            a_handle, shape, dtype, align=64, offset_factor=columns, scope=source, strides=[a_row, a_element]
        )
        b = T.match_buffer(
            b_handle, shape, dtype, align=64, offset_factor=columns, scope=target, strides=[b_row, b_element]
        )
        with T.sblock("root"):
            T.reads(a[0:rows, 0:columns])
            T.writes(b[0:rows, 0:columns])
            T.evaluate(move(a, a_row, b, b_row))

    return description, implementation


def _multiply(m: int, n: int, k: int) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    @T.prim_func(s_tir=True)
    def description(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        a = T.match_buffer(a_handle, (m, k), "float16", align=64, offset_factor=k, scope="wmma.matrix_a")
        b = T.match_buffer(b_handle, (k, n), "float16", align=64, offset_factor=n, scope="wmma.matrix_b")
        c = T.match_buffer(c_handle, (m, n), "float32", align=64, offset_factor=n, scope="wmma.accumulator")
        with T.sblock("root"):
            T.reads(c[0:m, 0:n], a[0:m, 0:k], b[0:k, 0:n])
            T.writes(c[0:m, 0:n])
            for i, j, step in T.grid(m, n, k):
                with T.sblock("element"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, step])
                    c[vi, vj] = c[vi, vj] + T.Cast("float32", a[vi, vk]) * T.Cast("float32", b[vk, vj])

    @T.prim_func(s_tir=True)
    def implementation(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        a_row, b_row, c_row = T.int32(), T.int32(), T.int32()
        a_element, b_element, c_element = T.int32(), T.int32(), T.int32()
        a = T.match_buffer(
            a_handle, (m, k), "float16", align=64, offset_factor=k, scope="wmma.matrix_a", strides=[a_row, a_element]
        )
        b = T.match_buffer(
            b_handle, (k, n), "float16", align=64, offset_factor=n, scope="wmma.matrix_b", strides=[b_row, b_element]
        )
        c = T.match_buffer(
            c_handle, (m, n), "float32", align=64, offset_factor=n, scope="wmma.accumulator", strides=[c_row, c_element]
        )
        with T.sblock("root"):
            T.reads(c[0:m, 0:n], a[0:m, 0:k], b[0:k, 0:n])
            T.writes(c[0:m, 0:n])
            T.evaluate(
                T.tvm_mma_sync(
                    c.data, _at(c, c_row, (m, n)), a.data, _at(a, a_row, (m, k)),
                    b.data, _at(b, b_row, (k, n)), c.data, _at(c, c_row, (m, n)), dtype="void",
                )
            )  # fmt: skip

    return description, implementation
