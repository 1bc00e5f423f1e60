"""The emulation itself: what it must find."""

import numpy as np
import pytest
from tvm import tirx
from tvm.script import tirx as T

from tests.cuda.emulation import EmulationError, run


def _reverse(offset: int, synchronize: bool, length: int = 64) -> tirx.PrimFunc:
    """y[i] = x[63 - i] through shared memory."""

    @T.prim_func
    def function(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        thread = T.launch_thread("threadIdx.x", 64)
        shared = T.alloc_buffer((length,), "float32", scope="shared")
        shared[thread] = x[thread + offset]
        if synchronize:
            T.cuda.cta_sync()
        y[thread] = shared[63 - thread]

    return function


def _call(function: tirx.PrimFunc) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.arange(64, dtype="float32"), np.zeros(64, "float32")
    run(function, [x, y])
    return x, y


def test_shared_memory() -> None:
    x, y = _call(_reverse(0, True))
    np.testing.assert_array_equal(y, x[::-1])


def test_out_of_bounds() -> None:
    with pytest.raises(EmulationError, match="out of bounds"):
        _call(_reverse(1, True))
    with pytest.raises(EmulationError, match="out of bounds"):
        _call(_reverse(0, True, length=63))


def test_missing_barrier() -> None:
    with pytest.raises(EmulationError, match="barrier"):
        _call(_reverse(0, False))
