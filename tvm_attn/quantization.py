"""Weights as small integers with a scale for every 32, in NumPy alone: running or checking a model needs no compiler.

Quantization is symmetric, ``weight = scale * q`` with q in -127..127 (int8) or -7..7 (int4); G = `GROUP` inputs of an
output share a scale. K/N are the input/output features of a linear layer.
"""

from __future__ import annotations

import numpy as np

from tvm_attn.storage import GROUP


def quantize(weight: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """Canonical quantized form of a float32 weight (K, N): values int8 (K, N), and float16 scales (K/G, N).

    The scale is rounded to float16 first, so that the values are the best for the scale that is stored.
    """
    k, n = weight.shape
    largest = 127 if weights == "int8" else 7
    groups = weight.astype(np.float32).reshape(k // GROUP, GROUP, n)
    scales = (np.abs(groups).max(1) / largest).astype(np.float16)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    values = np.clip(np.rint(groups / divisor[:, None]), -largest, largest)
    return values.astype(np.int8).reshape(k, n), scales


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 (K, N) of int8 values (K, N) and float16 scales (K/G, N)."""
    return values.astype(np.float32) * np.repeat(scales.astype(np.float32), GROUP, axis=0)


def to_nibbles(values: np.ndarray) -> np.ndarray:
    """int8 values in -8..7, (K, N), as uint8 (K/2, N): row 2 i in the low half of a byte, row 2 i + 1 above."""
    unsigned = (values + 8).astype(np.uint8)
    return unsigned[0::2] | (unsigned[1::2] << 4)


def from_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `to_nibbles`."""
    values = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
    values[0::2], values[1::2] = packed & 15, packed >> 4
    return values - np.int8(8)
