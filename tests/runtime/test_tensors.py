"""Arrays on a device, and the error of a result."""

import math

import numpy as np
import pytest
import tvm

from tvm_attn.runtime.tensors import normalised_error, to_device
from tvm_attn.storage import numpy_dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int32", "uint8"])
def test_a_tensor_holds_the_array(dtype: str) -> None:
    array = np.arange(-6, 6).reshape(3, 4).astype(numpy_dtype(dtype))
    tensor = to_device(array, tvm.cpu())
    assert (tuple(tensor.shape), str(tensor.dtype)) == ((3, 4), dtype)
    np.testing.assert_array_equal(tensor.numpy().astype(np.float64), array.astype(np.float64))


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 0.2),
        ([0.5], [0.0], 0.25),
        ([1.0, -math.inf], [1.0, -math.inf], 0.0),
        ([2.0, -math.inf], [1.0, -math.inf], 1.0),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([1.0, 0.0], [1.0, -math.inf], math.inf),
        ([1.0, math.nan], [1.0, -math.inf], math.inf),
        ([math.inf, 1.0], [1.0, 1.0], math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.nan),
    ],
)
def test_error(actual: list[float], expected: list[float], error: float) -> None:
    found = normalised_error(np.array(actual, np.float32), np.array(expected))
    assert found == pytest.approx(error, nan_ok=True)
