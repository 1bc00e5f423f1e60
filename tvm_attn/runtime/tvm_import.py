"""Importing TVM for running models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tvm_attn.errors import CompileError


def import_tvm() -> None:
    """Imports TVM; in runtime-only mode (TVM_USE_RUNTIME_LIB=1) without PyTorch, which tvm_ffi would load.

    tvm_ffi imports PyTorch if it is installed, for conversions that running a model does not need; that takes 1 s and
    150 MB.
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


def has_compiler() -> bool:
    """Whether TVM has its compiler, which a bundle lacks: as it was imported, or will be by the environment."""
    base = sys.modules.get("tvm.base")
    return os.environ.get("TVM_USE_RUNTIME_LIB") != "1" if base is None else not base._RUNTIME_ONLY


def require_compiler() -> None:
    """Raises CompileError if only TVM's runtime is loaded."""
    if not has_compiler():
        reason = "TVM_USE_RUNTIME_LIB=1 is set" if os.environ.get("TVM_USE_RUNTIME_LIB") else "reinstall apache-tvm"
        raise CompileError(f"this needs TVM's compiler, and only its runtime is loaded ({reason})")


@contextmanager
def runtime_only() -> Iterator[None]:
    """A context in which TVM is imported in runtime-only mode, unless the environment says otherwise.

    The variable is removed afterwards: processes started later may want the compiler.
    """
    name = "TVM_USE_RUNTIME_LIB"
    was_set = name in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if not was_set:
            del os.environ[name]
