"""Schedule templates for processors with vector units.

Vector width and cache size come from the target; the rest are decisions. Where a kernel handles one row only (groups
and rows are 1), its small loops stay serial: starting threads costs 6 us, the work less than 1 us.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import s_tir, tirx

from tvm_attn.kernels import (
    Argmax,
    DecodeAttention,
    Embedding,
    GatherRows,
    LayerNorm,
    PackPairs,
    PackPlain,
    PackWords,
    PrefillAttention,
    QuantizeRows,
    ResidualLinear,
)
from tvm_attn.kernels.matmul import DOT_BFLOAT16, DOT_INT8
from tvm_attn.kernels.weights import PLAIN, packed_types
from tvm_attn.kernels.weights import strip_columns as largest_divisor
from tvm_attn.schedule.base import Chooser, Template
from tvm_attn.schedule.prefetch import AHEAD, PREFETCH, PREFETCH_LLVM, TILES, insert_prefetches
from tvm_attn.storage import numpy_dtype
from tvm_attn.targets import CpuTarget


def _finish(schedule: s_tir.Schedule) -> tirx.PrimFunc:
    return schedule.mod["main"]


def _is_one_row(kernel: Any) -> bool:
    return getattr(kernel, "groups", None) == 1 and kernel.rows == 1


def _vectorize(schedule: s_tir.Schedule, block: Any, lanes: int) -> None:
    """Vectorises the innermost loop of a block: whole where it is a power of two up to 64, else in the widest part that
    divides it."""
    loop = schedule.get_loops(block)[-1]
    extent = int(schedule.get(loop).extent)
    if extent > 64 or extent & (extent - 1):
        loop = schedule.split(loop, [None, largest_divisor(extent, lanes)])[1]
    schedule.vectorize(loop)


# One dot product step for 16 columns, as LLVM IR: TVM's own calls of these intrinsics fail LLVM's checks, because they
# give bfloat16 and packed bytes other types than LLVM expects. linkonce_odr: every kernel of a module imports them.
_DOT_STEPS = {
    DOT_BFLOAT16: """
define linkonce_odr <16 x float> @tvm_attn_dot_bfloat16_16(<16 x float> %acc, i32 %x, <16 x i32> %w) alwaysinline {
  %first = insertelement <16 x i32> poison, i32 %x, i64 0
  %spread = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %a = bitcast <16 x i32> %spread to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %sum
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
""",
    DOT_INT8: """
define linkonce_odr <16 x i32> @tvm_attn_dot_int8_16(<16 x i32> %acc, i32 %x, <16 x i32> %w) alwaysinline {
  %first = insertelement <16 x i32> poison, i32 %x, i64 0
  %spread = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %a = bitcast <16 x i32> %w to <64 x i8>
  %b = bitcast <16 x i32> %spread to <64 x i8>
  %sum = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %acc, <64 x i8> %a, <64 x i8> %b)
  ret <16 x i32> %sum
}
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
""",
}
_DOT_FEATURES = {DOT_BFLOAT16: "avx512_bf16", DOT_INT8: "avx512_vnni"}
# The same for 32 columns. One step for a whole strip reads its weights in the order in which they lie in memory.
_DOT_PAIR = """
define linkonce_odr <32 x TYPE> @NAME_32(<32 x TYPE> %acc, i32 %x, <32 x i32> %w) alwaysinline {
  %acc0 = shufflevector <32 x TYPE> %acc, <32 x TYPE> poison, <16 x i32> LOW
  %acc1 = shufflevector <32 x TYPE> %acc, <32 x TYPE> poison, <16 x i32> HIGH
  %w0 = shufflevector <32 x i32> %w, <32 x i32> poison, <16 x i32> LOW
  %w1 = shufflevector <32 x i32> %w, <32 x i32> poison, <16 x i32> HIGH
  %sum0 = call <16 x TYPE> @NAME_16(<16 x TYPE> %acc0, i32 %x, <16 x i32> %w0)
  %sum1 = call <16 x TYPE> @NAME_16(<16 x TYPE> %acc1, i32 %x, <16 x i32> %w1)
  %sum = shufflevector <16 x TYPE> %sum0, <16 x TYPE> %sum1, <32 x i32> ALL
  ret <32 x TYPE> %sum
}
"""


def _dot_pair(name: str) -> str:
    def mask(lanes: range) -> str:
        return "<" + ", ".join(f"i32 {lane}" for lane in lanes) + ">"

    text = _DOT_PAIR.replace("NAME", name).replace("TYPE", "float" if name == DOT_BFLOAT16 else "i32")
    return text.replace("LOW", mask(range(16))).replace("HIGH", mask(range(16, 32))).replace("ALL", mask(range(32)))


def _has_dot(name: str, target: CpuTarget) -> bool:
    return target.lanes == 16 and _DOT_FEATURES[name] in target.features


def _dot_step(kernel: Any, target: CpuTarget, choose: Chooser) -> tuple[Any, str | None]:
    """The kernel with its vector width, and the LLVM IR of its dot product step where the target has an instruction."""
    if kernel.weights in PLAIN:
        return kernel, None
    name = DOT_BFLOAT16 if kernel.weights == "bfloat16_pairs" else DOT_INT8
    if kernel.columns % 16 or not _has_dot(name, target):
        return replace(kernel, lanes=largest_divisor(kernel.columns, target.lanes)), None
    widths = (16, 32) if kernel.columns % 32 == 0 else (16,)
    lanes = choose("lanes", widths, widths[-1] if kernel.rows == 1 else 16)
    text = _DOT_STEPS[name] + (_dot_pair(name) if lanes == 32 else "")
    return replace(kernel, lanes=lanes, native=True), text


def _matmul(kernel: Any, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Register tiles of R x C accumulators over whole columns of K.

    A task is one weight strip times a block of row groups that, K wide, fits half of the level-2 cache; the strip then
    stays there as well. The groups of a block are the only loop with a bound that is not known, and it is outside.
    """
    kernel, dot_step = _dot_step(kernel, target, choose)
    plain = kernel.weights in PLAIN or kernel.weights == "bfloat16_pairs"
    weight_shape, weight_dtype = packed_types(kernel.weights, kernel.in_features, kernel.out_features, kernel.columns)[
        0
    ]
    schedule = s_tir.Schedule(kernel.prim_func(), enable_check=False)
    matmul, epilogue = schedule.get_child_blocks(schedule.get_sblock("root"))
    group, strip, row, column = schedule.get_loops(epilogue)
    # powers of two, so that the block borders are the same for every kernel of a model
    fitting = max(1, target.l2_bytes // 2 // (kernel.rows * kernel.in_features * 4))
    default = min(32, 1 << (fitting.bit_length() - 1))
    block = choose("group_block", (1, 2, 4, 8, 16, 32), default) if kernel.groups is None else 1
    outer, group = schedule.split(group, [None, block])
    schedule.reorder(outer, strip, group, row, column)
    task = schedule.fuse(outer, strip)
    schedule.parallel(task)
    # Where there is one row, the hardware keeps up by itself, except with int4 (benchmarks/README.md).
    default = 16384 if kernel.rows > 1 or kernel.weights == "int4" else 0
    ahead = choose("prefetch_bytes", (0, 4096, 8192, 16384, 32768), default)
    has_tiles = kernel.groups is None
    if ahead or has_tiles or dot_step:
        text = (dot_step or "") + (PREFETCH_LLVM if ahead or has_tiles else "")
        schedule.annotate(task, "pragma_import_llvm", text)
    schedule.vectorize(column)
    schedule.unroll(row)
    schedule.compute_at(matmul, group, preserve_unit_loops=True)
    schedule.set_scope(matmul, 0, "local")
    row, column, k = schedule.get_loops(matmul)[-3:]
    schedule.reorder(k, row, column)
    steps = int(schedule.get(k).extent)

    unroll = choose("k_unroll", (1, 2, 4, 8), 4 if kernel.rows == 1 and plain else 1)
    innermost = k
    if unroll > 1 and steps % unroll == 0:
        k, innermost = schedule.split(k, [None, unroll])
        schedule.unroll(innermost)
    if ahead:
        row_bytes = kernel.columns * numpy_dtype(weight_dtype).itemsize
        schedule.annotate(innermost, AHEAD, max(1, ahead // row_bytes))
    if has_tiles:
        schedule.annotate(group, TILES, 1)
    # Plain formats vectorise the columns; the others hold vector statements.
    spread = schedule.vectorize if kernel.weights in PLAIN else schedule.unroll
    spread(column)
    schedule.unroll(row)
    init = schedule.decompose_reduction(matmul, k)
    row, column = schedule.get_loops(init)[-2:]
    spread(column)
    schedule.unroll(row)
    function = _finish(schedule)
    weight = function.params[1 if plain else 3]
    residual = function.params[-2] if isinstance(kernel, ResidualLinear) else None
    return insert_prefetches(function, weight, weight_shape[1] // steps, residual)


def _pack(kernel: PackPlain | PackWords, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(kernel.prim_func(), enable_check=False)
    strip, row, column = schedule.get_loops(schedule.get_sblock("pack"))
    if kernel.transposed:
        # Rows of the source run along K: a block of K keeps its cache lines between one column and the next.
        block = choose("row_block", (8, 16, 32, 64), 16)
        outer, row = schedule.split(row, [None, block])
        schedule.reorder(strip, outer, column, row)
    else:
        schedule.vectorize(column)
    schedule.parallel(strip)
    return _finish(schedule)


def _pack_pairs(kernel: PackPairs, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(kernel.prim_func(), enable_check=False)
    block = schedule.get_sblock("pack")
    group, row, _ = schedule.get_loops(block)
    if not _is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    _vectorize(schedule, block, target.lanes)
    return _finish(schedule)


def _quantize_rows(kernel: QuantizeRows, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(kernel.prim_func(), enable_check=False)
    group, row, _ = schedule.get_loops(schedule.get_sblock("group"))
    if not _is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    for name in ("largest", "words"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    return _finish(schedule)


def _rows(kernel: Embedding | GatherRows, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(kernel.prim_func(), enable_check=False)
    block = schedule.get_sblock("embed" if isinstance(kernel, Embedding) else "gather")
    group, row, _ = schedule.get_loops(block)
    if not _is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    _vectorize(schedule, block, target.lanes)
    return _finish(schedule)


def _layer_norm(kernel: LayerNorm, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Both sums are kept in one vector of partial sums, which is added up at the end of the row."""
    schedule = s_tir.Schedule(kernel.prim_func(), enable_check=False)
    lanes = largest_divisor(kernel.width, target.lanes)
    normalize = schedule.get_sblock("normalize")
    group, row, _ = schedule.get_loops(normalize)
    partial_blocks = []
    for name in ("sum", "squares"):
        block = schedule.get_sblock(name)
        _, lane = schedule.split(schedule.get_loops(block)[-1], [None, lanes])
        partial = schedule.rfactor(lane, 2)
        partial_blocks.append((block, partial))
    for block, partial in reversed(partial_blocks):
        schedule.compute_at(block, row, preserve_unit_loops=True)
        schedule.compute_at(partial, row, preserve_unit_loops=True)
        schedule.set_scope(partial, 0, "local")
        schedule.set_scope(block, 0, "local")
        # The partial sums come first, then two loops of one iteration, then the steps along the row.
        lane, *_, step = schedule.get_loops(partial)[-4:]
        schedule.reorder(step, lane)
        schedule.vectorize(lane)
        init = schedule.decompose_reduction(partial, step)
        schedule.vectorize(schedule.get_loops(init)[-1])
    _vectorize(schedule, normalize, target.lanes)
    if not _is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    return _finish(schedule)


def _prefill_attention(kernel: PrefillAttention, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """A task is one tile of queries of one head; two vectors of queries and eight keys (or dimensions) fill the
    registers."""
    query_tile = 2 * target.lanes
    key_tile = choose("key_tile", (4, 8), 8 if target.tile_columns >= 16 else 4)
    dim_tile = largest_divisor(kernel.head_dim, choose("dim_tile", (4, 8), 8 if target.tile_columns >= 16 else 4))
    key_block = choose("key_block", (32, 64, 128), 32 if kernel.dtype == "float32" else 64)
    native = kernel.dtype == "bfloat16" and kernel.head_dim % 2 == 0 and _has_dot(DOT_BFLOAT16, target)
    tiled = replace(kernel, query_tile=query_tile, key_block=key_block, key_tile=key_tile, dim_tile=dim_tile)
    schedule = s_tir.Schedule(replace(tiled, native=native).prim_func(), enable_check=False)
    task = schedule.fuse(*schedule.get_loops(schedule.get_sblock("tile")))
    schedule.parallel(task)
    for name in ("init_softmax", "init_output", "mask", "keep_maximum", "maximum", "correction", "rescale_sum"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    for name in ("probabilities", "sum", "normalize"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    if native:
        schedule.annotate(task, "pragma_import_llvm", _DOT_STEPS[DOT_BFLOAT16])
        schedule.vectorize(schedule.get_loops(schedule.get_sblock("pairs"))[-1])
    if kernel.dtype != "float32":
        for name in ("load_keys", "load_values"):
            _vectorize(schedule, schedule.get_sblock(name), target.lanes)
    # The dot products are vector statements already.
    spread = schedule.unroll if native else schedule.vectorize
    products = schedule.get_sblock("products")
    dim, key, query = schedule.get_loops(products)
    spread(query)
    schedule.unroll(key)
    init = schedule.decompose_reduction(products, dim)
    for block, how in ((init, spread), (schedule.get_sblock("keep_scores"), schedule.vectorize)):
        key, query = schedule.get_loops(block)[-2:]
        how(query)
        schedule.unroll(key)
    for name, how in (
        ("rescale_output", schedule.vectorize),
        ("accumulate", spread),
        ("keep_output", schedule.vectorize),
    ):
        dim, query = schedule.get_loops(schedule.get_sblock(name))[-2:]
        how(query)
        schedule.unroll(dim)
    return _finish(schedule)


def _decode_attention(kernel: DecodeAttention, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """A task is one chunk of keys of one head of one row."""
    key_chunk = choose("key_chunk", (128, 256, 512, 1024), 256)
    key_block = choose("key_block", (8, 16, 32), 16)
    lanes = largest_divisor(kernel.head_dim, target.lanes)
    prefetch = PREFETCH if choose("prefetch", (0, 1), 1) else None
    tiled = replace(kernel, key_chunk=key_chunk, key_block=key_block, lanes=lanes, prefetch=prefetch)
    schedule = s_tir.Schedule(tiled.prim_func(), enable_check=False)
    task = schedule.fuse(*schedule.get_loops(schedule.get_sblock("chunk")))
    schedule.parallel(task)
    if prefetch:
        schedule.annotate(task, "pragma_import_llvm", PREFETCH_LLVM)
    merge_loops = schedule.get_loops(schedule.get_sblock("merge"))
    if not _is_one_row(kernel):
        schedule.parallel(schedule.fuse(*merge_loops))
    schedule.unroll(schedule.get_loops(schedule.get_sblock("key"))[-1])
    products = schedule.get_sblock("products")
    dim, lane = schedule.get_loops(products)
    schedule.vectorize(lane)
    schedule.unroll(dim)
    init = schedule.decompose_reduction(products, dim)
    schedule.vectorize(schedule.get_loops(init)[-1])
    for name in ("init_maxima", "mask", "maxima", "init_totals", "probabilities", "totals"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    for name in ("init_output", "accumulate", "keep_output", "merge_init", "merge_outputs", "store"):
        _vectorize(schedule, schedule.get_sblock(name), target.lanes)
    return _finish(schedule)


def _argmax(kernel: Argmax, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    tiled = replace(kernel, lanes=largest_divisor(kernel.columns, target.lanes))
    schedule = s_tir.Schedule(tiled.prim_func(), enable_check=False)
    if not _is_one_row(kernel):
        schedule.parallel(schedule.fuse(*schedule.get_loops(schedule.get_sblock("row"))))
    for name in ("init", "lane_max"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    return _finish(schedule)


TEMPLATES: tuple[Template, ...] = (
    Template("cpu.matmul", 2, ("linear", "residual_linear", "qkv_linear", "head"), _matmul),
    Template("cpu.pack", 1, ("pack_plain", "pack_words"), _pack),
    Template("cpu.pack_pairs", 1, ("pack_pairs",), _pack_pairs),
    Template("cpu.quantize_rows", 1, ("quantize_rows",), _quantize_rows),
    Template("cpu.rows", 1, ("embedding", "gather_rows"), _rows),
    Template("cpu.layer_norm", 1, ("layer_norm",), _layer_norm),
    Template("cpu.prefill_attention", 1, ("prefill_attention",), _prefill_attention),
    Template("cpu.decode_attention", 2, ("decode_attention",), _decode_attention),
    Template("cpu.argmax", 1, ("argmax",), _argmax),
)
"""The templates of this device class."""
