"""Measures this machine's limits: arithmetic in registers, and reading memory, with all threads.

The loops are TensorIR, compiled for the machine's target, with as many independent accumulators in vector registers as
the target's matrix multiplication has. The dot products of 16- and 8-bit numbers are LLVM IR text, since TVM rewrites
calls of those intrinsics into something that LLVM rejects.
"""

# The annotations of a kernel, such as `x: T.Buffer((lanes,), "float32")`, are not Python types.
# mypy: disable-error-code="no-untyped-def, valid-type"
from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tvm
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.benchmark.limits import Limits
from tvm_attn.compiler.threads import export_with_threads
from tvm_attn.kernels.cpu.dot import BFLOAT16, INT8, Dot, find_dot
from tvm_attn.targets import CpuTarget

# About 0.05 s of work per thread at 4 GHz: long compared with starting threads, short compared with a time slice.
_STEPS = 10_000_000
_REPEATS = 8
_MAX_BUFFER_BYTES = 1 << 30


def measure_limits(target: CpuTarget, threads: int, max_buffer_bytes: int = _MAX_BUFFER_BYTES) -> Limits:
    """Measures the limits in a few seconds.

    Args:
        target: a target of this machine; its vector width and instruction sets are used.
        threads: threads that run.
        max_buffer_bytes: most memory to read; a quarter of the free memory is never passed.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    read_gbytes, buffer_bytes = _read(target, threads, min(max_buffer_bytes, free // 4))
    return Limits(
        threads=threads,
        float32_gflops=_multiply_add(target, threads),
        read_gbytes=read_gbytes,
        bfloat16_gflops=_dot_product(target, threads, BFLOAT16),
        int8_gops=_dot_product(target, threads, INT8),
        buffer_bytes=buffer_bytes,
    )


def _accumulators(target: CpuTarget) -> int:
    return max(1, target.tile_rows * target.tile_columns // target.lanes)


def _build(function: tirx.PrimFunc, target: CpuTarget, threads: int) -> Callable[..., None]:
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.so"
        built = tvm.tirx.build(module, target=tvm.target.Target(target.tvm))
        export_with_threads(built, file, target.architecture)
        library = tvm.runtime.load_module(str(file))
    library["set_threads"](threads)
    main: Callable[..., None] = library["main"]
    return main


def _best_seconds(call: Callable[[], None]) -> float:
    call()  # starts the threads
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _multiply_add(target: CpuTarget, threads: int) -> float:
    """GFLOP/s of float32 multiply-adds."""
    lanes, count, steps = target.lanes, _accumulators(target), _STEPS

    @T.prim_func(s_tir=True)
    def multiply_add(
        x: T.Buffer((lanes,), "float32"),
        y: T.Buffer((lanes,), "float32"),
        out: T.Buffer((threads, count, lanes), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            with T.sblock("thread"):
                vt = T.axis.spatial(threads, thread)
                T.reads(x[0:lanes], y[0:lanes])
                T.writes(out[vt, 0:count, 0:lanes])
                acc = T.sblock_alloc_buffer((count, lanes), "float32", scope="local")
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        acc[i, lane] = y[lane]
                for _step in range(steps):
                    for i in T.unroll(count):
                        for lane in T.vectorized(lanes):
                            acc[i, lane] = acc[i, lane] * x[lane] + y[lane]
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        out[vt, i, lane] = acc[i, lane]

    run = _build(multiply_add, target, threads)
    # Converges to 2: no overflow, and no denormal numbers, which are slow.
    x, y = tvm.runtime.tensor(np.full(lanes, 0.5, np.float32)), tvm.runtime.tensor(np.ones(lanes, np.float32))
    out = tvm.runtime.empty((threads, count, lanes), "float32")
    return 2e-9 * threads * count * lanes * steps / _best_seconds(lambda: run(x, y, out))


def _read(target: CpuTarget, threads: int, buffer_bytes: int) -> tuple[float, int]:
    """GB/s of summing up a buffer, and its size in bytes."""
    lanes, count = target.lanes, _accumulators(target)
    steps = max(1, buffer_bytes // (4 * threads * count * lanes))

    @T.prim_func(s_tir=True)
    def read(
        data: T.Buffer((threads, steps, count, lanes), "float32"), out: T.Buffer((threads, count, lanes), "float32")
    ):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            with T.sblock("thread"):
                vt = T.axis.spatial(threads, thread)
                T.reads(data[vt, 0:steps, 0:count, 0:lanes])
                T.writes(out[vt, 0:count, 0:lanes])
                acc = T.sblock_alloc_buffer((count, lanes), "float32", scope="local")
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        acc[i, lane] = T.float32(0.0)
                for step in range(steps):
                    for i in T.unroll(count):
                        for lane in T.vectorized(lanes):
                            acc[i, lane] = acc[i, lane] + data[vt, step, i, lane]
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        out[vt, i, lane] = acc[i, lane]

    run = _build(read, target, threads)
    # Written once: pages that never were all map to one page of zeros.
    data = tvm.runtime.empty((threads, steps, count, lanes), "float32")
    np.from_dlpack(data).fill(1.0)
    out = tvm.runtime.empty((threads, count, lanes), "float32")
    moved = 4 * threads * steps * count * lanes
    return moved / 1e9 / _best_seconds(lambda: run(data, out)), moved


_ONES = {BFLOAT16: 0x3F803F80, INT8: 0x01010101}


def _dot_product(target: CpuTarget, threads: int, kind: str) -> float | None:
    """GFLOP/s (or GOP/s) of a dot product instruction; None if the target has none of that kind."""
    dot = find_dot(kind, target)
    if dot is None:
        return None
    count, steps, words = _accumulators(target), _STEPS, dot.lanes
    text, operations = _dot_loop(dot, count), words * (4 if kind == BFLOAT16 else 8)

    @T.prim_func(s_tir=True)
    def dot_product(x: T.Buffer((words,), "int32"), out: T.Buffer((threads, count, words), "int32")):
        T.func_attr({"tirx.noalias": True})
        with T.attr(0, "pragma_import_llvm", text):
            for thread in T.parallel(threads):
                T.evaluate(
                    T.call_extern(
                        "void", "tvm_attn_dot", T.address_of(x[0]), T.address_of(out[thread, 0, 0]), T.int64(steps)
                    )
                )

    run = _build(dot_product, target, threads)
    x = tvm.runtime.tensor(np.full(words, _ONES[kind], np.int32))
    out = tvm.runtime.empty((threads, count, words), "int32")
    return 1e-9 * operations * threads * count * steps / _best_seconds(lambda: run(x, out))


def _dot_loop(dot: Dot, count: int) -> str:
    """LLVM IR: `steps` times, each of `count` accumulators takes the dot product of x with itself."""
    acc, operand, each = dot.sums, dot.operand, range(count)
    lines = [
        dot.declaration,
        "define void @tvm_attn_dot(ptr %x, ptr %out, i64 %steps) alwaysinline {",
        "entry:",
        f"  %v = load {operand}, ptr %x, align 4",
        "  br label %loop",
        "loop:",
        "  %step = phi i64 [ 0, %entry ], [ %next, %loop ]",
        *(f"  %a{i} = phi {acc} [ zeroinitializer, %entry ], [ %b{i}, %loop ]" for i in each),
        *(f"  %b{i} = call {acc} @{dot.intrinsic}({acc} %a{i}, {operand} %v, {operand} %v)" for i in each),
        "  %next = add i64 %step, 1",
        "  %done = icmp eq i64 %next, %steps",
        "  br i1 %done, label %exit, label %loop",
        "exit:",
        *(f"  %p{i} = getelementptr i8, ptr %out, i64 {4 * dot.lanes * i}" for i in each),
        *(f"  store {acc} %b{i}, ptr %p{i}, align 4" for i in each),
        "  ret void",
        "}",
    ]
    return "\n".join(lines)
