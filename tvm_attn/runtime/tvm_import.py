"""Importing TVM for running models."""

from __future__ import annotations

import os
import sys


def import_tvm() -> None:
    """Imports TVM; in runtime-only mode (TVM_USE_RUNTIME_LIB=1) without the PyTorch that tvm_ffi would load.

    tvm_ffi imports PyTorch wherever it is installed, for conversions that running a model does not need; that takes
    1 s and 150 MB.
    """
    runtime_only = os.environ.get("TVM_USE_RUNTIME_LIB") == "1"
    hide = runtime_only and not {"torch", "tvm_ffi"} & set(sys.modules)
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` fail
    try:
        import tvm  # noqa: F401
    finally:
        if hide:
            del sys.modules["torch"]
