"""`target.build.vulkan`: turns a module of device functions into the module that the runtime loads."""

from __future__ import annotations

import json
import struct
from typing import Any

import tvm_ffi

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.kernel import compile_kernel

MAGIC = b"TVMATTNV"
VERSION = 2


def emit(mod: Any) -> bytes:
    """All device functions of an IRModule in the module format: magic, version, JSON, SPIR-V."""
    records: list[dict[str, Any]] = []
    code = bytearray()
    for variable, function in mod.functions.items():
        symbol = function.attrs.get("global_symbol", None)
        kernel = compile_kernel(function, str(symbol or variable.name_hint))
        records.append({**kernel.record, "offset": len(code), "size": len(kernel.binary)})
        code += kernel.binary
    header = json.dumps({"kernels": records}, separators=(",", ":")).encode()
    return MAGIC + struct.pack("<II", VERSION, len(header)) + header + bytes(code)


def parse(blob: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """The kernels of a blob that `emit` made: record and SPIR-V."""
    if blob[:8] != MAGIC:
        raise CompileError("not a Vulkan module of tvm_attn: its first bytes differ")
    version, length = struct.unpack_from("<II", blob, 8)
    if version != VERSION:
        raise CompileError(f"a Vulkan module of version {version}; this version reads {VERSION}")
    code = 16 + length
    return [
        (record, blob[code + record["offset"] : code + record["offset"] + record["size"]])
        for record in json.loads(blob[16:code])["kernels"]
    ]


def build(mod: Any, target: Any) -> Any:
    """The runtime module for the device functions of `mod`. Raises CompileError if the runtime was not built."""
    del target  # Kernels record the features that they need; the runtime compares them with the device.
    create = tvm_ffi.get_global_func("tvm_attn.vulkan.create_module", allow_missing=True)
    if create is None:
        raise CompileError("the Vulkan runtime of tvm_attn was not built; install Vulkan's headers and build it again")
    return create(emit(mod))
