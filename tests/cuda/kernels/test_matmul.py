"""Matrix multiplication on tensor cores: in the emulation against float64, and what a compiler makes of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tvm.script import tirx as T

from tests.cuda import emulation, sass
from tests.cuda.overflow import overflows
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.base import Case
from tvm_attn.kernels.cuda.linear import Head, Linear, QKVLinear, ResidualLinear
from tvm_attn.kernels.cuda.matmul import matmul
from tvm_attn.kernels.cuda.matmul_cost import CLOCK, candidates, default_tiles, predicted_clocks
from tvm_attn.kernels.cuda.matmul_tiles import SHARED_LIMIT, LinearKernel, MatmulTiles


def is_tested(kernel: LinearKernel) -> bool:
    """Of kernels for any number of rows, those that do not only combine what others have: a compiler takes its time.

    All dtypes and weights with `Linear`; what happens to its sums is independent of them, but for the dtype of stores.
    """
    if kernel.groups is not None or kernel.epsilon is not None:
        return False
    return isinstance(kernel, Linear) or (kernel.dtype == "bfloat16") == (kernel.weights == "int4")


CASES = [case for kind in (Linear, ResidualLinear, QKVLinear, Head) for case in kind.cases() if is_tested(case.kernel)]
KERNELS = list(dict.fromkeys(case.kernel for case in CASES))

# Together: one to eight warps, along every axis; one, two and three fragments; every depth; copies that do not divide
# among the threads; more stages than tiles of K; more tiles of rows than are computed together.
TILES = [
    MatmulTiles(32, 32, 64, 1, 2, stages=2),
    MatmulTiles(16, 24, 64, 1, 1, 2, stages=3, raster=2),
    MatmulTiles(64, 32, 64, 2, 2, stages=4),
    MatmulTiles(16, 32, 128, 1, 1, 4, stages=2),
    MatmulTiles(48, 16, 64, 3, 1, stages=3, raster=1),
    MatmulTiles(32, 48, 128, 2, 1, 2, stages=5),
    MatmulTiles(16, 16, 32, 1, 2, stages=3, raster=3),
    MatmulTiles(128, 64, 64, 4, 2, stages=2),
]
# What a prompt spends its time in, and what decoding a batch does; the width of GPT-2 124M.
HOT: list[tuple[LinearKernel, int]] = [
    (QKVLinear(768, 2304, 8, "float16", "float16", heads=12, context=1024), 1024),
    (ResidualLinear(3072, 768, 8, "bfloat16", "bfloat16"), 1024),
    (Linear(768, 3072, 8, "float16", "int8", activation="gelu_new"), 1024),
    (Head(768, 50257, 8, "float16", "float16"), 1024),
    (Linear(768, 3072, 8, "bfloat16", "int4", activation="gelu_new"), 64),
]


@pytest.fixture
def rolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops stay loops: the same statements, of which a C++ compiler makes code in half the time."""
    monkeypatch.setattr(T, "unroll", T.serial)


def tiles_for(kernel: LinearKernel) -> MatmulTiles:
    """Other tiles for each kernel in turn, of those that fit it."""
    start = KERNELS.index(kernel)
    return next(tiles for i in range(len(TILES)) if (tiles := TILES[(start + i) % len(TILES)]).fits(kernel))


build = functools.cache(matmul)


def check(case: Case, tiles: MatmulTiles) -> None:
    arguments = [array.copy() for array in (*case.inputs, *case.outputs)]
    emulation.run(build(case.kernel, tiles), arguments)
    results = [arguments[index] for index in case.in_place] + arguments[len(case.inputs) :]
    for result, expected in zip(results, case.expected, strict=True):
        difference = result.astype(np.float64) - expected
        assert np.sum(np.square(difference)) <= case.nmse * np.sum(np.square(expected))


def some_rows(case: Case, groups: slice) -> Case:
    """A case with some of its groups of rows."""
    expected = tuple(array[groups] for array in case.expected)
    outputs = tuple(array[groups] for array in case.outputs)
    count = len(case.outputs[0])
    inputs = tuple(array[groups] if array.ndim == 3 and len(array) == count else array for array in case.inputs)
    return replace(case, inputs=inputs, outputs=outputs, expected=expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel.family} {case.kernel.weights} {case.name}")
@pytest.mark.usefixtures("rolled")
def test_case(case: Case) -> None:
    check(case, tiles_for(case.kernel))


@pytest.mark.usefixtures("rolled")
def test_any_number_of_rows() -> None:
    case = next(case for case in CASES if isinstance(case.kernel, ResidualLinear) and len(case.outputs[0]) > 3)
    for groups in (slice(0, 1), slice(1, 3), slice(2, 5)):
        check(some_rows(case, groups), tiles_for(case.kernel))


def test_unrolled() -> None:
    """As a device gets it."""
    case = next(case for case in CASES if isinstance(case.kernel, Head) and case.kernel.weights == "int4")
    check(case, default_tiles(case.kernel, rows=16))


def test_no_value_is_lost_to_overflow(rolled: None) -> None:
    """Sums far out: the activation is 0 or x, never not a number."""
    kernel = Linear(32, 64, 8, "bfloat16", "bfloat16", activation="gelu_new")
    x, weight = np.full((1, 8, 32), 1e4), np.full((64, 32, 1), 1e8)
    weight[::2] = -1e8
    dtype = CASES[-1].inputs[0].dtype
    arrays = [x.astype(dtype), weight.astype(dtype), np.zeros(64, np.float32), np.zeros((1, 8, 64), dtype)]
    emulation.run(build(kernel, tiles_for(next(k for k in KERNELS if k == kernel))), arrays)
    result = arrays[-1].astype(np.float64)
    assert np.all(result[..., ::2] == 0)
    assert np.allclose(result[..., 1::2], 32e12, rtol=0.01)


def test_tiles_that_do_not_fit() -> None:
    kernel, tiles = KERNELS[0], TILES[0]
    for wrong in (
        replace(tiles, rows=24),
        replace(tiles, columns=36),
        replace(tiles, depth=48),
        replace(tiles, warp_slices=4),
        replace(tiles, stages=1),
        replace(tiles, rows=128, columns=256, depth=128),
        replace(tiles, rows=256, columns=128),
    ):
        assert not wrong.fits(kernel)
    with pytest.raises(ScheduleError, match="does not fit"):
        matmul(kernel, replace(tiles, stages=1))
    assert not tiles.fits(replace(kernel, in_features=72))
    assert not MatmulTiles(32, 32, 32, 1, 1).fits(replace(kernel, weights="int8"))


@pytest.mark.parametrize("kernel, rows", HOT, ids=lambda value: getattr(value, "family", value))
def test_candidates(kernel: LinearKernel, rows: int) -> None:
    found = candidates(kernel, rows)
    assert len(set(found)) == len(found) >= 16
    assert all(tiles.fits(kernel) and tiles.rows <= rows for tiles in found)
    predictions = [predicted_clocks(kernel, tiles, rows) for tiles in found]
    assert predictions == sorted(predictions)


def presets() -> Iterator[tuple[LinearKernel, int]]:
    for rows in (16, 1024):
        for width in (768, 1600):
            for weights in ("float16", "int4"):
                yield QKVLinear(width, 3 * width, 8, "float16", weights, heads=width // 64, context=1024), rows
                yield ResidualLinear(width, width, 8, "float16", weights), rows
                yield Linear(width, 4 * width, 8, "float16", weights, activation="gelu_new"), rows
                yield ResidualLinear(4 * width, width, 8, "float16", weights), rows


def test_default_tiles_keep_the_chip_busy() -> None:
    for kernel, rows in presets():
        tiles = default_tiles(kernel, rows)
        blocks = -(-rows // tiles.rows) * -(-kernel.out_features // tiles.columns)
        assert blocks >= 48
        assert tiles.shared_bytes(kernel) <= SHARED_LIMIT
        floor = kernel.in_features * kernel.out_features * rows * 2 / 989e12 * CLOCK
        assert predicted_clocks(kernel, tiles, rows) > floor


def test_no_index_overflows() -> None:
    """GPT-2 1.5B with 64 slots, all full at once; 32768 times that does overflow."""
    largest = {"groups": 64 * 1024 // 8, "cache_slots": 64}
    kernels: list[LinearKernel] = [kernel for kernel, rows in presets() if kernel.in_features > 1024 and rows == 1024]
    for kernel in (*kernels, Head(1600, 50257, 8, "float16", "int8")):
        function = build(kernel, default_tiles(kernel))
        assert overflows(function, largest) == []
        assert overflows(function, largest | {"groups": 2**28})


@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_machine_code(architecture: str) -> None:
    """No spills, and tensor cores fed as they should be; a kernel for each architecture, another one for the next."""
    kernel, rows = HOT[sass.ARCHITECTURES.index(architecture) % len(HOT)]
    tiles = default_tiles(kernel, rows)
    function = build(kernel, tiles)
    (found,) = sass.resources(function, architecture).values()
    assert found.spills == 0 and found.stack == 0
    assert found.threads == tiles.threads
    assert found.static_shared == 0 and found.dynamic_shared == tiles.shared_bytes(kernel)
    assert found.dynamic_shared <= sass.SHARED_BYTES[architecture]
    (code,) = sass.sass(function, architecture).values()
    products = tiles.row_fragments * tiles.column_fragments * tiles.steps
    assert sass.count(code, "HMMA.16816.F32") % products == 0 and "HMMA" in code
    assert sass.count(code, "LDSM.16.M88.4") >= tiles.row_fragments * tiles.steps
    assert sass.count(code, "LDGSTS.E.BYPASS") > 0
    assert "LDL" not in code and "STL" not in code
    stores = "STG.E.128" if isinstance(kernel, Linear | QKVLinear) else "STG.E"
    assert sass.count(code, stores) > 0
