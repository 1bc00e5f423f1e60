"""Linear layers of one group of rows: in the emulation against float64, and what a compiler makes of them."""

import functools

import numpy as np
import pytest

from tests.cuda import emulation, sass
from tvm_attn.config import PRESETS
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.base import Case
from tvm_attn.kernels.cuda.gemv import GemvTiles, candidates, default_tiles, gemv
from tvm_attn.kernels.cuda.gemv_tiles import Kernel
from tvm_attn.kernels.cuda.linear import Head, Linear, QKVLinear, ResidualLinear

build = functools.cache(gemv)

COVERED = [
    (Linear, "float16", "float16", "1 rows, LayerNorm", None),
    (ResidualLinear, "float16", "float16", "long rows", None),
    (ResidualLinear, "bfloat16", "int4", "1 rows, LayerNorm", None),
    (QKVLinear, "bfloat16", "bfloat16", "8 rows, LayerNorm", GemvTiles(16, 2, 2, stages=2, repeats=2)),
    (QKVLinear, "float16", "int8", "8 rows", GemvTiles(8, 4, 2, steps=2)),
    (Linear, "bfloat16", "int8", "8 rows", GemvTiles(16, 1, 1, stages=3, parts=2)),
    (Head, "float16", "int4", "8 rows, LayerNorm", GemvTiles(16, 4, 1, stages=3, repeats=5)),
]
"""Cases with tiles (None: the default) such that every layer, format, number of rows and size of tiles occurs."""

HEAD = Head(64, 1021, 8, "bfloat16", "int8", 1)
HEAD_TILES = GemvTiles(8, 4, 1, stages=2, repeats=4)


def find(kind: type[Kernel], dtype: str, weights: str, name: str) -> Case:
    (found,) = [
        case
        for case in kind.cases()
        if (case.kernel.dtype, case.kernel.weights, case.kernel.groups, case.name) == (dtype, weights, 1, name)
    ]
    return found


def run(case: Case, tiles: GemvTiles) -> list[np.ndarray]:
    arguments = [array.copy() for array in (*case.inputs, *case.outputs)]
    emulation.run(build(case.kernel, tiles), arguments)
    return [arguments[i] for i in case.in_place] + arguments[len(case.inputs) :]


@pytest.mark.parametrize(("kind", "dtype", "weights", "name", "tiles"), COVERED)
def test_gemv(kind: type[Kernel], dtype: str, weights: str, name: str, tiles: GemvTiles | None) -> None:
    case = find(kind, dtype, weights, name)
    results = run(case, tiles or default_tiles(case.kernel))
    for result, expected in zip(results, case.expected, strict=True):
        error = result.astype(np.float64) - expected
        assert np.sum(np.square(error)) <= case.nmse * np.sum(np.square(expected))


def test_magnitude_and_rows() -> None:
    """Powers of two change the exponents of logits alone, and numbers that are none stay in their rows."""
    case = find(Head, HEAD.dtype, HEAD.weights, "8 rows")
    assert case.kernel == HEAD
    (expected,) = run(case, HEAD_TILES)
    error = expected - case.expected[0]
    assert np.sum(np.square(error)) <= 1e-10 * np.sum(np.square(case.expected[0]))
    x, *weights = case.inputs
    for exponent in (90, -60):
        scaled = (x.astype(np.float32) * np.float32(2.0**exponent)).astype(x.dtype)
        (logits,) = run(Case(HEAD, "", (scaled, *weights), case.outputs, ()), HEAD_TILES)
        np.testing.assert_array_equal(logits, expected * np.float32(2.0**exponent))
    spoiled = x.copy()
    spoiled[0, 2], spoiled[0, 5, 7] = np.nan, np.inf
    (logits,) = run(Case(HEAD, "", (spoiled, *weights), case.outputs, ()), HEAD_TILES)
    assert np.isnan(logits[0, 2]).all() and not np.isfinite(logits[0, 5]).any()
    others = [0, 1, 3, 4, 6, 7]
    np.testing.assert_array_equal(logits[0, others], expected[0, others])


def layers(preset: str, rows: int, dtype: str, weights: str) -> list[Kernel]:
    config = PRESETS[preset]
    width, inner = config.n_embd, config.n_inner
    common = (rows, dtype, weights, 1)
    return [
        QKVLinear(width, 3 * width, *common, 1e-5, heads=config.n_head, context=config.n_positions),
        ResidualLinear(width, width, *common),
        Linear(width, inner, *common, 1e-5, activation="gelu_new"),
        ResidualLinear(inner, width, *common),
        Head(width, config.vocab_size, *common, 1e-5),
    ]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_tiles_fit_every_device(preset: str, rows: int) -> None:
    least = min(sass.SHARED_BYTES.values())
    for weights in ("float16", "int8", "int4"):
        for kernel in layers(preset, rows, "float16", weights):
            some = list(candidates(kernel))
            assert some[0] == default_tiles(kernel)
            assert len(set(some)) == len(some)
            assert all(tiles.shared_bytes(kernel) <= least and 32 * tiles.warps <= 1024 for tiles in some)


def test_what_does_not_fit() -> None:
    with pytest.raises(ScheduleError, match="use matmul"):
        gemv(Head(64, 128, 16, "float16", "float16", 1), GemvTiles())
    with pytest.raises(ScheduleError, match="parts is 1"):
        gemv(Head(64, 128, 8, "float16", "float16", 1, 1e-5), GemvTiles(splits=1, parts=2))


def test_indices_of_the_largest_model() -> None:
    """They are 32-bit numbers of elements, and of bytes of scales."""
    config = PRESETS["gpt2-xl"]
    assert config.vocab_size * config.n_embd < 2**31
    assert 64 * 2 * config.n_head * config.n_positions * config.head_dim < 2**31


@pytest.mark.parametrize(
    ("rows", "dtype", "weights", "layer", "architecture"),
    [
        (8, "bfloat16", "bfloat16", 3, "sm_90a"),
        (1, "float16", "int4", 4, "sm_80"),
        (8, "bfloat16", "int8", 0, "sm_120"),
    ],
)
def test_machine_code(rows: int, dtype: str, weights: str, layer: int, architecture: str) -> None:
    kernel = layers("gpt2-xl", rows, dtype, weights)[layer]
    tiles = default_tiles(kernel)
    function = build(kernel, tiles)
    ((name, resources),) = sass.resources(function, architecture).items()
    assert resources.spills == resources.stack == 0
    assert resources.dynamic_shared == tiles.shared_bytes(kernel)
    # Two blocks of a multiprocessor at least.
    assert resources.registers * resources.threads * 2 <= 65536
    instructions = sass.sass(function, architecture)[name]
    # Quantized weights are float16 operands for either dtype.
    assert sass.count(instructions, "HMMA.16816.F32" + (".BF16" if weights == "bfloat16" else "")) > 0
    assert sass.count(instructions, "LDSM.16.M88.4") > 0
    assert sass.count(instructions, "LDGSTS.E.BYPASS.128") > 0
    assert sass.count(instructions, "LDL") == sass.count(instructions, "STL") == 0
