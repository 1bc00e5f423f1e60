"""Software prefetch of packed weights, for which there is no schedule primitive.

With a register tile of several rows a core computes so long on a cache line that the loads it has in flight do not
cover memory's latency: 8 rows of float32 read weights at 23 GB/s without prefetch and at 31 GB/s with it, one row at
33 GB/s (benchmarks/README.md).
"""

from __future__ import annotations

from typing import Any

from tvm import ir, s_tir, tirx
from tvm_ffi.structural import structural_map, structural_walk

from tvm_attn.storage import numpy_dtype

ANNOTATION = "tvm_attn.prefetch"
"""On a loop over K of a block "matmul": the rows of the weight that lie between what is fetched and what is used."""

PREFETCH_LLVM = """
define linkonce_odr i32 @tvm_attn_prefetch(ptr %address) alwaysinline {
  call void @llvm.prefetch.p0(ptr %address, i32 0, i32 3, i32 1) memory(inaccessiblemem: readwrite)
  ret i32 0
}
declare void @llvm.prefetch.p0(ptr nocapture readonly, i32 immarg, i32 immarg, i32 immarg)
"""
"""What a function with prefetches imports. TVM's own call could touch any memory as far as LLVM knows, and accumulators
would be stored at every step."""

_LINE_BYTES = 64


def insert_prefetches(function: tirx.PrimFunc, weight: ir.Var, rows_per_step: int) -> tirx.PrimFunc:
    """Fetches, in the loops that carry the annotation, the weight some rows ahead of those that the loop's body uses.

    Past the end of a strip that is the start of the next one; past the end of the weight it is an address that nothing
    reads, which a prefetch may have.

    Args:
        function: its block "matmul" has the iterators (group, strip, row, column, step of K).
        weight: the parameter (strips, rows, C).
        rows_per_step: rows of the weight that a step of K takes.
    """

    _, _, columns = (int(size) for size in weight.ty.shape)
    per_line = _LINE_BYTES // numpy_dtype(str(weight.ty.dtype)).itemsize
    fetched = range(0, rows_per_step * columns, per_line)

    def with_prefetches(loop: tirx.For) -> tirx.For:
        if ANNOTATION not in loop.annotations:
            return loop
        annotations = {name: value for name, value in loop.annotations.items() if name != ANNOTATION}
        strip, step = _first_use(loop.body)
        row = step * rows_per_step + int(loop.annotations[ANNOTATION])
        fetches = [_fetch(weight[strip, row + place // columns, place % columns]) for place in fetched]
        body = tirx.SeqStmt([*fetches, loop.body])
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, annotations=annotations)

    return function.with_body(structural_map(function.body, (tirx.For, with_prefetches)))


def _first_use(body: tirx.Stmt) -> tuple[Any, Any]:
    """The strip and the step of K of the first "matmul" in a statement."""
    zeros: dict[ir.Var, tirx.IntImm] = {}
    matmuls: list[s_tir.SBlockRealize] = []

    def visit(statement: Any) -> None:
        if isinstance(statement, tirx.For):
            zeros[statement.loop_var] = tirx.IntImm("int32", 0)
        elif statement.block.name_hint.startswith("matmul"):
            matmuls.append(statement)

    structural_walk(body, ((tirx.For, s_tir.SBlockRealize), visit))
    _, strip, _, _, step = matmuls[0].iter_values
    strip, step = (structural_map(value, (ir.Var, lambda var: zeros.get(var, var))) for value in (strip, step))
    return strip, step


def _fetch(element: Any) -> tirx.Stmt:
    return tirx.Evaluate(tirx.call_extern("int32", "tvm_attn_prefetch", tirx.address_of(element)))
