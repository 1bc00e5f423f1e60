"""Faults that the emulation must find, and correct programs that it must accept."""

import functools

import numpy as np
import pytest
from tvm import tirx
from tvm.script import tirx as T

from tests.cuda.emulation import EmulationError, run
from tests.cuda.emulation.raw import asm, kernel

THREADS = 64
SHARED = "r((unsigned)__cvta_generic_to_shared(memory + {index}))"
LDMATRIX = asm("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1]", ["r(y[thread])"], ["r(place)"])
MMA = asm(
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3}",
    [f"f(sum[{i}])" for i in range(4)],
    ["r(0)", "r(0)", "r(0)"],
)
FAR = "4096"  # far enough to be another tensor's, near enough to be another row's

# Statements of 64 threads with x (64,), whose first word says which of them run, y (64,) and `memory` (64,) in shared
# memory, and what the error says. `zero` is 0, but the compiler does not know that.
MISTAKES: dict[str, tuple[str, str]] = {
    "load past a tensor": ("y[thread] = x[thread + 1];", "out of bounds"),
    "load far past a tensor": (f"y[thread] = x[thread + {FAR}];", "out of bounds"),
    "load before a tensor": ("y[thread] = x[thread - 1];", "out of bounds"),
    "store past a tensor": ("y[thread + 1] = 0;", "out of bounds"),
    "asynchronous copy from past a tensor": (
        asm("cp.async.ca.shared.global [%0], [%1], 4", [], [SHARED.format(index="thread"), "l(x + thread + 1)"]),
        "out of bounds",
    ),
    "asynchronous copy past shared memory": (
        asm("cp.async.ca.shared.global [%0], [%1], 4", [], [SHARED.format(index="thread + 1"), "l(x + thread)"]),
        "out of bounds",
    ),
    "store past shared memory": ("memory[thread + 1] = 0;", "out of bounds"),
    "load past shared memory, by its address": (
        asm("ld.shared.b32 %0, [%1 + 4]", ["r(y[thread])"], [SHARED.format(index="thread")]),
        "out of bounds",
    ),
    "no address of shared memory": (asm("ld.shared.b32 %0, [%1]", ["r(y[thread])"], ["r(zero)"]), "out of bounds"),
    "matrix past shared memory": (
        f"unsigned place = {SHARED[2:-1].format(index='60 + zero')} + 16; {LDMATRIX}",
        "out of bounds",
    ),
    "local array": ("unsigned array[4] = {}; array[4 + zero] = 1; y[thread] = array[0];", "out of bounds"),
    "local array, by a pointer": (
        "unsigned array[4] = {}; *(array + 4 + zero) = 1; y[thread] = array[0];",
        "out of bounds",
    ),
    "misaligned vector": ("y[thread] = ((const uint4*)(x + 1 + zero))->x;", "misaligned"),
    "misaligned copy": (
        asm("cp.async.ca.shared.global [%0], [%1], 8", [], [SHARED.format(index="1"), "l(x)"]),
        "not a multiple of 8",
    ),
    "misaligned matrix": (f"unsigned place = {SHARED[2:-1].format(index='1')}; {LDMATRIX}", "not a multiple of 16"),
    "no barrier": ("memory[thread] = thread; y[thread] = memory[63 - thread];", "barrier is missing"),
    "no barrier between warps": (
        "memory[thread] = thread; __syncwarp(); y[thread] = memory[thread ^ 32];",
        "barrier is missing",
    ),
    "no second barrier": (
        "memory[thread] = 1; __syncthreads(); y[thread] = memory[thread ^ 1]; memory[thread] = 2 * thread;",
        "barrier is missing",
    ),
    "blocks race": ("y[0] = blockIdx.x;", "blocks race"),
    "barrier for half of the block": ("if (thread < 32) __syncthreads();", "32 threads wait at a barrier"),
    "shuffle with an ended thread": ("if (thread != 5) y[thread] = __shfl_sync(~0u, x[thread], 5);", "ended"),
    "shuffles of two kinds": (
        "y[thread] = thread % 2 ? __shfl_sync(~0u, x[thread], 5) : __ballot_sync(~0u, 1);",
        "deadlock",
    ),
    "not in its own mask": ("y[thread] = __shfl_sync(0xFFFFu, x[thread], 5);", "not in its own mask"),
    "matrix product in a branch": (f"float sum[4] = {{}}; if (thread % 32 < 16) {{ {MMA} }}", "ended"),
    "division by zero": ("y[thread] = 1 / zero;", "division by zero"),
    "trap": ("if (thread == 3) __trap();", "trapped"),
}


@functools.cache
def mistakes() -> tirx.PrimFunc:
    cases = [f"case {i}: {{ {statements} }} break;" for i, (statements, _) in enumerate(MISTAKES.values())]
    body = "const int zero = x[1];\n__shared__ __align__(16) unsigned memory[64];\n"
    return kernel(body + "switch (x[0]) {\n" + "\n".join(cases) + "\n}", THREADS, THREADS, THREADS, blocks=2)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    x = np.zeros(THREADS, np.uint32)
    x[0] = list(MISTAKES).index(name)
    with pytest.raises(EmulationError, match=MISTAKES[name][1]):
        run(mistakes(), [x, np.zeros_like(x)])


ORDERED = "__syncwarp();"
SHUFFLED = "__shfl_sync(~0u, 1, 0);"  # orders no memory, though here all lanes meet
WAIT = 'asm volatile("cp.async.wait_all;");'
COPY = asm("cp.async.ca.shared.global [%0], [%1], 4", [], [SHARED.format(index="thread"), "l(x + thread)"])
LOAD_ROW = f"unsigned place = {SHARED[2:-1].format(index='thread % 8 * 4')}; {LDMATRIX}"

# Statements before a barrier, the barrier, which one program leaves out, and statements after it. Either order of
# threads gives the same results.
HALVES = "__syncwarp(thread % 32 < 16 ? 0xFFFFu : 0xFFFF0000u);"
RACES: dict[str, tuple[str, str, str]] = {
    "lanes": (f"memory[thread] = 1; {SHUFFLED}", ORDERED, "y[thread] = memory[thread ^ 1];"),
    "loads before stores": (f"y[thread] = memory[thread ^ 1]; {SHUFFLED}", ORDERED, "memory[thread] = 1;"),
    "stores": (f"memory[thread] = 1; {SHUFFLED}", ORDERED, "memory[thread ^ 1] = 1;"),
    "halves of a warp": (f"memory[thread] = 1; {HALVES} {SHUFFLED}", ORDERED, "y[thread] = memory[thread ^ 16];"),
    "bytes": (f"((char*)memory)[thread] = 1; {ORDERED}", "__syncthreads();", "y[thread] = memory[thread / 4 ^ 8];"),
    "matrix": (f"memory[thread] = 1; {SHUFFLED}", "__syncthreads();", LOAD_ROW),
    "asynchronous copy": (f"{COPY} {WAIT} {SHUFFLED}", ORDERED, "y[thread] = memory[thread ^ 1];"),
    "asynchronous copy over what is read": (f"y[thread] = memory[thread ^ 1]; {SHUFFLED}", ORDERED, f"{COPY} {WAIT}"),
}


@functools.cache
def races() -> tirx.PrimFunc:
    programs = [(before, barrier * keeps, after) for before, barrier, after in RACES.values() for keeps in (1, 0)]
    cases = [f"case {i}: {{ {' '.join(program)} }} break;" for i, program in enumerate(programs)]
    body = "__shared__ __align__(16) unsigned memory[64];\nmemory[thread] = 0;\n__syncthreads();\n"
    return kernel(body + "switch (x[0]) {\n" + "\n".join(cases) + "\n}", THREADS, THREADS, THREADS)


@pytest.mark.parametrize("name", RACES)
def test_races(name: str) -> None:
    x = np.zeros(THREADS, np.uint32)
    x[0] = 2 * list(RACES).index(name)
    run(races(), [x, np.zeros_like(x)], races=True)
    x[0] += 1
    with pytest.raises(EmulationError, match="a barrier is missing: thread"):
        run(races(), [x, np.zeros_like(x)], races=True)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("tcgen05.wait::ld.sync.aligned", "tcgen05.wait::ld.sync.aligned is not emulated"),
        ("mov.b32 %0, %%clock", "%%clock' is not emulated"),
        ("{ .reg .b128 r; }", "type .b128"),
        ("ld.global.b128 %0, [%0]", "ld.global.b128 is not emulated"),
    ],
)
def test_unknown_ptx(instruction: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(kernel(asm(instruction, ["r(y[thread])"], []), 32, 32), [np.zeros(32, np.uint32)] * 2)


def test_poison() -> None:
    """Shared memory and local variables hold no usable value before one is written."""
    body = """
      __shared__ half memory[32];
      half local;
      float wide;
      y[thread] = isnan((float)memory[thread]) && isnan((float)local) && wide < -1e38f;
    """
    y = np.zeros(32, np.uint32)
    run(kernel(body, 32, 32), [y.copy(), y])
    assert (y == 1).all()


def test_host_code_and_dynamic_shared_memory() -> None:
    """The grid is symbolic and three-dimensional, shared memory is a pool, a workspace connects two kernels."""

    @T.prim_func
    def function(x_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n, m = T.int32(), T.int32()
        x = T.match_buffer(x_handle, (n, m, 2, 64), "float16")
        y = T.match_buffer(y_handle, (n, m, 2, 64), "float16")
        i = T.launch_thread("blockIdx.z", n)
        j = T.launch_thread("blockIdx.y", m)
        k = T.launch_thread("blockIdx.x", 2)
        thread = T.launch_thread("threadIdx.x", 64)
        pool = T.SMEMPool()
        first = pool.alloc((64,), "float16")
        second = pool.alloc((64,), "float32")
        pool.commit()
        first[thread] = x[i, j, k, thread]
        T.cuda.cta_sync()
        second[thread] = T.Cast("float32", first[63 - thread]) * T.float32(3.0)
        T.cuda.cta_sync()
        y[i, j, k, thread] = T.Cast("float16", second[(thread + 1) % 64])

    for shape in ((1, 3, 2, 64), (2, 1, 2, 64)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
        y = np.zeros_like(x)
        run(function, [x, y])
        tripled = (x.astype(np.float32) * 3).astype(np.float16)
        np.testing.assert_array_equal(y, np.roll(tripled[..., ::-1], -1, axis=-1))


def test_last_block_merges() -> None:
    """Blocks write their parts to memory; the last one adds them up in a fixed order."""
    body = """
      __shared__ int last;
      y[1 + blockIdx.x] = x[blockIdx.x];
      __threadfence();
      __syncthreads();
      if (thread == 0) last = atomicInc(y + 9, gridDim.x - 1) == gridDim.x - 1;
      __syncthreads();
      if (last && thread == 0) {
        unsigned sum = 0;
        for (int i = 0; i < 8; ++i) sum = sum * 3 + y[1 + i];
        y[0] = sum;
      }
    """
    x, y = np.arange(8, dtype=np.uint32), np.zeros(10, np.uint32)
    run(kernel(body, 8, 10, 32, 8), [x, y])
    assert y[0] == functools.reduce(lambda total, number: total * 3 + number, range(8), 0) and y[9] == 0


@pytest.mark.parametrize("shared", [True, False])
def test_two_calls_at_the_same_time(shared: bool) -> None:
    """Counters of the module are shared by all calls, counters among the arguments are not."""
    counter = "counter" if shared else "y + 9"
    body = f"""
      {"__device__ static unsigned counter[1];" if shared else ""}
      y[1 + blockIdx.x] = x[blockIdx.x];
      __threadfence();
      if (thread == 0 && atomicInc({counter}, gridDim.x - 1) == gridDim.x - 1) {{
        unsigned sum = 0;
        for (int i = 0; i < 8; ++i) sum += y[1 + i];
        y[0] = sum;
      }}
    """
    x, y = np.arange(8, dtype=np.uint32), np.zeros(10, np.uint32)
    if shared:
        with pytest.raises(EmulationError, match="when two calls run at the same time: they share memory"):
            run(kernel(body, 8, 10, 32, 8), [x, y])
    else:
        run(kernel(body, 8, 10, 32, 8), [x, y])
        assert y[0] == x.sum()


def test_named_barriers() -> None:
    """Two warps meet at their own barrier after the others have ended."""
    barrier = 'asm volatile("bar.sync 1, 64;");'
    body = f"""
      __shared__ unsigned memory[64];
      if (thread >= 64) return;
      memory[thread] = x[thread];
      {barrier}
      y[thread] = memory[63 - thread];
    """
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    run(kernel(body, 64, 64, 128), [x, y])
    np.testing.assert_array_equal(y, x[::-1])
