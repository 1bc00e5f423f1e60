"""Compiles CUDA C to machine code with the libraries NVRTC and nvFatbin, in a process of its own.

NVRTC compiles under a lock and never frees its memory, so one process per architecture uses every core and returns all
memory. The process starts in milliseconds, because it imports only the standard library. It reads one JSON object from
standard input, writes a file, and prints the compiler's messages.

NVRTC: https://docs.nvidia.com/cuda/nvrtc/, nvFatbin: https://docs.nvidia.com/cuda/nvfatbin/
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

# nvcc finds this in the C library, which NVRTC does not have.
_PREAMBLE = b"""#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
"""


def main() -> int:
    """Performs the task on standard input; the exit status is 1 if the compiler found an error."""
    task = json.load(sys.stdin)
    output = Path(task["output"])
    if task["do"] == "compile":
        code, log = _compile(task["library"], Path(task["source"]).read_bytes(), task["architecture"], task["options"])
        sys.stdout.write(log)
        if code is None:
            return 1
        output.write_bytes(code)
    else:
        images = [(architecture, Path(path).read_bytes()) for architecture, path in task["images"]]
        output.write_bytes(_combine(task["library"], images))
    return 0


def _compile(library: str, source: bytes, architecture: str, options: list[str]) -> tuple[bytes | None, str]:
    """Machine code of `architecture` (sm_..) or its PTX (compute_..), and the log."""
    nvrtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), ctypes.c_char_p(_PREAMBLE + source), b"kernels.cu", 0, None, None
    )
    if created != 0:
        return None, f"nvrtcCreateProgram failed with {created}"
    arguments = [option.encode() for option in (f"--gpu-architecture={architecture}", *options)]
    status = nvrtc.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
    log = _text(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
    if status != 0:
        return None, log or f"nvrtcCompileProgram failed with {status}"
    return _text(nvrtc, "CUBIN" if architecture.startswith("sm_") else "PTX", program), log


def _text(nvrtc: Any, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != 0:
        raise RuntimeError(f"nvrtcGet{what}Size failed")
    buffer = ctypes.create_string_buffer(size.value)
    if getattr(nvrtc, f"nvrtcGet{what}")(program, buffer) != 0:
        raise RuntimeError(f"nvrtcGet{what} failed")
    return buffer.raw


def _combine(library: str, images: list[tuple[str, bytes]]) -> bytes:
    """One fatbin of cubins and PTX; `images` are architectures with their code."""
    nvfatbin = ctypes.CDLL(library)
    nvfatbin.nvFatbinGetErrorString.restype = ctypes.c_char_p

    def check(status: int) -> None:
        if status != 0:
            raise RuntimeError(nvfatbin.nvFatbinGetErrorString(status).decode())

    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 1)(b"-64")
    check(nvfatbin.nvFatbinCreate(ctypes.byref(handle), options, ctypes.c_size_t(1)))
    for architecture, code in images:
        kind, _, number = architecture.partition("_")
        length, name = ctypes.c_size_t(len(code)), number.encode()
        if kind == "sm":
            check(nvfatbin.nvFatbinAddCubin(handle, code, length, name, b"kernels"))
        else:
            check(nvfatbin.nvFatbinAddPTX(handle, code, length, name, b"kernels", b""))
    check(nvfatbin.nvFatbinSize(handle, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check(nvfatbin.nvFatbinGet(handle, buffer))
    return buffer.raw


if __name__ == "__main__":
    sys.exit(main())
