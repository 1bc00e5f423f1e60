"""Weights as small integers with a scale for every 32. NumPy only: running or checking a model needs no compiler.

Quantization is symmetric, ``weight = scale * q`` with q in -127..127 (int8) or -7..7 (int4). For each output, every
G = `GROUP` inputs share a scale. K/N are the input/output features of a linear layer.
"""

from __future__ import annotations

import numpy as np

from tvm_attn.storage import GROUP

_ROWS = 1024  # rows whose errors are summed at a time


def quantize(weight: np.ndarray, weights: str, scale_dtype: str = "float16") -> tuple[np.ndarray, np.ndarray]:
    """Canonical quantized form of a float32 weight (K, N): values int8 (K, N), and float16 scales (K/G, N).

    The scale is rounded first, so that the values are the best for the scale that is stored. Other dtypes than float16
    are only for comparison.
    """
    k, n = weight.shape
    largest = 127 if weights == "int8" else 7
    groups = weight.astype(np.float32).reshape(k // GROUP, GROUP, n)
    scales = (np.abs(groups).max(1) / largest).astype(scale_dtype)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    values = np.clip(np.rint(groups / divisor[:, None]), -largest, largest)
    return values.astype(np.int8).reshape(k, n), scales


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 weight (K, N) that int8 values (K, N) and float16 scales (K/G, N) represent."""
    return values.astype(np.float32) * np.repeat(scales.astype(np.float32), GROUP, axis=0)


def relative_error(stored: np.ndarray, exact: np.ndarray) -> float:
    """Normalised mean squared error, ``sum((stored - exact)**2) / sum(exact**2)``; 0 if both are zero.

    Args:
        stored, exact: float arrays of one shape; finite.
    """
    peak = float(np.abs(exact).max(initial=0))
    if peak == 0:
        return float(np.any(stored))
    error = power = 0.0
    for start in range(0, len(exact), _ROWS):
        # Scaled, and in float64: float32 cannot hold the squares of its smallest and largest numbers.
        block = exact[start : start + _ROWS].astype(np.float64) / peak
        power += float(np.square(block).sum())
        error += float(np.square(stored[start : start + _ROWS].astype(np.float64) / peak - block).sum())
    return error / power


def to_nibbles(values: np.ndarray) -> np.ndarray:
    """int8 values in -8..7, (K, N), as uint8 (K/2, N): row 2 i in the low half of a byte, 2 i + 1 in the high half."""
    unsigned = (values + 8).astype(np.uint8)
    return unsigned[0::2] | (unsigned[1::2] << 4)


def from_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `to_nibbles`."""
    values = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
    values[0::2], values[1::2] = packed & 15, packed >> 4
    return values - np.int8(8)
