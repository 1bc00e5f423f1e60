"""LayerNorm on GPUs: its candidates, and the compiled machine code."""

import pytest

from tests.cuda import sass
from tvm_attn.kernels import LayerNorm
from tvm_attn.kernels.cuda.norm import candidates, default_tiles, layer_norm


@pytest.mark.parametrize("width", [37, 64, 768, 1600, 6400])
def test_candidates(width: int) -> None:
    kernel = LayerNorm(width, 1e-5, 8, activations="float16")
    some = candidates(kernel)
    assert some and len(set(some)) == len(some)
    assert all(tiles.threads <= 1024 for tiles in [*some, default_tiles(kernel)])


@pytest.mark.parametrize("width", [768, 1600])
def test_machine_code(width: int) -> None:
    kernel = LayerNorm(width, 1e-5, 8, activations="bfloat16")
    tiles = default_tiles(kernel)
    function = layer_norm(kernel, tiles)
    ((name, resources),) = sass.resources(function).items()
    assert resources.spills == resources.stack == 0
    instructions = sass.sass(function)[name]
    # One load each for a number, its gamma and its beta.
    per_thread = -(-width // (4 * 32 * tiles.row_warps))
    assert sass.count(instructions, "LDG.E.128") == 3 * per_thread
    assert sass.count(instructions, "STG.E.64") == per_thread
