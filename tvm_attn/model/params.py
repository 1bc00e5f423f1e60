"""The parameters of an artifact: those of a checkpoint, cast or quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.errors import CheckpointError
from tvm_attn.model.ahead import ahead
from tvm_attn.model.checkpoint import cast_params
from tvm_attn.quantization import dequantize, from_nibbles, quantize, relative_error, to_nibbles
from tvm_attn.storage import TABLES, is_quantizable, scales_name


def stored_params(params: Iterable[tuple[str, np.ndarray]], dtype: str, quant: str) -> Iterator[tuple[str, np.ndarray]]:
    """Converts parameters to the form that an artifact stores.

    Args:
        params: canonical names and float arrays.
        dtype: storage dtype of matrices that are not quantized; vectors are always float32.
        quant: "none", "int8" or "int4"; `tvm_attn.storage` says what is stored.

    Raises:
        CheckpointError: a value, or a scale of quantized values, is too large or too small for its dtype.
    """
    with ThreadPoolExecutor() as pool:
        for task in ahead(pool.submit(_stored, name, array, dtype, quant) for name, array in params):
            yield from task.result()


def _stored(name: str, array: np.ndarray, dtype: str, quant: str) -> list[tuple[str, np.ndarray]]:
    """One parameter as an artifact stores it: its tensor, and the scales of a quantized one."""
    if quant == "none" or not is_quantizable(name, array.shape):
        return list(cast_params([(name, array)], dtype))
    table = name in TABLES
    matrix = array.T if table else array
    with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
        values, scales = quantize(np.asarray(matrix, np.float32), quant)
    _require_fitting_scales(name, matrix, values, scales, quant)
    stored = to_nibbles(values) if quant == "int4" else values
    return [
        (name, np.ascontiguousarray(stored.T if table else stored)),
        (scales_name(name), np.ascontiguousarray(scales.T if table else scales)),
    ]


# Normalised squared error of quantizing normally distributed weights.
_USUAL_ERROR = {"int8": 2e-5, "int4": 7e-3}


def _require_fitting_scales(name: str, matrix: np.ndarray, values: np.ndarray, scales: np.ndarray, quant: str) -> None:
    """Refuses a matrix (K, N) whose scales float16 cannot hold.

    Small scales have fewer bits, and the smallest become 0. That is fine for some groups among larger ones, but not if
    it makes the error of the whole matrix more than twice that of exact scales, and more than twice that of normal
    weights.
    """
    peak = float(np.abs(matrix).max())
    holds = f"{name} holds values up to {peak:.2g}"
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{holds}, too large for {quant} with float16 scales; choose --quant none")
    small = scales < np.finfo(np.float16).smallest_normal
    if not np.abs(matrix).reshape(len(scales), -1, scales.shape[1]).max(1)[small].any():  # none, or groups of zeros
        return
    normalized = np.ldexp(matrix.astype(np.float64), -int(np.frexp(peak)[1]))
    best = relative_error(dequantize(*quantize(normalized, quant, "float32")), normalized)
    error = relative_error(dequantize(values, scales), matrix)
    if error > 2 * max(best, _USUAL_ERROR[quant]):
        raise CheckpointError(
            f"{holds}, too small for {quant} with float16 scales (normalised squared error {error:.1e}, with exact "
            f"scales {best:.1e}); choose --quant none"
        )


def effective_params(
    config: GPT2Config, read: Callable[[str], np.ndarray], quant: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `stored_params`: canonical names and values; quantized ones become float32.

    Args:
        config: the model's hyperparameters.
        read: returns a stored array by name.
        quant: the quantization with which they were stored.
    """
    for name, shape in param_shapes(config).items():
        array = read(name)
        if quant == "none" or not is_quantizable(name, shape):
            yield name, array
            continue
        scales = read(scales_name(name))
        values, scales = (array.T, scales.T) if name in TABLES else (array, scales)
        matrix = dequantize(from_nibbles(values) if quant == "int4" else values, scales)
        yield name, matrix.T if name in TABLES else matrix
