"""Compiles one kernel into a library of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from tvm_attn.compiler.devices import backend_for
from tvm_attn.errors import CompileError, TvmAttnError, one_line
from tvm_attn.targets import Target


def compile_kernel(function: tirx.PrimFunc, target: Target, library: Path) -> None:
    """Writes a shared library with a scheduled function "main"; for processors also "set_threads".

    Raises:
        CompileError: TVM or a compiler failed, or a compiler is missing.
    """
    backend = backend_for(target)
    backend.check(target)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})

    def build() -> Any:
        return tirx.build(module, target=backend.tvm_target(target), pipeline=backend.tir_pipeline(target))

    try:
        backend.link(build, target, library)
    except TvmAttnError:
        raise
    except Exception as error:  # TVM raises whatever its C++ code maps to
        raise CompileError(f"it does not compile for {target.name}: {one_line(error)}") from error
