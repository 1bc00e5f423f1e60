"""Matrix multiplication on tensor cores: rows, tiles and extreme numbers, and the compiled machine code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.cuda import emulation, sass
from tests.cuda.overflow import overflows
from tests.kernels.cuda.emulated import MATMUL_TILES, function_for
from tests.kernels.devices import assert_close, case_of, emulate
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Case, Head, Linear, LinearKernel, QKVLinear, ResidualLinear
from tvm_attn.kernels.cuda.limits import SHARED_BYTES
from tvm_attn.kernels.cuda.matmul import matmul
from tvm_attn.kernels.cuda.matmul_cost import CLOCK, candidates, default_tiles, predicted_clocks
from tvm_attn.kernels.cuda.matmul_tiles import MatmulTiles
from tvm_attn.storage import numpy_dtype

build = functools.cache(matmul)


def layer(kind: type[LinearKernel], k: int, n: int, activations: str, weights: str, **more: Any) -> Any:
    """A layer for any number of groups of eight rows."""
    return kind(k, n, 8, 1, weights, activations=activations, **more)


# The layers that dominate prompts and batched decode, at the width of GPT-2 124M.
HOT: list[tuple[LinearKernel, int]] = [
    (layer(QKVLinear, 768, 2304, "float16", "float16", heads=12, context=1024, cache_dtype="float16"), 1024),
    (layer(ResidualLinear, 3072, 768, "bfloat16", "bfloat16"), 1024),
    (layer(Linear, 768, 3072, "float16", "int8", activation="gelu_new"), 1024),
    (layer(Head, 768, 50257, "float16", "float16"), 1024),
    (layer(Linear, 768, 3072, "bfloat16", "int4", activation="gelu_new"), 64),
]


def some_rows(case: Case, groups: slice) -> Case:
    """A case with only some of its row groups."""
    expected = tuple(array[groups] for array in case.expected)
    outputs = tuple(array[groups] for array in case.outputs)
    count = len(case.outputs[0])
    inputs = tuple(array[groups] if array.ndim == 3 and len(array) == count else array for array in case.inputs)
    return replace(case, inputs=inputs, outputs=outputs, expected=expected)


def test_any_number_of_rows() -> None:
    case = case_of(layer(ResidualLinear, 192, 72, "float16", "float16"))
    for groups in (slice(0, 1), slice(1, 3), slice(2, 5)):
        some = some_rows(case, groups)
        assert_close(some, emulate(function_for(case.kernel), some))


def test_unrolled() -> None:
    """With all loops unrolled, as a device gets it."""
    case = case_of(layer(Head, 64, 1021, "bfloat16", "int4"))
    assert_close(case, emulate(build(case.kernel, default_tiles(case.kernel, rows=16)), case))


def test_no_value_is_lost_to_overflow() -> None:
    """For sums of large magnitude the activation is 0 or x, never NaN."""
    kernel = layer(Linear, 32, 64, "bfloat16", "bfloat16", activation="gelu_new")
    x, weight = np.full((1, 8, 32), 1e4), np.full((64, 32, 1), 1e8)
    weight[::2] = -1e8
    dtype = numpy_dtype("bfloat16")
    arrays = [x.astype(dtype), weight.astype(dtype), np.zeros(64, np.float32), np.zeros((1, 8, 64), dtype)]
    emulation.run(function_for(kernel), arrays)
    result = arrays[-1].astype(np.float64)
    assert np.all(result[..., ::2] == 0)
    assert np.allclose(result[..., 1::2], 32e12, rtol=0.01)


def test_tiles_that_do_not_fit() -> None:
    kernel, tiles = layer(Linear, 64, 136, "float16", "float16", activation="gelu_new"), MATMUL_TILES[0]
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
                sizes = {"heads": width // 64, "context": 1024, "cache_dtype": "float16"}
                yield layer(QKVLinear, width, 3 * width, "float16", weights, **sizes), rows
                yield layer(ResidualLinear, width, width, "float16", weights), rows
                yield layer(Linear, width, 4 * width, "float16", weights, activation="gelu_new"), rows
                yield layer(ResidualLinear, 4 * width, width, "float16", weights), rows


def test_default_tiles_keep_the_chip_busy() -> None:
    for kernel, rows in presets():
        tiles = default_tiles(kernel, rows)
        blocks = -(-rows // tiles.rows) * -(-kernel.out_features // tiles.columns)
        assert blocks >= 48
        assert tiles.shared_bytes(kernel) <= SHARED_BYTES
        floor = kernel.in_features * kernel.out_features * rows * 2 / 989e12 * CLOCK
        assert predicted_clocks(kernel, tiles, rows) > floor


def test_no_index_overflows() -> None:
    """GPT-2 1.5B with 64 full slots; 32768 times that does overflow."""
    largest = {"groups": 64 * 1024 // 8, "cache_slots": 64}
    kernels: list[LinearKernel] = [kernel for kernel, rows in presets() if kernel.in_features > 1024 and rows == 1024]
    for kernel in (*kernels, layer(Head, 1600, 50257, "float16", "int8")):
        function = build(kernel, default_tiles(kernel))
        assert overflows(function, largest) == []
        assert overflows(function, largest | {"groups": 2**28})


@pytest.mark.parametrize("architecture", sass.ARCHITECTURES)
def test_machine_code(architecture: str) -> None:
    """No spills, and the expected loads for the tensor cores; each architecture compiles a different kernel."""
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
    assert sass.count(code, "LDGSTS.E.BYPASS.LTC128B.128") > 0
    assert "LDL" not in code and "STL" not in code
    stores = "STG.E.128" if isinstance(kernel, Linear | QKVLinear) else "STG.E"
    assert sass.count(code, stores) > 0
