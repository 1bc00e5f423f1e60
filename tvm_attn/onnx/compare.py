"""Compares the weights that were recovered from an ONNX file with the file itself, in ONNX Runtime."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from tvm_attn.errors import OnnxError, VerificationError
from tvm_attn.jsonfile import shorten_path
from tvm_attn.model.reference import Reference
from tvm_attn.onnx.checkpoint import OnnxCheckpoint
from tvm_attn.quantization import relative_error

FLOAT32_ERROR = 1e-9
"""Normalised mean squared error of logits that both sides compute in float32."""
FLOAT16_ERROR = 1e-3
"""The same if the file computes in 16 bits: its sums are rounded to 11 bits in each of some hundred steps."""
ROUNDED_ERROR = 5e-2
"""The same if the file rounds activations to 8 bits, one scale for a whole tensor."""


def compare_with_file(checkpoint: OnnxCheckpoint) -> str:
    """Computes logits of random tokens with PyTorch from the recovered weights, and with ONNX Runtime from the file.

    Returns:
        What was found, one line.

    Raises:
        OnnxError: ONNX Runtime refuses the file, or gets logits from it that are not finite.
        VerificationError: the logits differ.
    """
    name = shorten_path(checkpoint.source)
    for library in ("onnxruntime", "torch"):
        if find_spec(library) is None:
            return f"not compared with {name} itself: {library} is not installed"
    original = checkpoint.original()
    if original is None:
        return f"not compared with {name} itself: it cannot be run without past keys and values, or has no logits"
    ids, expected = original
    params = dict(checkpoint.params())
    actual = Reference(checkpoint.config, params).logits(ids)
    if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        raise OnnxError(f"{name} computes numbers beyond float32: its weights are damaged; get it anew")
    if actual.shape != expected.shape:  # logits of the last token alone
        actual = actual[:, -expected.shape[1] :]
    half = any(array.dtype.itemsize < 4 for array in params.values())
    bound = ROUNDED_ERROR if checkpoint.rounds else FLOAT16_ERROR if half else FLOAT32_ERROR
    error = relative_error(actual, expected.astype(np.float64))
    if not error < bound:
        raise VerificationError(
            f"the logits of {name} in ONNX Runtime differ from those of the weights that were recovered from it (NMSE "
            f"{error:.1e}, bound {bound:.0e}): it is no GPT-2, or this is a bug in tvm_attn, please report it"
        )
    return f"ONNX Runtime computes the same logits from {name} (NMSE {error:.1e})"
