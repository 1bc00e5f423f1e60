"""What a kernel compiles to on a real architecture: registers, spills, shared memory and machine code.

Needs a CUDA compiler (nvcc, or NVRTC from the extra `cuda`) and nvdisasm (from the extra `test` or a toolkit), but no
GPU. `resources` and `sass` skip the test that calls them if one is missing.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import tirx
from tvm.tirx.build import split_host_device_mods
from tvm_ffi.structural import structural_walk

from tvm_attn import targets
from tvm_attn.compiler import cuda_module
from tvm_attn.compiler.cuda import Image, find_compiler
from tvm_attn.compiler.devices import backend_for
from tvm_attn.errors import CompileError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""The architectures of `--target cuda`."""

SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90a": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}
"""Most shared memory per block, static and dynamic, from the CUDA C++ Programming Guide's table of capabilities."""


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel.

    Attributes:
        registers: registers per thread.
        spills: bytes that a thread stores to and loads from local memory for lack of registers.
        stack: bytes of local memory per thread, e.g. for arrays with indices that are only known at run time.
        static_shared: bytes of shared memory per block that the code declares.
        dynamic_shared: bytes of shared memory per block that the launch requests; None if they depend on a size known
            only at run time.
        threads: threads per block; None if they depend on such a size.
    """

    registers: int
    spills: int
    stack: int
    static_shared: int
    dynamic_shared: int | None
    threads: int | None


def resources(function: tirx.PrimFunc, architecture: str = "sm_80") -> dict[str, Resources]:
    """The resources of each kernel of a scheduled function, by the kernel's name (`global_symbol` with `_kernel`)."""
    source, launches = _lowered(function)
    found: dict[str, Resources] = {}
    log = _image(source, architecture).log
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = part.split("'")[1]
        stack, stores, loads = _numbers(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", part)
        (registers,) = _numbers(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        launch = launches[name]
        found[name] = Resources(
            registers,
            stores + loads,
            stack,
            int(shared[1]) if shared else 0,
            launch.get("tirx.use_dyn_shared_memory", 0),
            _product([value for tag, value in launch.items() if tag.startswith("threadIdx")]),
        )
    assert set(found) == set(launches), f"{sorted(found)} in the compiler's log, {sorted(launches)} in the program"
    return found


def sass(function: tirx.PrimFunc, architecture: str = "sm_80") -> dict[str, str]:
    """The instructions of each kernel of a scheduled function, one line each, by the kernel's name."""
    source, launches = _lowered(function)
    text = _disassembly(source, architecture)
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.split(r"[\s,]", section, maxsplit=1)[0]
        found[name] = "\n".join(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?;)", section))
    assert set(found) == set(launches), f"{sorted(found)} disassembled, {sorted(launches)} in the program"
    return found


def log(function: tirx.PrimFunc, architecture: str = "sm_80") -> str:
    """The messages of the compiler."""
    return _image(_lowered(function)[0], architecture).log


def count(instructions: str, name: str) -> int:
    """How many instructions of one kernel's `sass` begin with a name, e.g. "HMMA", predicated or not."""
    return len(re.findall(rf"^(?:@!?\w+\s+)?{re.escape(name)}\b", instructions, flags=re.MULTILINE))


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text!r}"
    return [int(number) for number in found.groups()]


def _product(values: list[int | None]) -> int | None:
    result = 1
    for value in values:
        if value is None:
            return None
        result *= value
    return result


@functools.cache
def _lowered(function: tirx.PrimFunc) -> tuple[str, dict[str, dict[str, int | None]]]:
    """CUDA C of a function, and the launch parameters of its kernels: extents and bytes by TVM's names for them."""
    target = backend_for(targets.read("cuda")).tvm_target(targets.read("cuda"))
    module = tvm.IRModule.from_expr(function)
    source = cuda_module.cuda_source(module, target)
    bound = tirx.transform.BindTarget(target.with_host(target.host))(module)
    host, devices = split_host_device_mods(tirx.get_tir_pipeline(cuda_module.PIPELINE)[0](bound))
    tags = {
        str(kernel.attrs["global_symbol"]): [str(tag) for tag in kernel.attrs["tirx.kernel_launch_params"]]
        for device in devices.values()
        for kernel in device.functions.values()
    }
    launches: dict[str, dict[str, int | None]] = {}
    for name, arguments in _calls(host):
        if name in tags:
            values = [getattr(value, "value", None) for value in arguments[len(arguments) - len(tags[name]) :]]
            launches[name] = dict(zip(tags[name], values, strict=True))
    return source, launches


def _calls(module: tvm.IRModule) -> Iterator[tuple[str, list[Any]]]:
    """Packed calls of host functions: name and arguments."""
    found: list[tuple[str, list[Any]]] = []

    def visit(call: Any) -> None:
        if call.args and isinstance(call.args[0], tvm.ir.StringImm):
            found.append((str(call.args[0].value), list(call.args[1:])))

    for function in module.functions.values():
        structural_walk(function.body, ((tvm.ir.Call,), visit))
    yield from found


@functools.cache
def _image(source: str, architecture: str) -> Image:
    try:
        compiler = find_compiler((architecture,))
    except CompileError as error:
        pytest.skip(str(error))
    return compiler.image(source, architecture)


@functools.cache
def _disassembly(source: str, architecture: str) -> str:
    tool = _nvdisasm()
    if tool is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(_image(source, architecture).code)
        done = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _nvdisasm() -> str | None:
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    packaged = [str(path) for folder in folders for path in folder.glob("*/bin/nvdisasm")]
    return packaged[-1] if packaged else shutil.which("nvdisasm")
