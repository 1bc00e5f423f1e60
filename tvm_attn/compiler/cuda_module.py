"""TVM's CUDA code generation on a machine without a GPU: lowers kernels, and puts their fatbin into the library.

Without a CUDA runtime, TVM makes a module that carries CUDA C (`src/backend/cuda/codegen/cuda_fallback_module.cc`), and
the machine that loads the library would have to compile it. Here every build uses that module, even if there is a
driver, so that all builds are alike and touch no driver. When the library is written, the fatbin replaces the source.
TVM's CUDA runtime then loads what TVM would have written itself if it had found nvcc.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx import compilation_pipeline

from tvm_attn.compiler.linker import linking
from tvm_attn.errors import CompileError

PIPELINE = "tvm_attn.cuda"
_FALLBACK = "TVM_COMPILE_FORCE_FALLBACK"


def register_pipeline() -> None:
    """Makes the passes known to TVM: `tvm.compile(..., tir_pipeline=PIPELINE)`."""
    tvm_ffi.register_error("CompileError", CompileError)  # passes raise it through TVM's C++
    compilation_pipeline.register_tir_pipeline(PIPELINE, _pipeline)


def _pipeline() -> tuple[Any, Any, Any]:
    """Lowers a module's TIRx functions, which carry `tirx.is_scheduled`, and its S-TIR functions, each by its passes.

    The passes that finalize host and device functions are the same for both.
    """

    @tvm.transform.module_pass(opt_level=0, name=PIPELINE)
    def lower(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        parts: dict[str, dict[Any, Any]] = {"tirx": {}, "s_tir": {}}
        for variable, function in mod.functions.items():
            parts["tirx" if _is_tirx(function) else "s_tir"][variable] = function
        merged: dict[Any, Any] = {}
        for name, functions in parts.items():
            if not functions:
                continue
            lowered = tirx.get_tir_pipeline(name)[0](tvm.IRModule(functions, attrs=mod.attrs))
            clash = {variable.name_hint for variable in merged} & {v.name_hint for v in lowered.functions}
            if clash:
                raise CompileError(f"two kernels lower to functions of one name: {', '.join(sorted(clash))}")
            merged.update(lowered.functions.items())
        return tvm.IRModule(merged, attrs=mod.attrs)

    return lower, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


def _is_tirx(function: Any) -> bool:
    return bool(function.attrs and function.attrs.get("tirx.is_scheduled", False))


@contextmanager
def without_runtime() -> Iterator[None]:
    """In this context, TVM's CUDA code generation gives modules that carry the source, whatever this machine has."""
    before = os.environ.get(_FALLBACK)
    os.environ[_FALLBACK] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FALLBACK]
        else:
            os.environ[_FALLBACK] = before


def cuda_source(functions: tirx.PrimFunc | tvm.IRModule, target: tvm.target.Target) -> str:
    """The CUDA C that the compiler generates for scheduled functions, TIRx or S-TIR.

    Args:
        functions: one function or a module; every function has a `global_symbol`.
        target: a TVM target of kind cuda with its host.
    """
    register_pipeline()
    module = tvm.IRModule.from_expr(functions) if isinstance(functions, tirx.PrimFunc) else functions
    with without_runtime():
        built = tirx.build(module, target=target, pipeline=PIPELINE)
    return device_source(built)


def device_source(module: Any) -> str:
    """The CUDA C of the CUDA module that a built module (a tvm_ffi.Module) imports.

    Raises:
        CompileError: it imports no CUDA module, or several.
    """
    found = {source for entry in _imported(module) if entry.kind == "cuda" for source in [entry.inspect_source("cuda")]}
    if len(found) != 1:
        raise CompileError(f"the program has {len(found)} modules of CUDA code, not one")
    return found.pop()


def _imported(module: Any) -> Iterator[Any]:
    for entry in module.imports:
        yield entry
        yield from _imported(entry)


def export_library(module: Any, path: Path, fatbin: bytes) -> None:
    """Writes a built module as a shared library whose CUDA module holds the fatbin instead of the source.

    Args:
        module: the result of `relax.build` within `without_runtime()`: an executable, or its module.
        path: the path of the library.
        fatbin: the compiled `device_source(module)`.
    """
    source = device_source(getattr(module, "mod", module)).encode()

    def pack(entry: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(entry).numpy().tobytes()
        blob = Path(folder, "imports.bin")
        blob.write_bytes(_replace_code(packed, source, fatbin))
        assembly = Path(folder, "imports.S")
        assembly.write_text(_ASSEMBLY.format(symbol=f"{prefix}__tvm_ffi__library_bin", blob=blob), encoding="utf-8")
        return str(assembly)

    module.export_library(str(path), fcompile=linking(platform.machine()), fpack_imports=pack)


_ASSEMBLY = """\
    .section .rodata
    .globl {symbol}
    .balign 16
{symbol}:
    .incbin "{blob}"
    .section .note.GNU-stack,"",%progbits
"""


def _replace_code(packed: bytes, source: bytes, fatbin: bytes) -> bytes:
    """Replaces format and code of every CUDA module in TVM's serialized imports.

    The format (`src/target/codegen.cc`): length; the import tree, two vectors of u64; for each module its kind and,
    unless that is "_lib", its bytes. A CUDA module's bytes are format, table of functions, code. Strings and vectors
    start with their length as u64, little-endian.
    """
    reader = _Reader(packed)
    if reader.number() != len(packed) - 8:
        raise CompileError("TVM's packed imports differ from their stated length: this version packs them differently")
    rows = [reader.number() for _ in range(reader.number())]
    for _ in range(reader.number()):
        reader.number()
    body = packed[8 : reader.position]
    for _ in range(len(rows) - 1):
        kind = reader.string()
        body += _string(kind)
        if kind == b"_lib":
            continue
        data = reader.string()
        if kind == b"cuda":
            head, tail = _string(b"cuda"), _string(source)
            if not data.startswith(head) or not data.endswith(tail):
                raise CompileError("TVM's CUDA module does not carry its source: this version packs it differently")
            data = _string(b"fatbin") + data[len(head) : -len(tail)] + _string(fatbin)
        body += _string(data)
    if reader.position != len(packed):
        raise CompileError("TVM's packed imports continue after their last module: this version packs them differently")
    return struct.pack("<Q", len(body)) + body


def _string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self.position = data, 0

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self._data, self.position)
        self.position += 8
        return int(value)

    def string(self) -> bytes:
        length = self.number()
        self.position += length
        return self._data[self.position - length : self.position]
