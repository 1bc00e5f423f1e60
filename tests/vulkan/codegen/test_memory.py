"""Buffers of every type and scope, vectors of any width, indices of 32 and 64 bits, against NumPy."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen import disassemble

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
Elementwise = Callable[..., Array]
Emitted = Callable[..., list[tuple[dict[str, Any], bytes]]]

TYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
TYPES += ["float16", "bfloat16", "float32", "float64"]
WIDTHS = [2, 3, 4, 5, 8, 16]


def samples(dtype: str, shape: int | tuple[int, ...], seed: int = 0) -> Array:
    """Small integers, which every type but bool holds exactly."""
    integers = np.random.default_rng(seed).integers(0, 100, shape)
    if dtype == "bool":
        return integers > 50
    return integers.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_shared_and_local_memory(dtype: str, run: Run) -> None:
    """A tile is transposed through shared memory, and its rows are reversed through local memory."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((16, 16), dtype), out: T.Buffer((16, 16), dtype)):
        for i in T.thread_binding(16, "threadIdx.x"):
            with T.sblock("all"):
                row = T.axis.spatial(16, i)
                tile = T.sblock_alloc_buffer((16, 16), dtype, scope="shared")
                held = T.sblock_alloc_buffer((16,), dtype, scope="local")
                for j in range(16):
                    tile[row, j] = x[row, j]
                T.tvm_storage_sync("shared")
                for j in range(16):
                    held[j] = tile[j, row]
                for j in range(16):
                    out[row, j] = held[15 - j]

    x = samples(dtype, (16, 16))
    out = run(kernel, x, np.zeros_like(x))[-1]
    np.testing.assert_array_equal(out.astype("float64"), x.T[:, ::-1].astype("float64"))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES[1:])  # TVM's own lowering fails on stores of bool vectors.
def test_vectors(dtype: str, width: int, run: Run) -> None:
    """A vector is loaded, goes through shared and local memory, and is stored."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((32 * width,), dtype), out: T.Buffer((32 * width,), dtype)):
        for i in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(32, i)
                T.reads(x[0 : 32 * width])
                T.writes(out[0 : 32 * width])
                tile = T.sblock_alloc_buffer((32 * width,), dtype, scope="shared")
                held = T.sblock_alloc_buffer((width,), dtype, scope="local")
                tile[T.Ramp(v * width, 1, width)] = x[T.Ramp(v * width, 1, width)]
                T.tvm_storage_sync("shared")
                held[T.Ramp(0, 1, width)] = tile[T.Ramp((31 - v) * width, 1, width)]
                out[T.Ramp(v * width, 1, width)] = held[T.Ramp(0, 1, width)]

    x = samples(dtype, 32 * width)
    want = x.reshape(32, width)[::-1].reshape(-1)
    out = run(kernel, x, np.zeros_like(x))[-1]
    np.testing.assert_array_equal(out.astype("float64"), want.astype("float64"))


@pytest.mark.parametrize("width", WIDTHS)
def test_vector_arithmetic_with_broadcasts(width: int, elementwise: Elementwise) -> None:
    x, y = (np.random.default_rng(s).standard_normal(32 * width * 3).astype("float32") for s in (1, 2))
    got = elementwise(lambda a, b: a * 2.0 + tvm.tirx.max(a, b) - 1.0, [x, y], "float32", lanes=width)
    np.testing.assert_allclose(got, x * 2.0 + np.maximum(x, y) - 1, rtol=1e-6, atol=1e-6)


def test_vectors_with_a_stride_and_gathers(run: Run) -> None:
    """A ramp with a stride, one that runs backwards, and positions that are data."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((256,), "float32"), places: T.Buffer((64,), "int32"), out: T.Buffer((3, 64), "float32")):
        for i in T.thread_binding(16, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(16, i)
                T.reads(x[0:256], places[0:64])
                T.writes(out[0:3, 0:64])
                out[0, T.Ramp(v * 4, 1, 4)] = x[T.Ramp(v, 16, 4)]
                out[1, T.Ramp(v * 4, 1, 4)] = x[T.Ramp(v * 4 + 3, -1, 4)]
                out[2, T.Ramp(v * 4, 1, 4)] = x[places[T.Ramp(v * 4, 1, 4)]]

    x = np.random.default_rng(0).standard_normal(256).astype("float32")
    places = np.random.default_rng(1).integers(0, 256, 64, "int32")
    v, lane = np.divmod(np.arange(64), 4)
    want = [x[v + 16 * lane], x[v * 4 + 3 - lane], x[places]]
    np.testing.assert_array_equal(run(kernel, x, places, np.zeros((3, 64), "float32"))[-1], want)


def test_operators_on_lanes(run: Run) -> None:
    """Halves of vectors, their combination, and the dot product of four bytes."""

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((256,), "int8"), y: T.Buffer((256,), "int8"), z: T.Buffer((64,), "int32"),
        halves: T.Buffer((256,), "int8"), products: T.Buffer((64,), "int32"),
    ):  # fmt: skip
        for i in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(32, i)
                T.reads(x[0:256], y[0:256], z[0:64])
                T.writes(halves[0:256], products[0:64])
                halves[T.Ramp(v * 8, 1, 8)] = T.vectorcombine(
                    "int8x8",
                    T.vectorhigh("int8x4", x[T.Ramp(v * 8, 1, 8)]),
                    T.vectorlow("int8x4", x[T.Ramp(v * 8, 1, 8)]),
                )
                for j in range(2):
                    products[v * 2 + j] = T.dp4a(
                        x[T.Ramp(v * 8 + j * 4, 1, 4)], y[T.Ramp(v * 8 + j * 4, 1, 4)], z[v * 2 + j]
                    )

    x, y = (np.random.default_rng(seed).integers(-128, 128, 256, "int8") for seed in (0, 1))
    z = np.random.default_rng(2).integers(-(1 << 20), 1 << 20, 64, "int32")
    *_, halves, products = run(kernel, x, y, z, np.zeros_like(x), np.zeros_like(z))
    np.testing.assert_array_equal(halves, np.roll(x.reshape(32, 8), 4, axis=1).reshape(-1))
    np.testing.assert_array_equal(products, (x.astype("int32") * y).reshape(64, 4).sum(1) + z)


def test_unaligned_vectors(run: Run, emitted: Emitted) -> None:
    """Vectors of four at odd positions: the driver is told only what is known, an alignment of one element."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((67,), "float16"), out: T.Buffer((67,), "float16")):
        for i in T.thread_binding(16, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(16, i)
                T.reads(x[0:67])
                T.writes(out[0:67])
                out[T.Ramp(v * 4 + 3, 1, 4)] = x[T.Ramp(v * 4 + 1, 1, 4)]

    x = samples("float16", 67)
    want = np.zeros_like(x)
    want[3:] = x[1:65]
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], want)
    ((_, code),) = emitted(kernel)
    alignments = {line.split("Aligned ")[1] for line in disassemble(code).splitlines() if "Aligned " in line}
    assert alignments == {"2"}


def copies(count: int) -> Any:
    """y_k = x_k for `count` pairs of 64 floats: half in vectors of 4, a quarter in vectors of 2, the rest singly."""
    buffers = [f'{name}{k}: T.Buffer((64,), "float32")' for k in range(count) for name in "xy"]
    lines = ["@T.prim_func(s_tir=True)", f"def kernel({', '.join(buffers)}):"]
    lines += ['    for i in T.thread_binding(16, "threadIdx.x"):']
    for k in range(count):
        for index in ("T.Ramp(i % 8 * 4, 1, 4)", "T.Ramp(i % 8 * 2 + 32, 1, 2)", "i + 48"):
            lines.append(f"        y{k}[{index}] = x{k}[{index}]")
    return tvm.script.from_source("\n".join(lines))


@pytest.mark.parametrize("count", [1, 4])
def test_each_way_of_access_has_a_pointer_of_its_own(run: Run, emitted: Emitted, count: int) -> None:
    """No pointer is cast, which not every driver can do; beyond 128 bytes the pointers come from a buffer."""
    ((record, code),) = emitted(copies(count))
    assert record["aliases"] == [handle for handle in range(2 * count) for _ in range(2)]
    assert (record["block_size"] > 128) == (count > 1)
    text = disassemble(code)
    assert "OpBitcast" not in text
    assert {line.split("Aligned ")[1] for line in text.splitlines() if "Aligned " in line} >= {"4", "8", "16"}
    arrays = [samples("float32", 64, seed) for seed in range(count)]
    arguments = [array for x in arrays for array in (x, np.zeros_like(x))]
    for x, y in zip(arrays, run(copies(count), *arguments)[1::2], strict=True):
        np.testing.assert_array_equal(y, x)


def test_dynamic_shared_memory(run: Run, emitted: Emitted) -> None:
    """Two buffers of different types in one dynamic allocation, whose size is given at launch."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float16"), out: T.Buffer((64,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                first = T.sblock_alloc_buffer((64,), "float32", scope="shared.dyn")
                second = T.sblock_alloc_buffer((64,), "float16", scope="shared.dyn")
                first[v] = x[v]
                second[v] = y[v]
                T.tvm_storage_sync("shared.dyn")
                out[v] = first[63 - v] + T.cast(second[(v + 1) % 64], "float32")

    x, y = samples("float32", 64), samples("float16", 64, 1)
    want = x[::-1] + np.roll(y, -1)
    np.testing.assert_array_equal(run(kernel, x, y, np.zeros_like(x))[-1], want)
    ((record, _),) = emitted(kernel)
    assert record["launch_params"][-1] == "tirx.use_dyn_shared_memory"
    assert record["shared_bytes"] == 0


def test_shared_memory_of_symbolic_size(run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        n = T.int32()
        X = T.match_buffer(x, (n,), "int32")
        Out = T.match_buffer(out, (n,), "int32")
        for i in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(32, i)
                T.reads(X[0:n])
                T.writes(Out[0:n])
                held = T.sblock_alloc_buffer((n,), "int32", scope="shared.dyn")
                for j in range((n + 31) // 32):
                    if j * 32 + v < n:
                        held[j * 32 + v] = X[j * 32 + v]
                T.tvm_storage_sync("shared.dyn")
                for j in range((n + 31) // 32):
                    if j * 32 + v < n:
                        Out[j * 32 + v] = held[n - 1 - (j * 32 + v)]

    for size in (1, 32, 1001):
        x = samples("int32", size)
        np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], x[::-1])


def test_shared_bytes_are_recorded(emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "float16"), out: T.Buffer((64,), "float16")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                tile = T.sblock_alloc_buffer((64,), "float16", scope="shared")
                tile[v] = x[v]
                T.tvm_storage_sync("shared")
                out[v] = tile[63 - v]

    ((record, _),) = emitted(kernel)
    assert record["shared_bytes"] == 128
    assert record["features"] == ["float16", "storage16"]
    assert sorted(zip(record["reads"], record["writes"], strict=True)) == [(False, True), (True, False)]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_symbolic_shapes(dtype: str, run: Run) -> None:
    """A transpose whose shape and strides are known only at the call."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        n, m = T.Var("n", dtype), T.Var("m", dtype)
        X = T.match_buffer(x, (n, m), "float32")
        Out = T.match_buffer(out, (m, n), "float32")
        for i in T.thread_binding((n * m + 63) // 64, "blockIdx.x"):
            for j in T.thread_binding(64, "threadIdx.x"):
                with T.sblock("all"):
                    at = T.axis.spatial(n * m, i * 64 + j)
                    T.where(i * 64 + j < n * m)
                    Out[at % m, at // m] = X[at // m, at % m]

    for shape in ((1, 1), (7, 130), (64, 64)):
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        np.testing.assert_array_equal(run(kernel, x, np.zeros(shape[::-1], "float32"))[-1], x.T)


def test_64_bit_indices_with_known_bounds_need_no_64_bit_arithmetic(run: Run, emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((T.int64(48), T.int64(64)), "float32"), out: T.Buffer((T.int64(64), T.int64(48)), "float32")
    ):
        for i in T.thread_binding(T.int64(48), "blockIdx.x"):
            for j in T.thread_binding(T.int64(64), "threadIdx.x"):
                with T.sblock("all"):
                    row, column = T.axis.remap("SS", [i, j])
                    out[column, row] = x[row, column]

    x = np.random.default_rng(0).standard_normal((48, 64)).astype("float32")
    np.testing.assert_array_equal(run(kernel, x, np.zeros((64, 48), "float32"))[-1], x.T)
    ((record, _),) = emitted(kernel)
    assert "int64" not in record["features"]


def test_64_bit_values_keep_their_upper_half(run: Run) -> None:
    """Values that exceed 32 bits only in between, or in data, are not narrowed."""

    @T.prim_func(s_tir=True)
    def kernel(n: T.int64, out: T.Buffer((4, 64), "int64")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                out[0, v] = T.cast(v, "int64") * T.int64(1 << 40)
                out[1, v] = (T.cast(v, "int64") + n) * n
                out[2, v] = (T.cast(v, "int64") * T.int64(1 << 31)) // T.int64(1 << 30)
                out[3, v] = T.cast(v, "int64") * T.int64(70_000) * T.int64(70_000) - n

    v, n = np.arange(64, dtype="int64"), 3_000_000_017
    want = [v << 40, (v + n) * n, v * 2, v * 70_000 * 70_000 - n]
    np.testing.assert_array_equal(run(kernel, n, np.zeros((4, 64), "int64"))[-1], want)


def test_views_of_other_types(run: Run) -> None:
    """A float32 allocation in shared memory that later holds float16 pairs."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((32,), "float32"), out: T.Buffer((64,), "uint16")):
        for i in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(32, i)
                T.reads(x[0:32])
                T.writes(out[0:64])
                tile = T.sblock_alloc_buffer((32,), "float32", scope="shared")
                halves = T.decl_buffer((64,), "uint16", data=tile.data, scope="shared")
                tile[v] = x[v]
                T.tvm_storage_sync("shared")
                out[v] = halves[63 - v]
                out[v + 32] = halves[31 - v]

    x = np.random.default_rng(0).standard_normal(32).astype("float32")
    np.testing.assert_array_equal(run(kernel, x, np.zeros(64, "uint16"))[-1], x.view("uint16")[::-1])


def test_parameters_of_scope_local_are_private(run: Run) -> None:
    """A buffer of scope "local" that is allocated outside the launch becomes a parameter of the kernel."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((4, 32), "int32"), out: T.Buffer((4, 32), "int32")):
        with T.sblock("root"):
            held = T.sblock_alloc_buffer((3,), "int32", scope="local")
            for b in T.thread_binding(4, "blockIdx.x"):
                for i in T.thread_binding(32, "threadIdx.x"):
                    with T.sblock("all"):
                        row, v = T.axis.remap("SS", [b, i])
                        for k in range(3):
                            held[k] = x[row, (v + k) % 32]
                        T.tvm_storage_sync("shared")
                        out[row, v] = held[0] + 10 * held[v % 3]

    x = np.random.default_rng(0).integers(0, 99, (4, 32), "int32")
    lane = np.arange(32)
    want = x + 10 * x[:, (lane + lane % 3) % 32]
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], want)


def test_parameters_of_scope_local_cannot_be_inputs(emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def kernels(x: T.Buffer((32,), "int32"), out: T.Buffer((32,), "int32")):
        with T.sblock("root"):
            held = T.sblock_alloc_buffer((32,), "int32", scope="local")
            for i in T.thread_binding(32, "threadIdx.x"):
                with T.sblock("first"):
                    v = T.axis.spatial(32, i)
                    held[v] = x[v]
            for i in T.thread_binding(32, "threadIdx.x"):
                with T.sblock("second"):
                    v = T.axis.spatial(32, i)
                    out[v] = held[v]

    with pytest.raises(CompileError, match='scope "local" is read and never written'):
        emitted(kernels)
