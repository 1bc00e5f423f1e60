"""A whole program on emulated kernels: libraries built for CUDA run with the device "cuda:0" on this machine.

A process keeps the device that it installs, so tests that expect no device must run in another process:

    with device.source_in_libraries():
        build(..., target="cuda")
    # in another process
    device.install()
    tvm_attn.load(..., device="cuda:0")

CUDA graphs are recorded and launched as graphs: a launch repeats the kernels with the arguments that they had when the
graph was captured. Kernels run without the sanitizers' checks, unlike in `run`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tvm
import tvm_ffi

from tvm_attn.compiler.devices import cuda as backend

from .build import compile_kernels, runtime

_PREFIX = "tests.cuda.emulation"


@contextmanager
def source_in_libraries() -> Iterator[None]:
    """A context in which libraries for CUDA hold CUDA C instead of machine code, so that no CUDA compiler is needed."""
    with (
        mock.patch.object(backend, "find_compiler"),
        mock.patch.object(backend, "compile_fatbin", lambda source, architectures: source.encode()),
    ):
        yield


def install() -> None:
    """Makes cuda:0 the emulated device of this process. Call it before anything looks for a CUDA device."""
    ctypes.CDLL(str(runtime() / "libemulation.so"), mode=ctypes.RTLD_GLOBAL)
    functions: dict[str, Callable[..., Any]] = {
        f"{_PREFIX}.compile": lambda source: str(compile_kernels(source, None)),
        "vm.builtin.cuda_graph.run_or_capture": _Graphs().run_or_capture,
        "vm.builtin.cuda_graph.get_cached_alloc": _Allocations().get,
    }
    for name, function in functions.items():
        tvm_ffi.register_global_func(name, function, override=True)
    assert tvm.cuda(0).exist


class _Cache:
    """What a virtual machine stores by the number of a graph or of an allocation.

    A machine is identified by its address. A later machine may have the same address, but not the same closure while
    this one is kept alive.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def find(self, key: tuple[Any, ...], closure: Any) -> Any:
        known, value = self._values.get(key, (None, None))
        return value if known is not None and known.same_as(closure) else None

    def put(self, key: tuple[Any, ...], closure: Any, value: Any) -> None:
        self._values[key] = closure, value


def _call(machine: Any, closure: Any, *arguments: Any) -> Any:
    return tvm_ffi.get_global_func("vm.builtin.invoke_closure")(machine, closure, *arguments)


class _Graphs(_Cache):
    """vm.builtin.cuda_graph.run_or_capture, as TVM's `src/runtime/vm/cuda/cuda_graph_builtin.cc` describes it."""

    def run_or_capture(self, machine: Any, closure: Any, arguments: Any, index: int, sizes: Any = None) -> Any:
        key = (machine.value, index, tuple(sizes or ()))
        found = self.find(key, closure)
        if found is not None:
            states, graph = found
            tvm_ffi.get_global_func(f"{_PREFIX}.launch_graph")(graph)
            return states
        _call(machine, closure, *arguments)
        graph = tvm_ffi.get_global_func(f"{_PREFIX}.begin_capture")()
        try:
            states = _call(machine, closure, *arguments)
        finally:
            tvm_ffi.get_global_func(f"{_PREFIX}.end_capture")()
        self.put(key, closure, (states, graph))
        return states


class _Allocations(_Cache):
    """vm.builtin.cuda_graph.get_cached_alloc."""

    def get(self, machine: Any, closure: Any, index: int) -> Any:
        key = (machine.value, index)
        value = self.find(key, closure)
        if value is None:
            value = _call(machine, closure)
            self.put(key, closure, value)
        return value
