"""The greedy step in place: the compiled machine code."""

from tests.cuda import sass
from tvm_attn.kernels import Advance
from tvm_attn.kernels.cuda.sampling import advance, default_tiles


def test_machine_code() -> None:
    kernel = Advance(50257, 50257, 1, 1)
    function = advance(kernel, default_tiles(kernel))
    ((name, resources),) = sass.resources(function).items()
    assert resources.spills == resources.stack == 0
    # A block of 1024 threads.
    assert resources.registers <= 64
    instructions = sass.sass(function)[name]
    # No load waits for another: the loads of all columns of a step are in flight together.
    assert sass.count(instructions, "LDG.E") >= default_tiles(kernel).unroll
