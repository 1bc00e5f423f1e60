"""One kernel: from a device PrimFunc to SPIR-V and the record that the runtime reads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.analysis import Analysis
from tvm_attn.vulkan.codegen.arithmetic import Arithmetic
from tvm_attn.vulkan.codegen.builder import Builder
from tvm_attn.vulkan.codegen.interface import Interface
from tvm_attn.vulkan.codegen.memory import Memory
from tvm_attn.vulkan.codegen.statements import Statements

# SPIR-V capability -> feature of the module format (src/kernel_blob.cc).
_FEATURES = {
    "Float16": "float16",
    "Float64": "float64",
    "Int64": "int64",
    "Int16": "int16",
    "Int8": "int8",
    "StorageBuffer16BitAccess": "storage16",
    "StorageBuffer8BitAccess": "storage8",
    "GroupNonUniformBallot": "subgroup_ballot",
    "GroupNonUniformShuffle": "subgroup_shuffle",
    "GroupNonUniformArithmetic": "subgroup_arithmetic",
    "AtomicFloat32AddEXT": "buffer_float32_atomic_add",
    "CooperativeMatrixKHR": "cooperative_matrix",
    "VulkanMemoryModel": "vulkan_memory_model",
}


# Nested Python calls while a kernel is compiled: enough for at least 20,000 expressions or statements.
MAX_FRAMES = 200_000
_STACK_BYTES = 512 << 20
_DEEP = threading.Lock()


class Kernel(NamedTuple):
    """The SPIR-V words of a kernel and its record, without the position of the words."""

    binary: bytes
    record: dict[str, Any]


def compile_kernel(function: Any, name: str) -> Kernel:
    """Compiles a device function after TVM's lowering. Raises CompileError that names the operator and the kernel."""
    try:
        try:
            return _compile(function, name)
        except RecursionError:
            return _on_a_deep_stack(lambda: _compile(function, name))
    except CompileError as error:
        raise CompileError(f"Vulkan kernel {name}: {error}") from error


def _on_a_deep_stack(compile_: Callable[[], Kernel]) -> Kernel:
    """The result of `compile_` in a thread whose stack holds MAX_FRAMES Python calls: code is emitted recursively."""
    result: list[Kernel] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(compile_())
        except RecursionError:
            message = "it is nested too deeply; store intermediate results, or split it"
            failure.append(CompileError(message))
        except BaseException as error:
            failure.append(error)

    with _DEEP:
        limit, size = sys.getrecursionlimit(), threading.stack_size(_STACK_BYTES)
        sys.setrecursionlimit(max(limit, MAX_FRAMES))
        try:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join()
        finally:
            sys.setrecursionlimit(limit)
            threading.stack_size(size)
    if failure:
        raise failure[0]
    return result[0]


def _compile(function: Any, name: str) -> Kernel:
    target = function.attrs.get("target", None)
    analysis = Analysis(function, int(target.attrs.get("thread_warp_size", 1)) if target is not None else 1)
    builder = Builder()
    arithmetic = Arithmetic(builder)
    memory = Memory(arithmetic, analysis)
    interface = Interface(function, arithmetic, analysis, memory)
    statements = Statements(analysis, arithmetic, memory)
    size = interface.workgroup_size()
    statements.run(interface, function.params, function.body)
    module = builder.finish(size)
    unknown = module.capabilities - _FEATURES.keys() - _ALWAYS
    if unknown:
        raise CompileError(f"the module format has no feature for {', '.join(sorted(unknown))}")
    record = {
        "name": name,
        "params": interface.params,
        "reads": [root.reads and root.scope == "global" for root in interface.handles],
        "writes": [root.writes and root.scope == "global" for root in interface.handles],
        "launch_params": [str(tag) for tag in function.attrs.get("tirx.kernel_launch_params", [])],
        "workgroup_size": size,
        "block_size": interface.block_size,
        "block_offsets": interface.offsets,
        "aliases": interface.aliases,
        "shared_bytes": memory.shared_bytes,
        "subgroup_size": analysis.subgroup,
        "features": sorted({_FEATURES[item] for item in module.capabilities if item in _FEATURES}),
    }
    return Kernel(module.binary, record)


# Capabilities of every Vulkan 1.3 device that the runtime accepts.
_ALWAYS = frozenset(("Shader", "PhysicalStorageBufferAddresses", "GroupNonUniform"))
