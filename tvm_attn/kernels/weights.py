"""The layout of weights in memory: canonical in an artifact, packed for the inner loop on a device.

Every packed format is cut into strips of C columns, so that the inner loop reads C neighbours with unit stride.

| format | canonical (K, N) | packed | contents of a word |
|---|---|---|---|
| float32, float16, bfloat16 | the dtype | (N/C, K, C) of the dtype | - |
| bfloat16_pairs | bfloat16 | (N/C, K/2, C) int32 | rows p and p + K/2: one step of a bfloat16 dot product |
| int8 | int8, scales float16 (K/G, N) | (N/C, K/4, C) int32, scales (N/C, K/G, C) | 4 rows of a group, unsigned bytes |
| int4 | uint8 (K/2, N), scales as above | (N/C, K/8, C) int32, scales as above | 8 rows of a group, as nibbles |

G = 32 rows share a scale; quantization is symmetric, ``weight = scale * q`` with q in -127..127 or -7..7. Bytes hold
q + 128 and nibbles q + 8, because the dot product instructions multiply unsigned by signed bytes. Byte j of word p of a
group is row ``8 j + p``; the low nibble of a byte belongs to word p, the high one to word p + 4.
Embedding tables are stored (N, K), "transposed", with their scales (N, K/G).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.base import Case
from tvm_attn.quantization import quantize, to_nibbles
from tvm_attn.storage import GROUP, numpy_dtype

PLAIN = ("float32", "float16", "bfloat16")
OFFSETS = {"int8": 128, "int4": 8}
"""Added to a quantized weight to make it unsigned."""
_ROWS_PER_WORD = {"bfloat16_pairs": 2, "int8": 4, "int4": 8}


def packed_types(weights: str, k: int, n: int, columns: int) -> list[tuple[tuple[int, int, int], str]]:
    """Shape and dtype of each tensor of a packed (K, N) weight."""
    strips = -(-n // columns)
    if weights in PLAIN:
        return [((strips, k, columns), weights)]
    words = ((strips, k // _ROWS_PER_WORD[weights], columns), "int32")
    return [words] if weights == "bfloat16_pairs" else [words, ((strips, k // GROUP, columns), "float16")]


# ---- references ----


def pack(weight: np.ndarray, columns: int) -> np.ndarray:
    """The reference of `PackPlain`: (K, N) -> (ceil(N/C), K, C), zeros past N."""
    k, n = weight.shape
    strips = -(-n // columns)
    padded = np.zeros((k, strips * columns), weight.dtype)
    padded[:, :n] = weight
    return np.ascontiguousarray(padded.reshape(k, strips, columns).transpose(1, 0, 2))


def pack_words(weight: np.ndarray, weights: str, columns: int) -> np.ndarray:
    """The reference of `PackWords`: bfloat16 (K, N), or int8 values (K, N), as packed int32 words."""
    strips = pack(weight, columns)
    count, k, _ = strips.shape
    if weights == "bfloat16_pairs":
        bits = strips.view(np.uint16).astype(np.uint32)
        return (bits[:, : k // 2] | (bits[:, k // 2 :] << 16)).view(np.int32)
    unsigned = (strips.astype(np.int32) + OFFSETS[weights]).astype(np.uint32)
    places = unsigned.reshape(count, k // GROUP, 4, 8, columns)  # group, byte, word
    words = places[:, :, 0] | places[:, :, 1] << 8 | places[:, :, 2] << 16 | places[:, :, 3] << 24
    if weights == "int4":
        words = words[:, :, :4] | (words[:, :, 4:] << 4)
    return np.ascontiguousarray(words).reshape(count, -1, columns).view(np.int32)


# ---- kernels; they run once, when an artifact is loaded ----


@dataclass(frozen=True)
class PackPlain:
    """(K, N) -> (ceil(N/C), K, C), zeros past N.

    Parameters of the function: weight (K, N) dtype, or (N, K) if `transposed`, packed (ceil(N/C), K, C) dtype.
    """

    family: ClassVar[str] = "pack_plain"

    in_features: int
    out_features: int
    columns: int
    dtype: str
    transposed: bool = False

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for dtype in PLAIN:
            for transposed, n in ((False, 96), (True, 96), (True, 1021)):
                kernel = PackPlain(48, n, 32, dtype, transposed)
                weight = rng.standard_normal((48, n), dtype=np.float32).astype(numpy_dtype(dtype))
                packed = pack(weight, 32)
                given = np.ascontiguousarray(weight.T) if transposed else weight
                name = f"{n} columns" + (", transposed" if transposed else "")
                yield Case(kernel, name, (given,), (packed * 0,), (packed.astype(np.float64),), nmse=0.0)


@dataclass(frozen=True)
class PackWords:
    """Packs canonical bfloat16, int8 or int4 weights into int32 words; zeros past N.

    Parameters of the function: weight (K, N) bfloat16, (K, N) int8 or (K/2, N) uint8, or its transpose if
    `transposed`; packed, with the shape and dtype that `packed_types` gives.
    """

    family: ClassVar[str] = "pack_words"

    in_features: int
    out_features: int
    columns: int
    weights: str
    transposed: bool = False

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for weights in ("bfloat16_pairs", "int8", "int4"):
            for transposed, n in ((False, 96), (True, 1021)):
                kernel = PackWords(64, n, 32, weights, transposed)
                weight = rng.standard_normal((64, n), dtype=np.float32)
                if weights == "bfloat16_pairs":
                    canonical = stored = weight.astype(numpy_dtype("bfloat16"))
                else:
                    canonical, _ = quantize(weight, weights)
                    stored = to_nibbles(canonical) if weights == "int4" else canonical
                packed = pack_words(canonical, weights, 32)
                given = np.ascontiguousarray(stored.T) if transposed else stored
                name = f"{weights}, {n} columns" + (", transposed" if transposed else "")
                yield Case(kernel, name, (given,), (packed * 0,), (packed.astype(np.float64),), nmse=0.0)


def random_case(kernel: PackPlain | PackWords) -> Case:
    """A case with a random weight, of the sizes that a search measures."""
    weight = np.random.default_rng(0).standard_normal((kernel.in_features, kernel.out_features), dtype=np.float32)
    if isinstance(kernel, PackPlain):
        stored = weight.astype(numpy_dtype(kernel.dtype))
        packed = pack(stored, kernel.columns)
    elif kernel.weights == "bfloat16_pairs":
        stored = weight.astype(numpy_dtype("bfloat16"))
        packed = pack_words(stored, kernel.weights, kernel.columns)
    else:
        values, _ = quantize(weight, kernel.weights)
        stored = to_nibbles(values) if kernel.weights == "int4" else values
        packed = pack_words(values, kernel.weights, kernel.columns)
    given = np.ascontiguousarray(stored.T) if kernel.transposed else stored
    return Case(kernel, "whole weight", (given,), (packed * 0,), (packed.astype(np.float64),), nmse=0.0)
