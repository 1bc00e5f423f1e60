"""ONNX files. This package imports the libraries onnx and onnxruntime (the extra `onnx`) only where they are used."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tvm_attn.errors import OnnxError


def require_onnx() -> Any:
    """The library onnx.

    Raises:
        OnnxError: it is not installed.
    """
    if find_spec("onnx") is None:
        raise OnnxError("ONNX files need onnx, which is not installed: pip install onnx (the extra onnx)")
    return import_module("onnx")
