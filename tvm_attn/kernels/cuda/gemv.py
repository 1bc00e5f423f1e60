"""Linear layers of one group of at most 8 rows, at the speed of memory.

Tensor cores serve even one row: the weight is the left operand of `mma.sync` (16 outputs by 16 inputs) and the rows are
the 8 columns of the right one, repeated if there are fewer. With one row, seven of eight products are wasted, but an
instruction takes 256 weights instead of 32 and needs no conversion to float32. Weights flow from global memory through
each warp's own ring of stages (`cp.async`, `ldmatrix`), so the loop has no barrier; a stage has 64 bytes, or a
multiple, of each of the warp's outputs. Warps of a block have different outputs (`columns`) or share K (`splits`); the
sums of the latter are added in shared memory.

Before the loop, while the weights of the first stages are being loaded, every block puts x into shared memory in the
order in which lanes read it as right operand: 64 bytes for 32 inputs of a row, 16 for each of four lanes. LayerNorm is
computed then, with its rows in registers.

Quantized weights are not converted, only masked out of their words (see `tvm_attn.kernels.cuda.gemv_operands`). The sum
over a group of 32 inputs starts at minus what the weights' offset adds; the group's scale is applied in float32
afterwards. So only sums are rounded, and x of int4 layers below 2**-10, to a multiple of 2**-20.

Instructions per lane and weight in the loop, all overhead included (sm_90a, 8 rows, 16 outputs, stages of 64 bytes),
and their share of the 128 that a multiprocessor issues for its lanes per clock, in which it reads 18.6 bytes of weights
(4.3 TB/s, 132 multiprocessors, 1.75 GHz):

| weights | x | per weight | of 128 |
|---|---|---|---|
| 16 bits | either | 2.6 | 19 % |
| int8 | float16 | 2.9 | 42 % |
| int8 | bfloat16 | 3.5 | 51 % |
| int4 | float16 | 2.1 | 60 % |
| int4 | bfloat16 | 2.6 | 75 % |

Scalar arithmetic takes 3 for a 4-bit weight and one row (shift and mask, conversion, multiplication), without any
overhead: 87 %.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.activation import EXPRESSIONS
from tvm_attn.kernels.base import without_unused
from tvm_attn.kernels.cuda.gemv_operands import (
    GROUP_BYTES,
    QUANTIZED_UNIT,
    Rows,
    load_scales,
    multiply_group,
    multiply_quantized_group,
    weight_format,
)
from tvm_attn.kernels.cuda.gemv_tiles import ROWS, STEP_UNITS, UNIT, GemvTiles, Plan, resident
from tvm_attn.kernels.cuda.lanes import registers
from tvm_attn.kernels.cuda.ptx import (
    cp_async,
    cp_async_commit,
    cp_async_wait,
    kernel_attributes,
    ldmatrix,
    load_global,
    load_shared,
    shared_address,
    start_next_kernel,
    uint32,
    wait_for_earlier_kernel,
)
from tvm_attn.kernels.linear import Linear, LinearKernel, QKVLinear, ResidualLinear
from tvm_attn.storage import GROUP


def gemv(kernel: LinearKernel, tiles: GemvTiles, dependent: bool = False) -> tirx.PrimFunc:
    """The function of a linear layer with `groups` 1 and at most 8 rows.

    Args:
        kernel: the layer.
        tiles: its tiles.
        dependent: whether it starts before the kernel before it has ended, and loads weights meanwhile.

    Raises:
        ScheduleError: the layer has more rows, or the tiles do not fit it.
    """
    if kernel.groups != 1 or kernel.rows > ROWS:
        raise ScheduleError(f"this kernel takes one group of at most {ROWS} rows, not {kernel}: use matmul")
    if kernel.epsilon is not None and tiles.parts != 1:
        raise ScheduleError(f"{tiles} with LayerNorm: its rows are whole in shared memory, so parts is 1")
    k, n, rows = kernel.in_features, kernel.out_features, kernel.rows
    dtype, epsilon = kernel.activations, kernel.epsilon
    normalized, quantized, has_bias = epsilon is not None, kernel.weights != dtype, kernel.has_bias
    has_residual, is_qkv = isinstance(kernel, ResidualLinear), isinstance(kernel, QKVLinear)
    columns, splits, stages, repeats, parts = tiles.columns, tiles.splits, tiles.stages, tiles.repeats, tiles.parts
    outputs, warps, threads, steps = tiles.outputs, tiles.warps, 32 * tiles.warps, tiles.steps
    tile_outputs, block_outputs, halves = outputs * columns, tiles.block_outputs, outputs // 8
    plan, form, weight_types = Plan.of(kernel, tiles), weight_format(kernel.weights), kernel.weight_types
    iterations, k_stages, stage_units = plan.iterations, plan.k_stages, plan.stage_units
    part_iterations, unit_elements = -(-iterations // parts), 4 if quantized else 8
    step_groups, groups = STEP_UNITS * form.per_unit // GROUP, k // GROUP
    group_units = STEP_UNITS // step_groups
    results, work = tile_outputs * rows, repeats * iterations
    per_thread, copies = -(-results // threads), outputs * stage_units // 32
    scale_bytes, block_scale_bytes = n * groups * 2, block_outputs * groups * 2
    heads, context = (kernel.heads, kernel.context) if isinstance(kernel, QKVLinear) else (1, 1)
    width = n // 3 if is_qkv else n
    head_dim = width // heads
    activation = EXPRESSIONS.get(kernel.activation or "") if isinstance(kernel, Linear) else None
    out_type = kernel.output_dtype
    ring_bytes, x_bytes, sum_bytes, constant_bytes, shared_scale_bytes, norm_bytes = plan.shared

    def within(output: tirx.Expr, unit: tirx.Expr) -> tirx.Expr | None:
        """Whether a unit of an output is inside the weight; None if that is known to be so."""
        conditions = [output < n] if n % block_outputs else []
        conditions += [unit < plan.units] if plan.units % (stage_units * splits) else []
        return tirx.all(*conditions) if conditions else None

    def norm_ready() -> None:
        """Waits until the gamma and beta that all threads copied are in shared memory."""
        cp_async_wait(stages - 1)
        T.evaluate(T.cuda.cta_sync())

    attributes = kernel_attributes(dependent)

    @T.prim_func
    def gemv(
        x_handle: T.handle,
        gamma_handle: T.handle,
        beta_handle: T.handle,
        weight_handle: T.handle,
        scales_handle: T.handle,
        bias_handle: T.handle,
        residual_handle: T.handle,
        slots_handle: T.handle,
        positions_handle: T.handle,
        cache_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr(attributes)
        x = T.match_buffer(x_handle, (1, rows, k), "float32" if normalized else dtype)
        if normalized:
            gamma = T.match_buffer(gamma_handle, (k,), "float32")
            beta = T.match_buffer(beta_handle, (k,), "float32")
        weight = T.match_buffer(weight_handle, weight_types[0][0], weight_types[0][1])
        if quantized:
            scales = T.match_buffer(scales_handle, weight_types[1][0], weight_types[1][1])
        if has_bias:
            bias = T.match_buffer(bias_handle, (n,), "float32")
        if has_residual:
            residual = T.match_buffer(residual_handle, (1, rows, n), "float32")
        if is_qkv:
            cache_slots = T.int32()
            slots = T.match_buffer(slots_handle, (1, rows), "int32")
            positions = T.match_buffer(positions_handle, (1, rows), "int32")
            cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), dtype)
        out = T.match_buffer(out_handle, (1, rows, width), out_type)
        T.device_entry()
        # Without this ptxas spills some registers to fit more blocks.
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": max(1, resident(kernel, tiles))})
        block = T.cta_id([-(-n // block_outputs)])
        warp = T.warp_id([warps])
        lane = T.lane_id([32])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        ring = pool.alloc((ring_bytes // 4,), "uint32", align=128)
        rows_x = pool.alloc((x_bytes // 4,), "uint32", align=16)
        sums = pool.alloc((sum_bytes // 4,), "float32", align=16)
        if quantized:
            constants = pool.alloc((constant_bytes // 4,), "float32", align=16)
            block_scales = pool.alloc((shared_scale_bytes // 2,), "float16", align=16)
        if normalized:
            norm = pool.alloc((norm_bytes // 4,), "float32", align=16)
        pool.commit()
        if quantized:
            all_scales = T.decl_buffer((n * groups,), "float16", data=scales.data)
        words = T.alloc_local((4, halves), "uint32")
        left = T.alloc_local((4,), "uint32")
        right = T.alloc_local((4,), "uint32")
        total = T.alloc_local((4,), "float32")
        partial = T.alloc_local((4,), "float32")
        value = T.alloc_local((1,), "float32")
        factor = T.alloc_local((2,), "float32")
        scale_values = T.alloc_local((halves * step_groups,), "float32")
        next_stage = T.alloc_local((1,), "int32")
        next_output = T.alloc_local((1,), "int32")
        load_place = T.alloc_local((1,), "uint32")
        multiply_place = T.alloc_local((1,), "uint32")
        bias_value = T.alloc_local((per_thread,), "float32")
        residual_value = T.alloc_local((per_thread,), "float32")
        place = T.alloc_local((per_thread, 2), "int32")

        column: T.let[T.int32] = warp // splits
        split: T.let[T.int32] = warp % splits
        first_output: T.let[T.int32] = block * block_outputs
        warp_ring: T.let[T.uint32] = shared_address(ring) + uint32(warp * (stages * plan.stage))
        x_base: T.let[T.uint32] = shared_address(rows_x)
        # Where this lane reads: a row of a matrix, and its inputs of a row of x; past the last row, that row again.
        matrix: T.let[T.uint32] = warp_ring + uint32((lane // outputs * plan.pitch + lane % outputs) * UNIT)
        x_lane: T.let[T.uint32] = x_base + uint32(T.min(lane // 4, rows - 1) * plan.x_row + lane % 4 * UNIT)
        if quantized:
            constants_lane: T.let[T.uint32] = shared_address(constants) + uint32(lane % 4 * UNIT)
        source = T.meta_var(
            Rows(
                x_base,
                plan.x_row,
                rows,
                k,
                plan.part_groups,
                dtype,
                threads,
                constants if quantized else None,
                kernel.weights,
            )
        )

        # For the next load: its stage in K, the first output of its tile, and its stage in the ring. For the next
        # product: its stage in the ring.
        next_stage[0] = split
        next_output[0] = first_output + column * outputs
        load_place[0] = uint32(0)
        multiply_place[0] = uint32(0)

        @T.inline
        def load():
            """Starts the copies of this warp's next stage, with zeros past N or K."""
            for i in T.unroll(copies):
                unit: T.let[T.int32] = (i * 32 + lane) % stage_units
                row: T.let[T.int32] = (i * 32 + lane) // stage_units
                k_unit: T.let[T.int32] = next_stage[0] * stage_units + unit
                cp_async(
                    warp_ring + load_place[0] + uint32((unit * plan.pitch + row) * UNIT),
                    weight.ptr_to([next_output[0] + row, k_unit * unit_elements, 0]),
                    valid=within(next_output[0] + row, k_unit),
                )
            advance(load_place)
            next_stage[0] = next_stage[0] + splits
            if repeats > 1:
                wrap: T.let[T.bool] = next_stage[0] >= iterations * splits
                next_stage[0] = T.Select(wrap, split, next_stage[0])
                next_output[0] = T.Select(wrap, next_output[0] + tile_outputs, next_output[0])

        @T.inline
        def advance(ring_place):
            ring_place[0] = T.Select(
                ring_place[0] == uint32((stages - 1) * plan.stage), uint32(0), ring_place[0] + uint32(plan.stage)
            )

        @T.inline
        def prepare(part):
            """Puts x of a part of K into shared memory, and the constants of its groups."""
            if normalized:
                source.normalize(x, norm, sums, epsilon, warp, lane, norm_ready)
            else:
                source.load(x, thread, part * plan.part_groups)
                cp_async_wait(stages - 1)
            T.cuda.cta_sync()
            if quantized:
                source.sum_groups(form, thread)
                T.cuda.cta_sync()

        @T.inline
        def multiply(k_stage, part_stage, tile):
            """Adds the products of one stage, number `k_stage` in K and `part_stage` in its part, to `total`."""
            for step in T.unroll(steps):
                for i in T.unroll(halves):
                    matrices = T.meta_var([words[i * 4 // halves + j // halves, j % halves] for j in range(4)])
                    unit: T.let[T.int32] = step * STEP_UNITS + i * (STEP_UNITS // halves)
                    ldmatrix(matrices, matrix + multiply_place[0] + uint32(unit * (plan.pitch * UNIT)))
                if quantized:
                    for half in T.unroll(halves):
                        output: T.let[T.int32] = tile + column * outputs + half * 8 + lane // 4
                        first: T.let[T.int32] = output * groups + (k_stage * steps + step) * step_groups
                        load_scales(scale_values, half * step_groups, step_groups, block_scales, first, groups)
                for i in T.unroll(step_groups):
                    group: T.let[T.int32] = part_stage * (steps * step_groups) + step * step_groups + i
                    units = T.meta_var(
                        [[words[i * group_units + j, h] for h in range(halves)] for j in range(group_units)]
                    )
                    load_shared(registers(right), x_lane + uint32(group * GROUP_BYTES))
                    if quantized:
                        load_shared(registers(partial), constants_lane + uint32(group * GROUP_BYTES))
                        if dtype == "bfloat16":
                            for j in T.unroll(2):
                                factor[j] = partial[2 + j]
                                partial[2 + j] = partial[j]
                        multiply_quantized_group(partial, units, left, right, form)
                        for half in T.unroll(halves):
                            for j in T.unroll(min(rows, 2)):
                                of_group = T.meta_var(scale_values[half * step_groups + i])
                                all_scale = T.meta_var(of_group * factor[j] if dtype == "bfloat16" else of_group)
                                total[2 * half + j] = total[2 * half + j] + partial[2 * half + j] * all_scale
                    else:
                        multiply_group(total, units, right, dtype)

        # First the data that no earlier kernel writes: gamma and beta, the block's scales (contiguous, a multiple of
        # 16 bytes from the first), the first stages.
        if normalized:
            for i in T.unroll(-(-k // (4 * threads))):
                at: T.let[T.int32] = (i * threads + thread) * 4
                if at < k:
                    cp_async(shared_address(norm) + uint32(at * 4), gamma.ptr_to([at]))
                    cp_async(shared_address(norm) + uint32((k + at) * 4), beta.ptr_to([at]))
        if quantized:
            for i in range(-(-shared_scale_bytes // (UNIT * threads))):
                at: T.let[T.int32] = (i * threads + thread) * UNIT
                if at < shared_scale_bytes:
                    first: T.let[T.int32] = block * block_scale_bytes + at
                    cp_async(
                        shared_address(block_scales) + uint32(at),
                        all_scales.ptr_to([first // 2]),
                        read=uint32(T.max(T.min(scale_bytes - first, UNIT), 0)),
                    )
        cp_async_commit()
        for q in T.unroll(stages - 1):
            if q < work:
                load()
            cp_async_commit()
        start_next_kernel(dependent)
        wait_for_earlier_kernel(dependent)
        if parts == 1:
            prepare(0)

        for repeat in range(repeats):
            tile: T.let[T.int32] = repeat * tile_outputs
            # Load what is added at the end during the loop.
            for i in T.unroll(per_thread):
                result: T.let[T.int32] = i * threads + thread
                row: T.let[T.int32] = result // outputs % rows
                output: T.let[T.int32] = first_output + tile + result // (outputs * rows) * outputs + result % outputs
                if result < results and output < n:
                    if has_bias:
                        bias_value[i] = bias[output]
                    if has_residual:
                        load_global([residual_value[i]], residual.ptr_to([0, row, output]))
                    if is_qkv:
                        place[i, 0] = slots[0, row]
                        place[i, 1] = positions[0, row]
            for i in T.unroll(4):
                total[i] = T.float32(0.0)
            for part in range(parts):
                if parts > 1:
                    T.cuda.cta_sync()
                    prepare(part)
                for i in range(T.min(part_iterations, iterations - part * part_iterations)):
                    iteration: T.let[T.int32] = part * part_iterations + i
                    cp_async_wait(stages - 2)
                    T.cuda.warp_sync()
                    # All lanes have read the stage that this fills.
                    if repeat * iterations + iteration + (stages - 1) < work:
                        load()
                    cp_async_commit()
                    k_stage: T.let[T.int32] = iteration * splits + split
                    if k_stage < k_stages:
                        multiply(k_stage, i * splits + split, tile)
                    advance(multiply_place)

            warp_sums: T.let[T.int32] = (repeat % 2 * warps + warp) * rows * plan.sum_row
            for i in T.unroll(halves):
                for j in T.unroll(min(rows, 2)):
                    if lane % 4 * 2 + j < rows:
                        sums[warp_sums + (lane % 4 * 2 + j) * plan.sum_row + i * 8 + lane // 4] = total[2 * i + j]
            T.cuda.cta_sync()
            for i in T.unroll(per_thread):
                result: T.let[T.int32] = i * threads + thread
                row: T.let[T.int32] = result // outputs % rows
                first: T.let[T.int32] = repeat % 2 * warps + result // (outputs * rows) * splits
                output: T.let[T.int32] = first_output + tile + result // (outputs * rows) * outputs + result % outputs
                if result < results and output < n:
                    value[0] = T.float32(0.0)
                    for j in T.unroll(splits):
                        value[0] = value[0] + sums[((first + j) * rows + row) * plan.sum_row + result % outputs]
                    if quantized:
                        value[0] = value[0] * T.float32(1.0 / QUANTIZED_UNIT)
                    if has_bias:
                        value[0] = value[0] + bias_value[i]
                    if has_residual:
                        value[0] = value[0] + residual_value[i]
                    if activation is not None:
                        value[0] = activation(value[0])
                    if is_qkv:
                        if output < width:
                            out[0, row, output] = T.Cast(dtype, value[0])
                        else:
                            if place[i, 1] >= 0:
                                feature: T.let[T.int32] = output % width
                                cache[
                                    place[i, 0],
                                    output // width - 1,
                                    feature // head_dim,
                                    place[i, 1],
                                    feature % head_dim,
                                ] = T.Cast(dtype, value[0])
                    else:
                        out[0, row, output] = T.Cast(out_type, value[0])

    return without_unused(gemv)
