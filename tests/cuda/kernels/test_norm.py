"""LayerNorm on GPUs: in the emulation against float64, and what a compiler makes of it."""

import numpy as np
import pytest

from tests.cuda import emulation, sass
from tvm_attn.kernels.base import Case
from tvm_attn.kernels.cuda.norm import LayerNorm, NormTiles, candidates, default_tiles, layer_norm

CASES = {case.name: case for case in LayerNorm.cases()}


def check(case: Case, tiles: NormTiles) -> None:
    output = case.outputs[0].copy()
    emulation.run(layer_norm(case.kernel, tiles), [*case.inputs, output])
    error = output.astype(np.float64) - case.expected[0]
    assert np.sum(np.square(error)) <= case.nmse * np.sum(np.square(case.expected[0]))


@pytest.mark.parametrize("name", ["124M", "odd width", "large values", "mean far from zero", "constant rows"])
def test_layer_norm(name: str) -> None:
    check(CASES[name], default_tiles(CASES[name].kernel))


@pytest.mark.parametrize(("name", "tiles"), [("1.5B", NormTiles(4, 3)), ("one row", NormTiles(2, 1))])
def test_tiles(name: str, tiles: NormTiles) -> None:
    """Rows of several warps, and more rows of blocks than there are."""
    check(CASES[name], tiles)


@pytest.mark.parametrize("width", [37, 64, 768, 1600, 6400])
def test_candidates(width: int) -> None:
    kernel = LayerNorm(width, 1e-5, 8, "float16")
    some = candidates(kernel)
    assert some and len(set(some)) == len(some)
    assert all(tiles.threads <= 1024 for tiles in [*some, default_tiles(kernel)])


@pytest.mark.parametrize("width", [768, 1600])
def test_machine_code(width: int) -> None:
    kernel = LayerNorm(width, 1e-5, 8, "bfloat16")
    tiles = default_tiles(kernel)
    function = layer_norm(kernel, tiles)
    ((name, resources),) = sass.resources(function).items()
    assert resources.spills == resources.stack == 0
    instructions = sass.sass(function)[name]
    # One load of each number, one of its gamma and one of its beta.
    per_thread = -(-width // (4 * 32 * tiles.row_warps))
    assert sass.count(instructions, "LDG.E.128") == 3 * per_thread
    assert sass.count(instructions, "STG.E.64") == per_thread
