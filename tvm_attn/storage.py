"""What an artifact stores for every parameter: names, shapes and dtypes of the canonical tensors.

Vectors are always float32. Matrices have the artifact's dtype, or are quantized: symmetric, with a float16 scale for
every `GROUP` inputs of an output. The position table is never quantized.

| quantization | a linear layer (K, N) | the token table and an untied head (V, E) |
|---|---|---|
| none | (K, N) dtype | (V, E) dtype |
| int8 | (K, N) int8, scales (K/G, N) | (V, E) int8, scales (V, E/G) |
| int4 | (K/2, N) uint8, scales (K/G, N) | (V, E/2) uint8, scales (V, E/G) |

float16 scales limit the values that can be quantized; see `tvm_attn.model.params`.

A byte of int4 holds inputs 2 i (low half) and 2 i + 1, each plus 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "int8", "int4")
KV_DTYPES = ("int8",)
"""Dtypes of the KV cache besides the storage dtype."""
CACHE_WORD = 4
"""Values of the int8 KV cache in a word, each D / 4 dimensions from the next."""
GROUP = 32
"""G, the number of inputs that share a scale."""
TABLES = ("wte.weight", "lm_head.weight")
"""Matrices that are stored with one row per output."""


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of `name`; bfloat16 comes from ml_dtypes.

    Raises:
        TypeError: `name` is not a dtype.
    """
    import numpy as np

    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def cache_row(dtype: str, head_dim: int) -> tuple[int, str]:
    """Elements and dtype of a row of the KV cache: a head's key or value at one position.

    Rows of an int8 cache are int32 words, see `tvm_attn.kernels.cache_write`.
    """
    return (head_dim // CACHE_WORD + 1, "int32") if dtype == "int8" else (head_dim, dtype)


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the matrix of a linear layer, the token table or the head."""
    return len(shape) == 2 and name != "wpe.weight"


def scales_name(name: str) -> str:
    """The name of a quantized parameter's scales."""
    return f"{name}_scales"


def stored_types(config: GPT2Config, dtype: str, quant: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every stored tensor, by name, in canonical order.

    Raises:
        ConfigError: an input width is not a multiple of `GROUP`, so the matrix cannot be quantized.
    """
    types: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in param_shapes(config).items():
        if quant == "none" or not is_quantizable(name, shape):
            types[name] = (shape, "float32" if len(shape) == 1 else dtype)
            continue
        axis = 1 if name in TABLES else 0
        if shape[axis] % GROUP:
            raise ConfigError(f"{quant} needs input widths in multiples of {GROUP}; {name} has {shape[axis]}")
        types[name] = (_divided(shape, axis, 2), "uint8") if quant == "int4" else (shape, "int8")
        types[scales_name(name)] = (_divided(shape, axis, GROUP), "float16")
    return types


def _divided(shape: tuple[int, ...], axis: int, divisor: int) -> tuple[int, ...]:
    return tuple(size // divisor if i == axis else size for i, size in enumerate(shape))
