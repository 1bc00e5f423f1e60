"""LayerNorm (Ba et al., 2016, arXiv:1607.06450) over the last dimension, in float32.

The variance is the mean of squared distances from the mean, which does not cancel as E[x^2] - E[x]^2 does. The
residual sum that precedes LayerNorm is the epilogue of `ResidualLinear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.base import ROUNDED, Case
from tvm_attn.storage import numpy_dtype


@dataclass(frozen=True)
class LayerNorm:
    """y = (x - mean) / sqrt(variance + epsilon) * gamma + beta.

    Parameters of the function: x (g, R, E) float32, gamma (E,) float32, beta (E,) float32, y (g, R, E) activations.

    Attributes:
        width: E.
        epsilon: added to the variance.
        rows: R, the rows of a group.
        groups: a static number of row groups, or None for a symbolic one.
        activations: dtype of y.
    """

    family: ClassVar[str] = "layer_norm"

    width: int
    epsilon: float
    rows: int
    groups: int | None = None
    activations: str = "float32"

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for kernel, groups, name, offset, scale in (
            (LayerNorm(768, 1e-5, 8), 3, "124M", 0.0, 1.0),
            (LayerNorm(768, 1e-5, 1, 1), 1, "one row", 0.0, 1.0),
            (LayerNorm(768, 1e-5, 8, 1), 1, "one group", 0.0, 1.0),
            (LayerNorm(1600, 1e-5, 8), 2, "1.5B", 0.0, 1.0),
            (LayerNorm(37, 1e-6, 8), 2, "odd width", 0.0, 1.0),
            (LayerNorm(64, 1e-5, 8), 1, "large values", 0.0, 1e4),
            (LayerNorm(64, 1e-5, 8), 1, "mean far from zero", 100.0, 1.0),
            (LayerNorm(64, 1e-5, 8), 1, "constant rows", 3.0, 0.0),
            (LayerNorm(768, 1e-5, 8, activations="float16"), 3, "124M", 0.0, 1.0),
            (LayerNorm(768, 1e-5, 1, 1, "bfloat16"), 1, "one row", 0.0, 1.0),
            (LayerNorm(1600, 1e-5, 8, activations="bfloat16"), 2, "1.5B", 0.0, 1.0),
            (LayerNorm(37, 1e-6, 8, activations="float16"), 2, "odd width", 0.0, 1.0),
            (LayerNorm(64, 1e-5, 8, activations="bfloat16"), 1, "large values", 0.0, 1e4),
            (LayerNorm(64, 1e-5, 8, activations="float16"), 1, "mean far from zero", 100.0, 1.0),
            (LayerNorm(64, 1e-5, 8, activations="float16"), 1, "constant rows", 3.0, 0.0),
        ):
            yield _case(kernel, groups, name, offset, scale)


def normalize(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    """LayerNorm in float64: x (..., E) -> (..., E)."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon) * gamma + beta


def _case(kernel: LayerNorm, groups: int, name: str, offset: float = 0.0, scale: float = 1.0) -> Case:
    rng = np.random.default_rng(0)
    shape = (groups, kernel.rows, kernel.width)
    x = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(offset)
    gamma, beta = rng.standard_normal((2, kernel.width), dtype=np.float32)
    expected = normalize(x, gamma, beta, kernel.epsilon)
    # The mean itself is rounded to float32, which moves every element by up to offset * 2**-24.
    nmse = max(1e-12, ROUNDED[kernel.activations], (offset * 2.0**-24) ** 2)
    y = np.zeros(shape, numpy_dtype(kernel.activations))
    return Case(kernel, name, (x, gamma, beta), (y,), (expected,), nmse=nmse)


def random_case(kernel: LayerNorm, groups: int) -> Case:
    """A case of `groups` row groups, of the sizes that a search measures."""
    return _case(kernel, groups, f"{groups * kernel.rows} rows")
