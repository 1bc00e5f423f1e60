"""A cost model of matmul tiles on one GPU, which gives the default tiles and the order in which to tune.

It models an H100 or H200 and was made without one: its figures come from NVIDIA's data sheets, the rate of `mma.sync`
and the latencies from published microbenchmarks ("Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking", 2024). No prediction has been compared with a measurement yet. The result, in clocks, is the slowest
of

- tensor cores: `mma.sync` reaches about 62 % of what Hopper's `wgmma` does;
- shared memory, 128 bytes per clock: a stage is written once, and each warp reads its fragments. A warp tile of 64 x 64
  does 16 multiplications per byte read, one of 32 x 32 does 8, and a byte written costs the same: this limits all large
  products here;
- L2, 64 bytes per clock and multiprocessor, and device memory, 18.6;
- instructions, one per clock and scheduler;
- latency: copies in flight, and waiting at each barrier.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

from tvm_attn.kernels.cuda.limits import REGISTERS, SHARED_BYTES
from tvm_attn.kernels.cuda.matmul_tiles import MatmulTiles
from tvm_attn.kernels.linear import Linear, LinearKernel

PROCESSORS, SCHEDULERS = 132, 4
CLOCK = 1.755e9  # Hz
_SHARED_RATE, _L2_RATE, _MEMORY_RATE = 128.0, 64.0, 18.6  # bytes per clock and multiprocessor
_MMA = 6.4  # clocks of a tensor core per m16n8k16: 512 multiplications per clock, of which `mma.sync` gets 62 %
_LATENCY = 800.0  # from global to shared memory, clocks
_LAUNCH = 3000.0  # clocks for starting and ending a kernel
_ALL_SHARED_BYTES, _THREADS = 227 * 1024, 2048  # per multiprocessor
_ALONE, _SHORT, _ROOM = 0.25, 0.15, 0.05
_KEPT = 48


def predicted_clocks(kernel: LinearKernel, tiles: MatmulTiles, rows: int) -> float:
    """Clocks of a call with this number of rows."""
    k, n, quantized = kernel.in_features, kernel.out_features, kernel.weights != kernel.activations
    blocks = -(-rows // tiles.rows) * -(-n // tiles.columns)
    per_processor = -(-blocks // PROCESSORS)
    registers = min(255, tiles.registers(kernel) + 8)
    resident = min(
        per_processor,
        _ALL_SHARED_BYTES // (tiles.shared_bytes(kernel) + 1024),
        REGISTERS // (registers * tiles.threads),
        _THREADS // tiles.threads,
    )
    if resident == 0:
        return float("inf")
    # One step of 16 along K, of one block.
    height, width, warps = tiles.row_fragments, tiles.column_fragments, tiles.warp_rows * tiles.warp_columns
    written = sum(tiles.stage_bytes(kernel.weights)) / (tiles.depth // 16)
    read = warps * (height * 16 * 32 + width * 8 * (20 if quantized else 32))
    products = height * width * warps
    instructions = warps * (height * width + height + width / 2 + 6 + (12 * width if quantized else 0))
    busy = min(SCHEDULERS, resident * tiles.threads // 32)
    step = max(
        products * _MMA / busy,
        (written + read) / _SHARED_RATE,
        written / _L2_RATE,
        (instructions + written / 16 / 32 * 4) / busy,
    )
    stages = -(-k // tiles.depth)
    throughput = per_processor * (stages * tiles.depth // 16) * step
    # A guess at what a scheduler with few warps cannot hide.
    throughput *= 1 + _ALONE * SCHEDULERS * 32 / (resident * tiles.threads)
    # One stage of one block: the work of a warp, one thing after another.
    own = tiles.steps * (height * width * _MMA + (12 * width if quantized else 0)) + 60
    in_turn = -(-per_processor // resident) * stages * max(_LATENCY / (tiles.stages - 1), own)
    size = 4 if kernel.output_dtype == "float32" else 2
    traffic = n * k * {"int8": 1.0625, "int4": 0.5625}.get(kernel.weights, 2) + rows * n * size
    outputs = per_processor * tiles.rows * tiles.columns
    finish = outputs * (size / 32 + (10 if isinstance(kernel, Linear) and kernel.activation else 3) / 128)
    finish += 200 * (tiles.warp_slices > 1)
    memory = traffic / (_MEMORY_RATE * PROCESSORS)
    # Two terms to break ties: a short pipeline may not hide latency, and a long one takes room that another block
    # could have on a smaller GPU.
    flow = max(throughput, in_turn, memory) * (1 + _SHORT / (tiles.stages - 1) ** 2)
    flow *= 1 + _ROOM * tiles.shared_bytes(kernel) / SHARED_BYTES
    return _LAUNCH + -(-per_processor // resident) * _LATENCY + flow + finish / resident**0.5


@lru_cache
def candidates(kernel: LinearKernel, rows: int = 1024) -> tuple[MatmulTiles, ...]:
    """Tiles worth measuring for about this number of rows, the best prediction first."""
    best: dict[tuple[int, ...], list[tuple[float, MatmulTiles]]] = {}
    for block_rows, columns, depth in product((16, 32, 64, 128), (16, 32, 64, 96, 128, 192, 256), (32, 64, 128)):
        if block_rows > max(16, rows):
            continue
        for warp_rows, warp_columns, slices in product((1, 2, 4), (1, 2, 4), (1, 2, 4)):
            if not 2 <= warp_rows * warp_columns * slices <= 8:
                continue
            for stages in (2, 3, 4, 5, 6):
                tiles = MatmulTiles(block_rows, columns, depth, warp_rows, warp_columns, slices, stages)
                if tiles.fits(kernel):
                    shape = (block_rows, columns, warp_rows, warp_columns, slices)
                    best.setdefault(shape, []).append((predicted_clocks(kernel, tiles, rows), tiles))
    # Two of each shape: depth and stages matter less.
    kept = [pair for pairs in best.values() for pair in sorted(pairs, key=lambda pair: pair[0])[:2]]
    return tuple(tiles for _, tiles in sorted(kept, key=lambda pair: pair[0])[:_KEPT])


def default_tiles(kernel: LinearKernel, rows: int = 1024) -> MatmulTiles:
    """The tiles with the best prediction for about this number of rows: 1024 for prompts, the batch size for decode."""
    return candidates(kernel, rows)[0]
