"""The greedy step in place: the compiled machine code."""

from dataclasses import replace

from tests.cuda import sass
from tests.kernels.devices import assert_close, emulate
from tvm_attn.compiler.workspaces import with_parameters
from tvm_attn.kernels import Advance
from tvm_attn.kernels.cuda.sampling import AdvanceTiles, advance, default_tiles


def test_blocks_share_a_row() -> None:
    """With the numbers of every case; a static number of groups."""
    for case in Advance.cases():
        kernel = case.kernel
        assert isinstance(kernel, Advance)
        if kernel.vocabulary > 2000:
            continue
        split = replace(kernel, groups=case.inputs[0].shape[0])
        assert_close(case, emulate(advance(split, AdvanceTiles(64, 2, 5)), replace(case, kernel=split)))


def test_machine_code() -> None:
    kernel = Advance(50257, 50257, 1, 1)
    tiles = default_tiles(kernel)
    assert tiles.blocks * tiles.threads * tiles.unroll >= 50257  # every column is asked for at once
    function = with_parameters("advance", advance(kernel, tiles))
    ((name, resources),) = sass.resources(function).items()
    assert resources.spills == resources.stack == 0
    assert resources.registers <= 64
    instructions = sass.sass(function)[name]
    # No load waits for another: the loads of all columns of a step are in flight together.
    assert sass.count(instructions, "LDG.E") >= default_tiles(kernel).unroll
