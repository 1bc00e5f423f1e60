"""NumPy's names of the storage dtypes."""

from __future__ import annotations

import numpy as np


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of `name`; bfloat16 comes from ml_dtypes.

    Raises:
        TypeError: `name` is not a dtype.
    """
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
