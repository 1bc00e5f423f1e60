"""What threads do together: barriers, shuffles, atomics, reductions across threads, against NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te
from tvm.script import tirx as T

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen import disassemble, pipeline

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
Emitted = Callable[..., list[tuple[dict[str, Any], bytes]]]

# Mesa's llvmpipe and all other devices so far have subgroups of 8 threads or a multiple of that.
WARP = 8


# Barriers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["shared", "shared.dyn"])
def test_barriers_in_a_loop(scope: str, run: Run) -> None:
    """A sum by halving: every round reads what other threads wrote in the previous one."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((8, 128), "int32"), out: T.Buffer((8,), "int32")):
        for i in T.thread_binding(8, "blockIdx.x"):
            for j in T.thread_binding(128, "threadIdx.x"):
                with T.sblock("all"):
                    row, v = T.axis.remap("SS", [i, j])
                    held = T.sblock_alloc_buffer((128,), "int32", scope=scope)
                    held[v] = x[row, v]
                    for k in range(7):
                        T.tvm_storage_sync(scope)
                        if v < T.shift_right(64, k):
                            held[v] = held[v] + held[v + T.shift_right(64, k)]
                    if v == 0:
                        out[row] = held[0]

    x = np.random.default_rng(0).integers(-99, 99, (8, 128), "int32")
    np.testing.assert_array_equal(run(kernel, x, np.zeros(8, "int32"))[-1], x.sum(1))


def test_barrier_orders_global_memory_within_a_workgroup(run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "int32"), held: T.Buffer((64,), "int32"), out: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                held[v] = x[v] * 2
                T.tvm_storage_sync("shared")
                out[v] = held[63 - v]

    x = np.arange(64, dtype="int32")
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x), np.zeros_like(x))[-1], 2 * x[::-1])


def test_barrier_of_a_subgroup(run: Run) -> None:
    """A warp barrier lets the threads of one subgroup exchange data through shared memory."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), "int32"), out: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                held = T.sblock_alloc_buffer((64,), "int32", scope="shared")
                held[v] = x[v]
                T.tvm_storage_sync("warp")
                out[v] = held[T.bitwise_xor(v, 3)]

    x = np.arange(64, dtype="int32")
    np.testing.assert_array_equal(run(kernel, x, np.zeros_like(x))[-1], x ^ 3)


def _sync_in_branch(n: int) -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((2, n), "int32"), out: T.Buffer((2, n), "int32")):
        for j in T.thread_binding(2, "threadIdx.y"):
            for i in T.thread_binding(n, "threadIdx.x"):
                with T.sblock("all"):
                    row, v = T.axis.remap("SS", [j, i])
                    held = T.sblock_alloc_buffer((2, n), "int32", scope="shared")
                    held[row, v] = x[row, v]
                    if v < n // 2:
                        T.tvm_storage_sync("warp")
                        out[row, v] = held[row, v + n // 2]

    return kernel


def test_warp_barrier_states_the_subgroup_that_it_needs(emitted: Emitted) -> None:
    """Rows of whole subgroups stay unchanged; others are laid out in one row, whose order Vulkan defines."""
    for n, size in ((16, [16, 2, 1]), (12, [24, 1, 1])):
        ((record, _),) = emitted(_sync_in_branch(n), {"kind": "vulkan", "thread_warp_size": WARP})
        assert (record["subgroup_size"], record["workgroup_size"]) == (WARP, size)


def test_warp_barrier_in_a_branch_needs_a_warp_size(emitted: Emitted) -> None:
    with pytest.raises(CompileError, match=r"kernel_kernel.*thread_warp_size"):
        emitted(_sync_in_branch(8))


# Shuffles -------------------------------------------------------------------------------------------------------

LANE = np.arange(64)


def _down(width: int, distance: int) -> Array:
    inside = LANE % width + distance < width
    return np.where(inside, LANE + distance, LANE)


def _up(width: int, distance: int) -> Array:
    return np.where(LANE % width >= distance, LANE - distance, LANE)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_shuffles(dtype: str, width: int, run: Run, emitted: Emitted) -> None:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), dtype), out: T.Buffer((5, 64), dtype)):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                held = T.sblock_alloc_buffer((1,), dtype, scope="local")
                held[0] = x[v]
                mask: T.let = T.tvm_warp_activemask()
                out[0, v] = T.tvm_warp_shuffle(mask, held[0], 1, width, WARP)
                out[1, v] = T.tvm_warp_shuffle_up(mask, held[0], 1, width, WARP)
                out[2, v] = T.tvm_warp_shuffle_down(mask, held[0], 1, width, WARP)
                out[3, v] = T.tvm_warp_shuffle_xor(mask, held[0], width // 2, width, WARP)
                out[4, v] = T.tvm_warp_shuffle(mask, held[0], 3 * width + 1, width, WARP)

    x = np.random.default_rng(0).integers(0, 100, 64).astype(dtype)
    sources = [LANE // width * width + 1, _up(width, 1), _down(width, 1), LANE ^ (width // 2)]
    sources.append(sources[0])  # lanes count modulo the width
    np.testing.assert_array_equal(run(kernel, x, np.zeros((5, 64), dtype))[-1], [x[source] for source in sources])
    ((record, _),) = emitted(kernel)
    assert record["subgroup_size"] == WARP
    assert "subgroup_shuffle" in record["features"]


def test_active_mask(run: Run, listed: dict[str, Any]) -> None:
    @T.prim_func(s_tir=True)
    def kernel(out: T.Buffer((8,), "uint32")):
        for i in T.thread_binding(8, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(8, i)
                out[v] = T.tvm_warp_activemask()

    out = run(kernel, np.zeros(8, "uint32"))[-1]
    subgroup = min(8, listed["limits"]["subgroup_size"])
    np.testing.assert_array_equal(out & 0xFF, np.full(8, (1 << subgroup) - 1, "uint32"))


# Reductions across threads, as TVM lowers them ------------------------------------------------------------------


def _row_sums(threads: int, dtype: str, reducer: Any) -> tvm.IRModule:
    k = te.reduce_axis((0, 256), "k")
    x = te.placeholder((16, 256), dtype, "x")
    out = te.compute((16,), lambda i: reducer(x[i, k], axis=k), "out")
    sch = tvm.s_tir.Schedule(te.create_prim_func([x, out]))
    row, column = sch.get_loops(sch.get_sblock("out"))
    _, thread = sch.split(column, [None, threads])
    sch.bind(row, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return sch.mod


@pytest.mark.parametrize("threads", [4, 8, 32, 128])
@pytest.mark.parametrize(("reducer", "reference"), [(te.sum, np.sum), (te.max, np.max), (te.min, np.min)])
@pytest.mark.parametrize("dtype", ["int32", "float32", "float16"])
def test_reductions(dtype: str, reducer: Any, reference: Any, threads: int, run: Run, emitted: Emitted) -> None:
    """The stock pipeline uses shared memory; ours uses shuffles and subgroup barriers."""
    mod = _row_sums(threads, dtype, reducer)
    x = np.random.default_rng(0).integers(-3, 4, (16, 256)).astype(dtype)
    want = reference(x.astype("float64"), axis=1).astype(dtype)
    np.testing.assert_array_equal(run(mod, x, np.zeros(16, dtype))[-1], want)
    pipeline.register()
    target = {"kind": "vulkan", "thread_warp_size": WARP}
    ours = run(mod, x, np.zeros(16, dtype), target=target, pipeline=pipeline.NAME)[-1]
    np.testing.assert_array_equal(ours, want)
    ((record, _),) = emitted(mod, target, pipeline.NAME)
    assert record["subgroup_size"] == WARP
    assert ("subgroup_shuffle" in record["features"]) == (threads <= WARP**2)


# Atomics --------------------------------------------------------------------------------------------------------

ATOMICS = {
    "atomicAdd": np.add,
    "atomicMin": np.minimum,
    "atomicMax": np.maximum,
    "atomicAnd": np.bitwise_and,
    "atomicOr": np.bitwise_or,
    "atomicXor": np.bitwise_xor,
}


def _histogram(name: str, dtype: str) -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((512,), dtype), bins: T.Buffer((512,), "int32"), out: T.Buffer((16,), dtype)):
        for i in T.thread_binding(8, "blockIdx.x"):
            for j in T.thread_binding(64, "threadIdx.x"):
                with T.sblock("all"):
                    v = T.axis.spatial(512, i * 64 + j)
                    T.reads(x[v], bins[v])
                    T.writes(out[0:16])
                    T.evaluate(T.call_extern(dtype, name, T.address_of(out[bins[v]]), x[v]))

    return kernel


def _shared_histogram(name: str, dtype: str) -> Any:
    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((64,), dtype), bins: T.Buffer((64,), "int32"), out: T.Buffer((16,), dtype)):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                T.reads(x[v], bins[v], out[0:16])
                T.writes(out[0:16])
                held = T.sblock_alloc_buffer((16,), dtype, scope="shared")
                if v < 16:
                    held[v] = out[v]
                T.tvm_storage_sync("shared")
                T.evaluate(T.call_extern(dtype, name, T.address_of(held[bins[v]]), x[v]))
                T.tvm_storage_sync("shared")
                if v < 16:
                    out[v] = held[v]

    return kernel


@pytest.mark.parametrize("memory", ["global", "shared"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ATOMICS for dtype in ("int32", "uint32")]
    + [(name, "float32") for name in ("atomicAdd", "atomicMin", "atomicMax")],
)
def test_atomics(name: str, dtype: str, memory: str, run: Run) -> None:
    size = 512 if memory == "global" else 64
    rng = np.random.default_rng(0)
    x = rng.integers(0 if dtype == "uint32" else -1000, 1000, size).astype(dtype)
    bins = rng.integers(0, 16, size, "int32")
    out = rng.integers(0, 100, 16).astype(dtype)
    want = out.copy()
    ATOMICS[name].at(want, bins, x)
    kernel = _histogram(name, dtype) if memory == "global" else _shared_histogram(name, dtype)
    np.testing.assert_array_equal(run(kernel, x, bins, out)[-1], want)


def test_atomic_add_gives_the_value_before(run: Run) -> None:
    """Every thread draws a ticket; the shared counter is the operator tirx.atomic_add."""

    @T.prim_func(s_tir=True)
    def kernel(counter: T.Buffer((1,), "int32"), tickets: T.Buffer((256,), "int32")):
        for i in T.thread_binding(4, "blockIdx.x"):
            for j in T.thread_binding(64, "threadIdx.x"):
                with T.sblock("all"):
                    v = T.axis.spatial(256, i * 64 + j)
                    tickets[v] = T.call_extern("int32", "atomicAdd", T.address_of(counter[0]), 2)

    counter, tickets = run(kernel, np.array([5], "int32"), np.zeros(256, "int32"))
    np.testing.assert_array_equal(np.sort(tickets), 5 + 2 * np.arange(256))
    assert counter[0] == 5 + 512


def test_atomic_exchange(run: Run) -> None:
    @T.prim_func(s_tir=True)
    def kernel(place: T.Buffer((1,), "int32"), out: T.Buffer((64,), "int32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("all"):
                v = T.axis.spatial(64, i)
                out[v] = T.call_extern("int32", "atomicExch", T.address_of(place[0]), v)

    place, out = run(kernel, np.array([99], "int32"), np.zeros(64, "int32"))
    np.testing.assert_array_equal(np.sort(np.append(out, place)), [*range(64), 99])


def test_atomic_add_of_float32_needs_a_feature_in_global_memory_only(emitted: Emitted) -> None:
    ((record, code),) = emitted(_histogram("atomicAdd", "float32"))
    assert "buffer_float32_atomic_add" in record["features"]
    assert "OpAtomicFAddEXT" in disassemble(code)
    ((record, code),) = emitted(_shared_histogram("atomicAdd", "float32"))
    assert record["features"] == []
    assert "OpAtomicCompareExchange" in disassemble(code)
