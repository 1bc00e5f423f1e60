"""Writes the intermediate results of a build to readable files: `TVM_ATTN_DUMP=FOLDER tvm-attn build ...`.

After each named phase the module is written in TVMScript to `FOLDER/LIBRARY/NN-PHASE.py`, and at the end the generated
code: LLVM IR for the processor, and CUDA C or a SPIR-V listing for the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tvm

from tvm_attn.errors import CompileError

VARIABLE = "TVM_ATTN_DUMP"
_SUFFIXES = {"llvm": ".ll", "cuda": ".cu", "vulkan": ".spvasm"}
_FORMATS = {"llvm": "ll", "cuda": "cuda", "vulkan": ""}


class Dump:
    """The files of one library's build; does nothing if the variable is not set.

    Args:
        library: the library's name, which names the folder.

    Raises:
        CompileError: from all methods, if the folder cannot be written.
    """

    def __init__(self, library: str) -> None:
        folder = os.environ.get(VARIABLE)
        self._folder = Path(folder) / library if folder else None
        self._count = 0

    def module(self, phase: str, module: tvm.IRModule) -> None:
        """Writes a module after a phase."""
        if self._folder is not None:
            self._write(f"{phase}.py", module.script(show_meta=False))

    def after(self, phase: str, *passes: tvm.transform.Pass) -> tvm.transform.Pass:
        """The passes as one pass that writes the module afterwards."""

        @tvm.transform.module_pass(opt_level=0, name=f"Dump.{phase}")
        def write(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
            self.module(phase, module)
            return module

        return tvm.transform.Sequential([*passes, write])

    def code(self, module: Any) -> None:
        """Writes the generated code of a built module (a tvm_ffi.Module) and its imports."""
        if self._folder is None:
            return
        for entry in _all(module):
            if entry.kind in _SUFFIXES:
                self._write(f"code{_SUFFIXES[entry.kind]}", entry.inspect_source(_FORMATS[entry.kind]))

    def _write(self, name: str, text: str) -> None:
        assert self._folder is not None
        self._count += 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{self._count:02}-{name}").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CompileError(f"{VARIABLE}: cannot write {self._folder}: {error.strerror}") from error


def _all(module: Any) -> Iterator[Any]:
    yield module
    for entry in module.imports:
        yield from _all(entry)
