"""CUDA kernels on the CPU: the source that TVM generates for a device, compiled with a C++ compiler and run.

Every thread of a block is a fiber, and warp collectives, ldmatrix, mma.sync, wgmma, cp.async, mbarriers and barriers do
what the PTX ISA documentation says. The compiler's host code runs too. Each case runs twice, the second time with
threads and blocks in reverse order; a warp runs until it waits for another. Kernels with atomic operations also run
twice at the same time, a block of one call after a block of the other.

| it finds | by means of |
|---|---|
| accesses out of bounds: tensors, shared memory, local arrays | address and bounds sanitizer |
| misaligned vectors, rows of ldmatrix, asynchronous copies | alignment sanitizer, checks |
| use of shared memory, workspaces or variables before they are written | poison: 0xFF in memory, 0xFE in variables |
| results of cp.async and wgmma that are not waited for | poison until the wait |
| a missing barrier that changes a result; blocks that race | different results in reverse order |
| memory that two calls share, such as a variable of the module | different results of two calls at the same time |
| any pair of conflicting accesses to shared memory without a barrier (`races=True`) | vector clocks |
| barriers and collectives that not all threads reach, mbarriers whose phase never ends | no thread can go on |
| PTX that is not emulated | an error that names it |

It does not find races in global memory that change nothing in reverse order; missing fences; shared memory that is
overwritten while wgmma may still read it, which here reads at once; or blocks that wait for each other, since they run
one after another. It does not show how a device rounds inside mma.sync, wgmma and approximate functions, which are
nearly exact here; nor registers, occupancy and time.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import tvm
from tvm import tirx

from tvm_attn.compiler import cuda_module
from tvm_attn.compiler.devices import backend_for
from tvm_attn.targets import read

from .build import compile_kernels, folder, runtime
from .translate import EmulationError

__all__ = ["EmulationError", "run"]

_TIMEOUT = 120  # seconds
# handle_segv: TVM installs its own handler, whose report says less.
_SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:handle_segv=2:detect_stack_use_after_return=0:symbolize=1",
    "UBSAN_OPTIONS": "print_stacktrace=0",
}
_TYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLPack's


def run(function: tirx.PrimFunc, arguments: Sequence[np.ndarray], races: bool = False) -> None:
    """Calls a function that is scheduled for CUDA, kernels and host code, with the checks that this package describes.

    Args:
        function: a TIRx function with `tirx.is_scheduled`.
        arguments: its tensors in the order of its parameters; results are written into them.
        races: whether to check every pair of accesses to shared memory; compiles the kernels a second time.

    Raises:
        EmulationError: the kernels do something that a device would not do, or have PTX that is not emulated.
    """
    library, source = _compile(tvm.ir.save_json(function.with_attr("global_symbol", "main")))
    kernels = compile_kernels(source, "memory")
    reversed_kernels = compile_kernels(source, "races") if races else kernels
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        inputs, results = Path(scratch) / "arguments", Path(scratch) / "results"
        with inputs.open("wb") as file:
            lines = [f"{_type(argument.dtype)} {' '.join(map(str, argument.shape))}".strip() for argument in arguments]
            file.write("".join(line + "\n" for line in [*lines, ""]).encode())
            for argument in arguments:
                file.write(argument.tobytes())
        # Kernels without atomic operations have nothing in common but their tensors.
        twice = int(re.search(r"\batom", source) is not None)
        command = [runtime() / "runner", library, kernels, reversed_kernels, "main", inputs, results, twice]
        try:
            result = subprocess.run(
                [str(part) for part in command],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                env=os.environ | _SANITIZERS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EmulationError(f"the kernels did not end in {_TIMEOUT} s: they wait for what never comes") from None
        if result.returncode != 0:
            raise EmulationError(_message(result.stderr) or f"the runner ended with status {result.returncode}")
        with results.open("rb") as file:
            for argument in arguments:
                data = np.frombuffer(file.read(argument.nbytes), argument.dtype)
                argument[...] = data.reshape(argument.shape)


def _type(dtype: np.dtype) -> str:
    if dtype == ml_dtypes.bfloat16:
        return "4 16"
    return f"{_TYPE_CODES[dtype.kind]} {8 * dtype.itemsize}"


@functools.cache
def _compile(function: str) -> tuple[Path, str]:
    """Compiles a function, given as JSON, to a library with its host code and its CUDA source."""
    cuda_module.register_pipeline()
    module = tvm.IRModule({"main": tvm.ir.load_json(function)})
    with cuda_module.without_runtime():
        built = tirx.build(
            module, target=backend_for(read("cuda-sm80")).tvm_target(read("cuda-sm80")), pipeline=cuda_module.PIPELINE
        )
    path = folder() / f"host_{hashlib.sha256(function.encode()).hexdigest()[:16]}.so"
    tvm.runtime.Executable(built).export_library(str(path))
    return path, cuda_module.device_source(built)


def _message(report: str) -> str:
    """The relevant lines of the output of the runner or a sanitizer, and the line of source that caused it."""
    lines = [line for line in report.splitlines() if not line.startswith(("SUMMARY", "====="))]
    text = "\n".join(lines)[-1000:]
    if "AddressSanitizer" in report:
        what = re.findall(r"AddressSanitizer: (\S+)|^((?:READ|WRITE) of size \d+)", report, re.MULTILINE)
        where = re.findall(r"^.*?(is located .*)$|^\s*\[\d+, \d+\) ('.*) <== .*$", report, re.MULTILINE)
        text = ", ".join(dict.fromkeys(["out of bounds", *(a or b for a, b in [*what[:2], *where[:2]])]))
    place = re.search(r"(/\S+\.cc):(\d+)", report)
    if place and Path(place[1]).is_file():
        text += "\nin: " + Path(place[1]).read_text().splitlines()[int(place[2]) - 1].strip()
    return text
