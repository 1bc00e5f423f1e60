"""Linking libraries for processors with threads of their own, `thread_pool.cc`, in the place of TVM's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tvm import libinfo
from tvm_ffi import libinfo as ffi_libinfo

from tvm_attn.compiler.linker import linking

SOURCE = Path(__file__).with_name("thread_pool.cc")
"""The pool."""


def include_options() -> list[str]:
    """The compiler's options for TVM's headers."""
    folders = (libinfo.find_include_path(), ffi_libinfo.find_include_path(), ffi_libinfo.find_dlpack_include_path())
    return [f"-I{folder}" for folder in folders]


def export_with_threads(module: Any, library: Path, architecture: str) -> None:
    """As `module.export_library`; the library gets a function `set_threads(number)` for calls from the same thread.

    It is never unloaded, because the pool's threads sleep in it.

    Raises:
        CompileError: there is no C++ compiler for the architecture.
    """
    pool = f"tvm_attn_pool_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    options = ["-std=c++17", "-O2", "-pthread", "-fvisibility=hidden", f"-DTVM_ATTN_POOL={pool}", "-Wl,-z,nodelete"]
    options += include_options()
    module.export_library(str(library), fcompile=linking(architecture), addons=[str(SOURCE)], options=options)
