"""The parameters of an artifact: a checkpoint's, cast or quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.errors import CheckpointError
from tvm_attn.model.checkpoint import cast_params
from tvm_attn.quantization import dequantize, from_nibbles, quantize, to_nibbles
from tvm_attn.storage import TABLES, is_quantizable, scales_name


def stored_params(params: Iterable[tuple[str, np.ndarray]], dtype: str, quant: str) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters as an artifact stores them.

    Args:
        params: canonical names and float arrays.
        dtype: storage dtype of matrices that are not quantized; vectors are float32 always.
        quant: "none", "int8" or "int4"; `tvm_attn.storage` says what is stored.

    Raises:
        CheckpointError: a value, or the scale of quantized ones, does not fit its dtype.
    """
    if quant == "none":
        yield from cast_params(params, dtype)
        return
    for name, array in params:
        if not is_quantizable(name, array.shape):
            yield from cast_params([(name, array)], dtype)
            continue
        table = name in TABLES
        matrix = array.T if table else array
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
            values, scales = quantize(np.asarray(matrix, np.float32), quant)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{name} holds values too large for {quant} with float16 scales; choose --quant none")
        stored = to_nibbles(values) if quant == "int4" else values
        yield name, np.ascontiguousarray(stored.T if table else stored)
        yield scales_name(name), np.ascontiguousarray(scales.T if table else scales)


def effective_params(
    config: GPT2Config, read: Callable[[str], np.ndarray], quant: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse: canonical names and what the stored parameters stand for; quantized ones become float32.

    Args:
        config: the model.
        read: gives a stored array by name.
        quant: how they were stored.
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
