"""GPT-2 compiled with Apache TVM.

    import tvm_attn
    model = tvm_attn.load("dist/gpt2")
    print(model.generate("Hello", max_new_tokens=40).text)

`tvm_attn.build(...)` does what `python -m tvm_attn.build` does. Importing this package imports neither TVM nor PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from tvm_attn.errors import TvmAttnError

if TYPE_CHECKING:
    from tvm_attn.compiler.build import build
    from tvm_attn.runtime.model import load

try:
    __version__ = version("tvm-attn")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0"

__all__ = ["TvmAttnError", "__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: loading an artifact must not import the compiler, nor this package TVM."""
    if name == "load":
        return import_module("tvm_attn.runtime.model").load
    if name == "build":
        # Also the name of the command's module, which is callable for that reason.
        return import_module("tvm_attn.build")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
