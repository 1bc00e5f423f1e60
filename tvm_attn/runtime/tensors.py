"""Arrays on a device, and how far a result is from what it should be. Needs NumPy and TVM's runtime."""

from __future__ import annotations

from typing import Any

import numpy as np


def to_device(array: np.ndarray, device: Any) -> Any:
    """A TVM tensor on a device with the content of a C-contiguous array."""
    import tvm

    tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
    fill(tensor, array)
    return tensor


def fill(tensor: Any, array: np.ndarray) -> None:
    """Copies a C-contiguous array into a TVM tensor of its shape and dtype."""
    if array.dtype.kind in "fiu":
        tensor.copyfrom(array)
    else:  # TVM's own copy of bfloat16 needs two more buffers
        tensor._create_view(array.shape, "uint16").copyfrom(array.view(np.uint16))


def normalised_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """``sum((x - y)**2) / sum(y**2)`` in float64 over the values that are finite in y; only the numerator if y is zero.

    Infinite if a value is not infinite in the same direction where y is, and NaN if one is NaN where y is not infinite.
    """
    wanted, given = expected.astype(np.float64), actual.astype(np.float64)
    infinite = np.isinf(wanted)
    if not np.array_equal(given[infinite], wanted[infinite]):
        return float("inf")
    wanted, given = wanted[~infinite], given[~infinite]
    error, power = float(((given - wanted) ** 2).sum()), float((wanted**2).sum())
    return error / power if power else error
