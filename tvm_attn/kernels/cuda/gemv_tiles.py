"""Tiles of `tvm_attn.kernels.cuda.gemv`: the sizes that follow from them, defaults, and candidates worth measuring.

The bytes in flight limit how fast memory is read: 4.8 TB/s at 600 ns take 2.9 MB in flight, 22 KB for each of an H200's
132 multiprocessors. So tiles are chosen by how many bytes all blocks of a multiprocessor request at once, and by how
evenly blocks fill the multiprocessors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.cuda.gemv_operands import GROUP_BYTES, weight_format
from tvm_attn.kernels.cuda.limits import REGISTERS, SHARED_BYTES
from tvm_attn.kernels.linear import LinearKernel
from tvm_attn.storage import GROUP

ROWS = 8
"""The most rows of a group: the columns of `mma.sync`."""

UNIT = 16
"""Bytes of one copy, and of a row of an `ldmatrix` matrix."""

STEP_UNITS = 4
"""Units of an output per step of the loop: 64 bytes."""


@dataclass(frozen=True)
class GemvTiles:
    """The sizes of `gemv`.

    Attributes:
        outputs: outputs per warp, 8 or 16.
        columns: warps of a block with different outputs.
        splits: warps of a block that share K.
        steps: steps per stage, each of 64 bytes of each output.
        stages: stages per warp in shared memory, at least 2; all but one are being loaded.
        repeats: tiles that a block computes one after another.
        parts: parts of K whose x is in shared memory at a time; 1 with LayerNorm.
    """

    outputs: int = 16
    columns: int = 1
    splits: int = 8
    steps: int = 1
    stages: int = 4
    repeats: int = 1
    parts: int = 1

    @property
    def warps(self) -> int:
        """Warps per block."""
        return self.columns * self.splits

    @property
    def block_outputs(self) -> int:
        """Outputs per block."""
        return self.outputs * self.columns * self.repeats

    def shared_bytes(self, kernel: LinearKernel) -> int:
        """Bytes of shared memory per block."""
        return sum(Plan.of(kernel, self).shared)


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from a kernel and its tiles.

    Attributes:
        units: 16-byte units per output.
        stage_units: 16-byte units of an output per stage.
        k_stages: stages per output, of all warps together.
        iterations: stages per warp.
        part_groups: groups of 32 inputs whose x is in shared memory at a time.
        pitch: units from one unit of an output to the next, in a stage.
        stage: bytes per stage.
        x_row: bytes per row of x.
        sum_row: float32 numbers per row of a warp's sums.
        shared: bytes of the parts of shared memory: stages, x, sums of warps, constants of groups, scales, and gamma
            with beta.
    """

    units: int
    stage_units: int
    k_stages: int
    iterations: int
    part_groups: int
    pitch: int
    stage: int
    x_row: int
    sum_row: int
    shared: tuple[int, int, int, int, int, int]

    @staticmethod
    def of(kernel: LinearKernel, tiles: GemvTiles) -> Plan:
        """The sizes for a kernel and its tiles."""
        k, rows, quantized = kernel.in_features, kernel.rows, kernel.weights != kernel.activations
        per_unit = weight_format(kernel.weights).per_unit
        units, stage_units = k // per_unit, STEP_UNITS * tiles.steps
        k_stages = -(-units // stage_units)
        iterations = -(-k_stages // tiles.splits)
        part_stages = min(k_stages, -(-iterations // tiles.parts) * tiles.splits)
        part_groups = part_stages * stage_units * per_unit // GROUP
        # Different banks for eight units that are copied together (of one or two outputs) or read together (of eight
        # outputs), and for the four pairs of two rows of x.
        pitch = tiles.outputs + (2 if stage_units == STEP_UNITS else 1)
        x_row = (part_groups + (1 - part_groups % 2 if rows > 1 else 0)) * GROUP_BYTES
        # The same for the numbers of four rows and eight outputs that a warp writes.
        sum_row = tiles.outputs + 4
        # Scales past a row are read and multiplied with zero.
        padding = k_stages * stage_units * per_unit // GROUP - k // GROUP
        scales = -(-(tiles.block_outputs * (k // GROUP) + padding) * 2 // UNIT) * UNIT
        shared = (
            tiles.warps * tiles.stages * stage_units * pitch * UNIT,
            rows * x_row,
            min(tiles.repeats, 2) * tiles.warps * rows * sum_row * 4,
            part_groups * GROUP_BYTES if quantized else 0,
            scales if quantized else 0,
            2 * k * 4 if kernel.epsilon is not None else 0,
        )
        stage = stage_units * pitch * UNIT
        return Plan(units, stage_units, k_stages, iterations, part_groups, pitch, stage, x_row, sum_row, shared)


_IN_FLIGHT = 40 << 10
"""Bytes of weights that a multiprocessor should request at once: twice what an H200 needs."""

_PROCESSOR_SHARED_BYTES = 227 << 10
"""Shared memory of a multiprocessor since sm_90; each block takes 1024 bytes more than it asks for."""


def resident(kernel: LinearKernel, tiles: GemvTiles) -> int:
    """Blocks that a multiprocessor holds at once, at least; the compiler is told to make this possible."""
    registers = 64 if kernel.rows == 1 else 128
    by_registers = REGISTERS // (registers * 32 * tiles.warps)
    return min(by_registers, _PROCESSOR_SHARED_BYTES // (tiles.shared_bytes(kernel) + 1024))


def default_tiles(kernel: LinearKernel, multiprocessors: int = 132) -> GemvTiles:
    """Default tiles for a device with this number of multiprocessors.

    Narrow layers have one block for each 8 or 16 outputs, whose warps share K; wide layers have two blocks per
    multiprocessor, each of which computes several tiles. All blocks run at once: those of a second wave would leave
    most multiprocessors idle.
    """
    # 16 outputs halve the work per byte, but the blocks should still fill three quarters of the multiprocessors.
    outputs = 16 if -(-kernel.out_features // 16) * 4 >= 3 * multiprocessors else 8
    count = -(-kernel.out_features // outputs)
    tiles = GemvTiles(outputs)
    if count > 4 * multiprocessors:
        tiles = replace(tiles, columns=4, splits=2, repeats=-(-count // (4 * 2 * multiprocessors)))
    tiles = replace(tiles, splits=min(tiles.splits, Plan.of(kernel, tiles).k_stages))
    tiles = _fitting(kernel, _filled(kernel, tiles, multiprocessors))
    at_once = multiprocessors * resident(kernel, tiles)
    if (blocks := _blocks(kernel, tiles)) > at_once:
        tiles = replace(tiles, repeats=tiles.repeats * -(-blocks // at_once))
        tiles = _fitting(kernel, _filled(kernel, tiles, multiprocessors))
    return tiles


def _blocks(kernel: LinearKernel, tiles: GemvTiles) -> int:
    return -(-kernel.out_features // tiles.block_outputs)


def _filled(kernel: LinearKernel, tiles: GemvTiles, multiprocessors: int) -> GemvTiles:
    """The tiles with as many stages as put `_IN_FLIGHT` bytes in flight."""
    each = min(2, -(-_blocks(kernel, tiles) // multiprocessors))  # blocks per multiprocessor
    wanted = 1 + -(-_IN_FLIGHT // (each * tiles.warps * tiles.outputs * STEP_UNITS * UNIT))
    return replace(tiles, stages=max(2, min(wanted, 1 + tiles.repeats * Plan.of(kernel, tiles).iterations)))


def _fitting(kernel: LinearKernel, tiles: GemvTiles) -> GemvTiles:
    """The tiles with fewer stages, or other sizes, so that a block's shared memory suffices.

    Raises:
        ScheduleError: there are none.
    """
    while tiles.shared_bytes(kernel) > SHARED_BYTES:
        if kernel.epsilon is None and Plan.of(kernel, tiles).shared[1] > SHARED_BYTES // 3:
            tiles = replace(tiles, parts=2 * tiles.parts)
        elif tiles.stages > 3:
            tiles = replace(tiles, stages=tiles.stages - 1)
        elif tiles.repeats > 1:
            tiles = replace(tiles, repeats=-(-tiles.repeats // 2))
        elif tiles.stages > 2:
            tiles = replace(tiles, stages=tiles.stages - 1)
        elif tiles.splits > 1:
            tiles = replace(tiles, splits=tiles.splits // 2)
        else:
            raise ScheduleError(f"no tiles of {kernel} fit {SHARED_BYTES} bytes of shared memory: use fewer rows")
    return tiles


def candidates(kernel: LinearKernel, multiprocessors: int = 132) -> Iterator[GemvTiles]:
    """Tiles worth measuring, the default first: they waste no warp, and request enough bytes at once, or all."""
    default = default_tiles(kernel, multiprocessors)
    yield default
    for outputs in (8, 16):
        for columns, splits in ((1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2)):
            count = -(-kernel.out_features // (outputs * columns))
            for repeats in sorted({1, *(-(-count // (waves * multiprocessors)) for waves in range(1, 5))}):
                for steps in (1, 2):
                    for stages in (2, 3, 4, 6, 8, 12):
                        tiles = GemvTiles(outputs, columns, splits, steps, stages, repeats, default.parts)
                        if tiles != default and _worth_measuring(kernel, tiles, multiprocessors):
                            yield tiles


def _worth_measuring(kernel: LinearKernel, tiles: GemvTiles, multiprocessors: int) -> bool:
    plan, shared = Plan.of(kernel, tiles), tiles.shared_bytes(kernel)
    work, blocks = tiles.repeats * plan.iterations, -(-kernel.out_features // tiles.block_outputs)
    if tiles.splits > plan.k_stages or shared > SHARED_BYTES or tiles.stages - 1 > work:
        return False
    if not multiprocessors <= 2 * blocks <= 32 * multiprocessors:
        return False
    resident = min(-(-blocks // multiprocessors), 2 * SHARED_BYTES // shared, 64 // tiles.warps)
    in_flight = resident * (tiles.stages - 1) * tiles.warps * tiles.outputs * tiles.steps * STEP_UNITS * UNIT
    return in_flight >= _IN_FLIGHT // 2 or tiles.stages - 1 == work
