"""Layers of one row without tensor cores: every case in the emulation, and the compiled machine code."""

import pytest

from tests.cuda import sass
from tests.kernels.cuda.test_gemv import layers
from tests.kernels.devices import assert_close, emulate
from tvm_attn.config import PRESETS
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Case, Head, Linear, QKVLinear, ResidualLinear
from tvm_attn.kernels.cuda.gemv_rows import RowTiles, candidates, default_tiles, gemv_rows, resident, suits

CASES = [case for family in (QKVLinear, ResidualLinear, Linear, Head) for case in family.cases() if suits(case.kernel)]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.kernel.family}, {case.kernel.activations}, {case.name}"
)
def test_cases(case: Case) -> None:
    """One output at a time, and some with the next ones on their way: outputs are no multiple of either."""
    for tiles in (RowTiles(1, 2), RowTiles(3, 2, 3)):
        assert_close(case, emulate(gemv_rows(case.kernel, tiles), case))


def test_other_layers_are_refused() -> None:
    for kernel in (
        Head(64, 128, 8, 1, "float16", 1, "float16"),
        Head(64, 128, 1, 1, "int8", 1, "float16"),
        Head(6400, 128, 1, 1, "float16", 1, "float16"),
        Head(64, 128, 1, 1, "float32", 1),
    ):
        with pytest.raises(ScheduleError, match="use gemv"):
            gemv_rows(kernel, RowTiles())


@pytest.mark.parametrize("preset", PRESETS)
def test_default_tiles_are_candidates_of_one_wave(preset: str) -> None:
    for kernel in filter(suits, layers(preset, 1, "float16", "float16")):
        tiles = default_tiles(kernel)
        assert tiles in set(candidates(kernel))
        assert -(-kernel.out_features // tiles.block_outputs) <= 132 * resident(kernel, tiles)


@pytest.mark.parametrize("layer", range(5))
def test_machine_code(layer: int) -> None:
    kernel = layers("gpt2", 1, "bfloat16", "bfloat16")[layer]
    tiles = default_tiles(kernel)
    function = gemv_rows(kernel, tiles, dependent=True)
    (found,) = sass.resources(function, "sm_90a").values()
    assert found.spills == found.stack == 0
    assert -(-found.registers // 8) * 8 * 32 * tiles.warps * resident(kernel, tiles) <= 65536
    (code,) = sass.sass(function, "sm_90a").values()
    before, _, after = code.partition("ACQBULK")
    # The weights of the first outputs, and the bias, do not wait for the kernel before.
    assert sass.count(before, "LDG.E.128") == tiles.outputs * -(-kernel.in_features // 256)
    # What that kernel writes is read after the wait, from where it may have changed.
    assert sass.count(after, "LDG.E.128") > 0 and "LDG.E.128.CONSTANT" not in code
