"""Software prefetch in matrix multiplications, for which there is no schedule primitive.

A register tile of several rows keeps a core busy for so long that its loads and stores are issued too late to cover
the latency of memory (benchmarks/README.md):

- 8 rows of float32 read weights at 19 GB/s without prefetch and at 26 GB/s with it, one row at 27 GB/s;
- with many rows, a core waits at the end of each tile for the cache lines of the tile's results.

Weights are fetched into the level-2 cache: fetches into level 1 would occupy its few miss buffers while they wait for
memory, and displace the rows of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import ir, s_tir, tirx
from tvm_ffi.structural import structural_map, structural_walk

from tvm_attn.storage import numpy_dtype

AHEAD = "tvm_attn.prefetch_ahead"
"""Annotation of the loop over K of a block "matmul": how many rows of the weight to fetch ahead of those in use."""
TILES = "tvm_attn.prefetch_tiles"
"""Annotation of the loop over the groups of a block: a tile's results, and the residual that its epilogue reads, are
fetched before the tile is computed."""

PREFETCH, PREFETCH_TO_WRITE = "tvm_attn_prefetch", "tvm_attn_prefetch_to_write"
"""Functions of an address: fetch its cache line into level 2, or into level 1 for writing."""

PREFETCH_LLVM = """
define linkonce_odr i32 @tvm_attn_prefetch(ptr %address) alwaysinline {
  call void @llvm.prefetch.p0(ptr %address, i32 0, i32 2, i32 1) memory(inaccessiblemem: readwrite)
  ret i32 0
}
define linkonce_odr i32 @tvm_attn_prefetch_to_write(ptr %address) alwaysinline {
  call void @llvm.prefetch.p0(ptr %address, i32 1, i32 3, i32 1) memory(inaccessiblemem: readwrite)
  ret i32 0
}
declare void @llvm.prefetch.p0(ptr nocapture readonly, i32 immarg, i32 immarg, i32 immarg)
"""
"""LLVM IR of these functions, which a kernel with prefetches imports. As far as LLVM knows, TVM's own call could touch
any memory, and accumulators would be stored at every step."""

_LINE_BYTES = 64
_LINE_FLOATS = _LINE_BYTES // 4


def insert_prefetches(
    function: tirx.PrimFunc, weight: ir.Var, rows_per_step: int, residual: ir.Var | None = None
) -> tirx.PrimFunc:
    """Adds prefetches to the loops that carry an annotation of this module.

    Prefetches past the end of a strip fetch the next one. Past the end of the weight they name memory that nothing
    reads, which is allowed.

    Args:
        function: its blocks "matmul" and "epilogue" have the iterators (group, strip, row, column, ...); the last one
            of "matmul" is the step of K.
        weight: the parameter (strips, rows, C).
        rows_per_step: rows of the weight that a step of K takes.
        residual: the parameter (groups, R, N) that the epilogue adds, if any.
    """
    columns = int(weight.ty.shape[2])
    per_line = _LINE_BYTES // numpy_dtype(str(weight.ty.dtype)).itemsize

    def ahead(loop: tirx.For) -> tirx.For:
        if AHEAD not in loop.annotations:
            return loop
        _, strip, _, _, step = _first_indices("matmul", loop.body)
        row = step * rows_per_step + int(loop.annotations[AHEAD])
        places = range(0, rows_per_step * columns, per_line)
        fetches = [_fetch(weight[strip, row + place // columns, place % columns]) for place in places]
        return _with_body(loop, AHEAD, [*fetches, loop.body])

    def tiles(loop: tirx.For) -> tirx.For:
        if TILES not in loop.annotations:
            return loop
        group, strip, *_ = _first_indices("epilogue", loop.body)
        count = tirx.min(loop.extent, function.params[0].ty.shape[0] - _substitute(group, {loop.loop_var: 0}))
        results = _results(_block("epilogue", loop.body), group, strip, columns, residual)
        # The loop may run past the last group: there is nothing to fetch then.
        return _with_body(
            loop, TILES, [tirx.IfThenElse(loop.loop_var < count, tirx.SeqStmt([*results, loop.body]), None)]
        )

    body = structural_map(function.body, (tirx.For, ahead))
    return function.with_body(structural_map(body, (tirx.For, tiles)))


def _results(
    epilogue: s_tir.SBlockRealize, group: Any, strip: Any, columns: int, residual: ir.Var | None
) -> list[tirx.Stmt]:
    """Fetches the lines that a tile's epilogue stores to, and those of the residual that it reads, each once."""

    def fetch(store: tirx.BufferStore) -> tirx.Stmt:
        fetches = [_fetch(store.buffer[tuple(store.indices)], PREFETCH_TO_WRITE)]
        if residual is not None:
            fetches.append(_fetch(residual[tuple(store.indices)]))
        return tirx.SeqStmt(fetches) if residual is not None else fetches[0]

    block = epilogue.block
    body = structural_map(block.body, (tirx.BufferStore, fetch))
    variables, rows = [iterator.var for iterator in block.iter_vars], int(block.iter_vars[2].dom.extent)
    return [
        _substitute(body, dict(zip(variables, (group, strip, row, column), strict=True)))
        for row in range(rows)
        for column in range(0, columns, _LINE_FLOATS)
    ]


def _with_body(loop: tirx.For, done: str, statements: list[tirx.Stmt]) -> tirx.For:
    annotations = {name: value for name, value in loop.annotations.items() if name != done}
    body = tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, annotations=annotations)


def _block(name: str, body: tirx.Stmt) -> s_tir.SBlockRealize:
    """The first block called `name` in a statement."""
    found: list[s_tir.SBlockRealize] = []

    def visit(realize: s_tir.SBlockRealize) -> None:
        if realize.block.name_hint.startswith(name):
            found.append(realize)

    structural_walk(body, (s_tir.SBlockRealize, visit))
    return found[0]


def _first_indices(name: str, body: tirx.Stmt) -> list[Any]:
    """The values of a block's iterators in the first iteration of the statement's loops."""
    starts: dict[ir.Var, int] = {}
    structural_walk(body, (tirx.For, lambda loop: starts.update({loop.loop_var: 0})))
    return [_substitute(value, starts) for value in _block(name, body).iter_values]


def _substitute(value: Any, variables: Mapping[ir.Var, Any]) -> Any:
    def replace(variable: ir.Var) -> Any:
        value = variables.get(variable, variable)
        return tirx.IntImm("int32", value) if isinstance(value, int) else value

    return structural_map(value, (ir.Var, replace))


def _fetch(element: Any, function: str = PREFETCH) -> tirx.Stmt:
    return tirx.Evaluate(tirx.call_extern("int32", function, tirx.address_of(element)))
