"""ONNX files. This package imports the libraries onnx and onnxruntime (the extra `onnx`) only where they are used.

session = tvm_attn.onnx.compile("block.onnx", target="cpu")  # see `tvm_attn.onnx.session`
(y,) = session(x)
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tvm_attn.errors import OnnxError

if TYPE_CHECKING:
    from tvm_attn.onnx.session import compile

__all__ = ["compile", "require_onnx"]


def __getattr__(name: str) -> Any:
    """Imports on demand: reading and writing files needs no compiler."""
    if name == "compile":
        require_onnx()
        return import_module("tvm_attn.onnx.session").compile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def require_onnx() -> Any:
    """The library onnx.

    Raises:
        OnnxError: it is not installed.
    """
    if find_spec("onnx") is None:
        raise OnnxError("ONNX files need onnx, which is not installed: pip install onnx (the extra onnx)")
    return import_module("onnx")
