"""GPT-2 compiled with Apache TVM.

    import tvm_attn
    model = tvm_attn.load("dist/gpt2")
    print(model.generate("Hello", max_new_tokens=40).text)

`tvm_attn.build(...)` and `tvm_attn.tune(...)` do what the commands of the same names do; `tvm_attn.attention(q, k, v)`
is attention as a function of tensors. Importing this package imports neither TVM nor PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tvm_attn.errors import TvmAttnError

if TYPE_CHECKING:
    from tvm_attn.attention_function import attention, attention_weights
    from tvm_attn.compiler.build import build
    from tvm_attn.runtime.model import load
    from tvm_attn.tuning.tune import tune

    __version__: str

__all__ = ["TvmAttnError", "__version__", "attention", "attention_weights", "build", "load", "tune"]


def __getattr__(name: str) -> Any:
    """Imports on demand: loading an artifact must not import the compiler, and importing this package must not import
    TVM. Finding the version takes as long as the rest of a short command."""
    if name == "__version__":
        return _version()
    if name == "load":
        return import_module("tvm_attn.runtime.model").load
    if name in ("attention", "attention_weights"):
        # The kernels are written in TVMScript, which TVM's runtime lacks.
        import_module("tvm_attn.runtime.tvm_import").require_compiler()
        return getattr(import_module("tvm_attn.attention_function"), name)
    if name in ("build", "tune"):
        # The commands' modules have the same names, which is why they are callable.
        return import_module(f"tvm_attn.{name}")
    if name == "onnx":
        return import_module("tvm_attn.onnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tvm-attn")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0"
