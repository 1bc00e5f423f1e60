"""Linear layers of one group of rows: extreme numbers in the emulation, and the compiled machine code."""

from typing import Any

import numpy as np
import pytest

from tests.cuda import sass
from tests.kernels.devices import case_of, emulate
from tvm_attn.config import PRESETS
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Case, Head, Linear, LinearKernel, QKVLinear, ResidualLinear
from tvm_attn.kernels.cuda.gemv import GemvTiles, gemv
from tvm_attn.kernels.cuda.gemv_tiles import candidates, default_tiles, resident

HEAD = Head(64, 1021, 8, 1, "int8", groups=1, activations="bfloat16")
HEAD_TILES = GemvTiles(8, 4, 1, stages=2, repeats=4)


def test_magnitude_and_rows() -> None:
    """Powers of two change only the exponents of logits, and NaN and infinity stay in their rows."""
    case, function = case_of(HEAD), gemv(HEAD, HEAD_TILES)
    (expected,) = emulate(function, case)
    error = expected - case.expected[0]
    assert np.sum(np.square(error)) <= 1e-10 * np.sum(np.square(case.expected[0]))
    x, *weights = case.inputs
    for exponent in (90, -60):
        scaled = (x.astype(np.float32) * np.float32(2.0**exponent)).astype(x.dtype)
        (logits,) = emulate(function, Case(HEAD, "", (scaled, *weights), case.outputs, ()))
        np.testing.assert_array_equal(logits, expected * np.float32(2.0**exponent))
    spoiled = x.copy()
    spoiled[0, 2], spoiled[0, 5, 7] = np.nan, np.inf
    (logits,) = emulate(function, Case(HEAD, "", (spoiled, *weights), case.outputs, ()))
    assert np.isnan(logits[0, 2]).all() and not np.isfinite(logits[0, 5]).any()
    others = [0, 1, 3, 4, 6, 7]
    np.testing.assert_array_equal(logits[0, others], expected[0, others])


def layers(preset: str, rows: int, dtype: str, weights: str) -> list[LinearKernel]:
    config = PRESETS[preset]
    width, inner = config.n_embd, config.n_inner
    common: dict[str, Any] = {"rows": rows, "columns": 1, "weights": weights, "groups": 1, "activations": dtype}
    cache: dict[str, Any] = {"heads": config.n_head, "context": config.n_positions, "cache_dtype": dtype}
    return [
        QKVLinear(width, 3 * width, **common, epsilon=1e-5, **cache),
        ResidualLinear(width, width, **common),
        Linear(width, inner, **common, epsilon=1e-5, activation="gelu_new"),
        ResidualLinear(inner, width, **common),
        Head(width, config.vocab_size, **common, epsilon=1e-5),
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


@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 8])
def test_all_blocks_run_at_once(rows: int, weights: str) -> None:
    """A second wave would be a few blocks on an otherwise idle device; by what the compiler reports."""
    processors, registers, shared = 132, 65536, 228 << 10  # an H100's or H200's; per multiprocessor
    for kernel in layers("gpt2-xl", rows, "float16", weights):
        tiles = default_tiles(kernel, processors)
        blocks = -(-kernel.out_features // tiles.block_outputs)
        if blocks <= processors:
            continue
        (found,) = sass.resources(gemv(kernel, tiles), "sm_90a").values()
        assert found.threads is not None and found.dynamic_shared is not None
        allocated = -(-found.registers // 8) * 8 * found.threads
        fit = min(registers // allocated, shared // (found.static_shared + found.dynamic_shared + 1024))
        assert blocks <= processors * fit, kernel
        assert resident(kernel, tiles) <= fit


def test_what_does_not_fit() -> None:
    with pytest.raises(ScheduleError, match="use matmul"):
        gemv(Head(64, 128, 16, 1, "float16", 1, "float16"), GemvTiles())
    with pytest.raises(ScheduleError, match="parts is 1"):
        gemv(Head(64, 128, 8, 1, "float16", 1, "float16", 1e-5), GemvTiles(splits=1, parts=2))


def test_indices_of_the_largest_model() -> None:
    """Indices count elements, and bytes of scales, in 32 bits."""
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
    function = gemv(kernel, tiles)
    ((name, resources),) = sass.resources(function, architecture).items()
    assert resources.spills == resources.stack == 0
    assert resources.dynamic_shared == tiles.shared_bytes(kernel)
    # At least two blocks per multiprocessor.
    assert resources.registers * resources.threads * 2 <= 65536
    instructions = sass.sass(function, architecture)[name]
    # Quantized weights are float16 operands for either dtype.
    assert sass.count(instructions, "HMMA.16816.F32" + (".BF16" if weights == "bfloat16" else "")) > 0
    assert sass.count(instructions, "LDSM.16.M88.4") > 0
    assert sass.count(instructions, "LDGSTS.E.BYPASS.LTC128B.128") > 0
    assert sass.count(instructions, "LDL") == sass.count(instructions, "STL") == 0
