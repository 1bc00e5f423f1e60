"""Linear layers of one row with 16-bit weights: a warp reads whole rows of the weight straight into registers.

With one row tensor cores have nothing to share. A warp takes a few outputs at a time; its lanes load 16 bytes each of
their weights, one line after another, and add products in float32. Nothing passes through shared memory but gamma and
beta, no thread waits for another warp, and the weights of the first outputs are on their way before the kernel waits
for the one before it. LayerNorm is computed by every warp by itself, since its lanes hold exactly the inputs that they
multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.activation import EXPRESSIONS
from tvm_attn.kernels.base import TENSOR_CORE_DTYPES, without_unused
from tvm_attn.kernels.cuda.gemv_operands import halves
from tvm_attn.kernels.cuda.lanes import add_lanes, registers, sum_of
from tvm_attn.kernels.cuda.ptx import (
    cp_async,
    cp_async_commit,
    cp_async_wait,
    kernel_attributes,
    load_global,
    pack,
    shared_address,
    start_next_kernel,
    uint32,
    wait_for_earlier_kernel,
)
from tvm_attn.kernels.linear import Linear, LinearKernel, QKVLinear, ResidualLinear

_UNIT = 8
"""Inputs of a lane's load of 16 bytes."""
_MOST_INPUTS, _MOST_NORMALIZED = 3072, 2048
"""Inputs of a row that lanes can hold in registers, and those of a normalized row, which is float32 at first."""


_SHORT = 1024
"""Inputs up to which 16 warps of a multiprocessor have registers enough."""


@dataclass(frozen=True)
class RowTiles:
    """The sizes of `gemv_rows`.

    Attributes:
        outputs: outputs that a warp computes at a time.
        warps: warps per block.
        repeats: times that a block does so; the weights of the next time are loaded meanwhile.
    """

    outputs: int = 1
    warps: int = 8
    repeats: int = 1

    @property
    def block_outputs(self) -> int:
        """Outputs per block."""
        return self.outputs * self.warps * self.repeats


def suits(kernel: LinearKernel) -> bool:
    """Whether `gemv_rows` computes a layer."""
    most = _MOST_INPUTS if kernel.epsilon is None else _MOST_NORMALIZED
    return (
        kernel.groups == 1
        and kernel.rows == 1
        and kernel.weights == kernel.activations
        and kernel.weights in TENSOR_CORE_DTYPES
        and kernel.in_features % _UNIT == 0
        and kernel.in_features <= most
    )


def resident(kernel: LinearKernel, tiles: RowTiles) -> int:
    """Blocks that the registers of a multiprocessor must leave room for: 16 warps, or 8 if rows are long."""
    return max(1, (16 if kernel.in_features <= _SHORT else 8) // tiles.warps)


def default_tiles(kernel: LinearKernel, multiprocessors: int = 132) -> RowTiles:
    """All blocks run at once, with as few idle warps as possible; of equal tiles, those with more loads in flight."""
    least, tiles = kernel.out_features * 10, RowTiles()
    for candidate in candidates(kernel, multiprocessors):
        blocks = -(-kernel.out_features // candidate.block_outputs)
        if blocks > multiprocessors * resident(kernel, candidate):
            continue
        most = -(-blocks // multiprocessors) * candidate.block_outputs  # outputs of one multiprocessor
        if most < least or (most == least and candidate.repeats < tiles.repeats):
            least, tiles = most, candidate
    return tiles


def candidates(kernel: LinearKernel, multiprocessors: int = 132) -> Iterator[RowTiles]:
    """Tiles for a search to try: blocks for one to two waves of a device, which warps walk through the weight."""
    for outputs in (1, 2, 3, 4) if kernel.in_features <= _SHORT else (1, 2):
        for warps in (4, 6, 8, 10, 12, 16):
            resident_blocks = resident(kernel, RowTiles(outputs, warps))
            for waves in sorted({1, resident_blocks}):
                repeats = -(-kernel.out_features // (multiprocessors * waves * outputs * warps))
                if repeats * outputs <= 32:
                    yield RowTiles(outputs, warps, repeats)


def gemv_rows(kernel: LinearKernel, tiles: RowTiles, dependent: bool = False) -> tirx.PrimFunc:
    """The function of a linear layer with one row and weights of the activations' dtype.

    Args:
        kernel: the layer.
        tiles: its tiles.
        dependent: whether it starts before the kernel before it has ended, and loads weights meanwhile.

    Raises:
        ScheduleError: the layer is another one.
    """
    if not suits(kernel):
        raise ScheduleError(f"this kernel takes one row and weights of its dtype, not {kernel}: use gemv")
    k, n, dtype, epsilon = kernel.in_features, kernel.out_features, kernel.activations, kernel.epsilon
    normalized, has_bias = epsilon is not None, kernel.has_bias
    has_residual, is_qkv = isinstance(kernel, ResidualLinear), isinstance(kernel, QKVLinear)
    outputs, warps, repeats, threads = tiles.outputs, tiles.warps, tiles.repeats, 32 * tiles.warps
    units, chunks = k // _UNIT, -(-k // (32 * _UNIT))
    heads, context = (kernel.heads, kernel.context) if isinstance(kernel, QKVLinear) else (1, 1)
    width = n // 3 if is_qkv else n
    head_dim = width // heads
    activation = EXPRESSIONS.get(kernel.activation or "") if isinstance(kernel, Linear) else None
    out_type, weight_type = kernel.output_dtype, kernel.weight_types[0]
    buffers = min(2, repeats)
    attributes = kernel_attributes(dependent)

    @T.prim_func
    def gemv_rows(
        x_handle: T.handle,
        gamma_handle: T.handle,
        beta_handle: T.handle,
        weight_handle: T.handle,
        bias_handle: T.handle,
        residual_handle: T.handle,
        slots_handle: T.handle,
        positions_handle: T.handle,
        cache_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr(attributes)
        x = T.match_buffer(x_handle, (1, 1, k), "float32" if normalized else dtype)
        if normalized:
            gamma = T.match_buffer(gamma_handle, (k,), "float32")
            beta = T.match_buffer(beta_handle, (k,), "float32")
        weight = T.match_buffer(weight_handle, weight_type[0], weight_type[1])
        if has_bias:
            bias = T.match_buffer(bias_handle, (n,), "float32")
        if has_residual:
            residual = T.match_buffer(residual_handle, (1, 1, n), "float32")
        if is_qkv:
            cache_slots = T.int32()
            slots = T.match_buffer(slots_handle, (1, 1), "int32")
            positions = T.match_buffer(positions_handle, (1, 1), "int32")
            cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), dtype)
        out = T.match_buffer(out_handle, (1, 1, width), out_type)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident(kernel, tiles)})
        block = T.cta_id([-(-n // tiles.block_outputs)])
        warp = T.warp_id([warps])
        lane = T.lane_id([32])
        thread = T.thread_id([threads])
        if normalized:
            pool = T.SMEMPool()
            norm = pool.alloc((2 * k,), "float32", align=16)
            pool.commit()
            numbers = T.alloc_local((chunks * _UNIT,), "float32")
            moments = T.alloc_local((2,), "float32")
        row = T.alloc_local((chunks * 4,), "uint32")
        weights = T.alloc_local((buffers * outputs * chunks * 4,), "uint32")
        total = T.alloc_local((outputs,), "float32")
        value = T.alloc_local((1,), "float32")
        bias_value = T.alloc_local((repeats,), "float32")
        residual_value = T.alloc_local((repeats,), "float32")
        place = T.alloc_local((2,), "int32")
        first: T.let[T.int32] = (block * (repeats * warps) + warp) * outputs

        @T.inline
        def load(repeat):
            """Starts to load the weights of a repeat; zeros past the row."""
            for j in T.unroll(outputs):
                # Past the last output, that one again.
                output: T.let[T.int32] = T.min(first + repeat * (warps * outputs) + j, n - 1)
                for c in T.unroll(chunks):
                    at = T.meta_var(((repeat % buffers * outputs + j) * chunks + c) * 4)
                    if (c + 1) * 32 <= units:
                        load_global(registers(weights, at), weight.ptr_to([output, (c * 32 + lane) * _UNIT, 0]))
                    else:
                        for i in T.unroll(4):
                            weights[at + i] = T.uint32(0)
                        if c * 32 + lane < units:
                            load_global(registers(weights, at), weight.ptr_to([output, (c * 32 + lane) * _UNIT, 0]))

        # What no earlier kernel writes comes first.
        load(0)
        if normalized:
            for i in T.unroll(-(-k // (4 * threads))):
                at: T.let[T.int32] = (i * threads + thread) * 4
                if at < k:
                    cp_async(shared_address(norm) + uint32(at * 4), gamma.ptr_to([at]))
                    cp_async(shared_address(norm) + uint32((k + at) * 4), beta.ptr_to([at]))
            cp_async_commit()
        for repeat in T.unroll(repeats):
            own: T.let[T.int32] = first + repeat * (warps * outputs) + lane
            if has_bias:  # noqa: SIM102  (known when the function is built)
                if lane < outputs and own < n:
                    bias_value[repeat] = bias[own]
        start_next_kernel(dependent)
        wait_for_earlier_kernel(dependent)
        for c in T.unroll(chunks):
            unit: T.let[T.int32] = c * 32 + lane
            if normalized:
                for i in T.unroll(_UNIT):
                    numbers[c * _UNIT + i] = T.float32(0.0)
                if unit < units:
                    for i in T.unroll(2):
                        load_global(registers(numbers, c * _UNIT + 4 * i), x.ptr_to([0, 0, unit * _UNIT + 4 * i]))
            else:
                for i in T.unroll(4):
                    row[c * 4 + i] = T.uint32(0)
                if unit < units:
                    load_global(registers(row, c * 4), x.ptr_to([0, 0, unit * _UNIT]))
        if is_qkv:
            place[0] = slots[0, 0]
            place[1] = positions[0, 0]
        for repeat in T.unroll(repeats):
            own: T.let[T.int32] = first + repeat * (warps * outputs) + lane
            if has_residual:  # noqa: SIM102
                if lane < outputs and own < n:
                    load_global([residual_value[repeat]], residual.ptr_to([0, 0, own]))
        if normalized:
            moments[0] = sum_of([numbers[i] for i in range(chunks * _UNIT)])
            add_lanes(moments, 0)
            moments[0] = moments[0] * T.float32(1.0 / k)
            for c in T.unroll(chunks):
                for i in T.unroll(_UNIT):
                    # Past the row, the distance from the mean does not count.
                    numbers[c * _UNIT + i] = T.Select(
                        c * 32 + lane < units, numbers[c * _UNIT + i] - moments[0], T.float32(0.0)
                    )
            moments[1] = sum_of([numbers[i] * numbers[i] for i in range(chunks * _UNIT)])
            add_lanes(moments, 1)
            moments[1] = T.float32(1.0) / T.sqrt(moments[1] * T.float32(1.0 / k) + T.float32(epsilon))
            cp_async_wait(0)
            T.cuda.cta_sync()
            for c in T.unroll(chunks):
                for i in T.unroll(_UNIT):
                    at: T.let[T.int32] = T.min(c * 32 + lane, units - 1) * _UNIT + i
                    numbers[c * _UNIT + i] = numbers[c * _UNIT + i] * moments[1] * norm[at] + norm[k + at]
                for i in T.unroll(4):
                    pack(row[c * 4 + i], numbers[c * _UNIT + 2 * i], numbers[c * _UNIT + 2 * i + 1], dtype)

        for repeat in T.unroll(repeats):
            if repeat + 1 < repeats:
                load(repeat + 1)
            for j in T.unroll(outputs):
                total[j] = T.float32(0.0)
            for c in T.unroll(chunks):
                for i in T.unroll(4):
                    low_x: T.let[T.float32] = halves(row[c * 4 + i], dtype)[0]
                    high_x: T.let[T.float32] = halves(row[c * 4 + i], dtype)[1]
                    for j in T.unroll(outputs):
                        word = T.meta_var(weights[((repeat % buffers * outputs + j) * chunks + c) * 4 + i])
                        total[j] = total[j] + low_x * halves(word, dtype)[0]
                        total[j] = total[j] + high_x * halves(word, dtype)[1]
            for j in T.unroll(outputs):
                add_lanes(total, j)
            own: T.let[T.int32] = first + repeat * (warps * outputs) + lane
            if lane < outputs and own < n:
                value[0] = total[0]
                for j in T.unroll(outputs):
                    value[0] = T.Select(lane == j, total[j], value[0])
                if has_bias:
                    value[0] = value[0] + bias_value[repeat]
                if has_residual:
                    value[0] = value[0] + residual_value[repeat]
                if activation is not None:
                    value[0] = activation(value[0])
                if is_qkv:
                    if own < width:
                        out[0, 0, own] = T.Cast(dtype, value[0])
                    else:
                        if place[1] >= 0:
                            feature: T.let[T.int32] = own % width
                            cache[place[0], own // width - 1, feature // head_dim, place[1], feature % head_dim] = (
                                T.Cast(dtype, value[0])
                            )
                else:
                    out[0, 0, own] = T.Cast(out_type, value[0])

    return without_unused(gemv_rows)
