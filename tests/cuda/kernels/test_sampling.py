"""The greedy step in place: in the emulation against NumPy, and what a compiler makes of it."""

import functools

import numpy as np
import pytest

from tests.cuda import emulation, sass
from tvm_attn.kernels.base import Case
from tvm_attn.kernels.cuda.sampling import Advance, AdvanceTiles, advance, default_tiles

CASES = list(Advance.cases())
build = functools.cache(advance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_advance(case: Case) -> None:
    # 1024 threads take the emulation long, and compute the same.
    tiles = AdvanceTiles(min(default_tiles(case.kernel).threads, 256))
    arguments = [array.copy() for array in case.inputs]
    emulation.run(build(case.kernel, tiles), arguments)
    for index, expected in zip(case.in_place, case.expected, strict=True):
        np.testing.assert_array_equal(arguments[index], expected)


def test_machine_code() -> None:
    kernel = Advance(50257, 50257, 1, 1)
    function = advance(kernel, default_tiles(kernel))
    ((name, resources),) = sass.resources(function).items()
    assert resources.spills == resources.stack == 0
    # A block of 1024 threads.
    assert resources.registers <= 64
    instructions = sass.sass(function)[name]
    # No load waits for another: all columns of a step are on their way together.
    assert sass.count(instructions, "LDG.E") >= default_tiles(kernel).unroll
