"""Shared by the tests of the code generator: ways to compile a program for Vulkan and to run it on arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from tvm_attn.vulkan.codegen import build, parse

Array = np.ndarray[Any, Any]


@pytest.fixture
def run(vulkan: Any) -> Callable[..., list[Array]]:
    """Compiles a PrimFunc or module for Vulkan, calls it with copies of the arrays and returns all of them."""

    def call(program: Any, *arguments: Any, target: Any = "vulkan", pipeline: str = "default") -> list[Array]:
        mod = program if isinstance(program, tvm.IRModule) else tvm.IRModule({"main": program})
        executable = tvm.compile(mod, target=target, tir_pipeline=pipeline)
        device = tvm.cpu() if target == "llvm" else vulkan
        held = [tvm.runtime.tensor(a, device) if isinstance(a, np.ndarray) else a for a in arguments]
        executable(*held)
        return [tensor.numpy() for tensor in held if isinstance(tensor, tvm.runtime.Tensor)]

    return call


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[dict[str, Any], bytes]]]:
    """Compiles a PrimFunc or module for Vulkan and returns the record and SPIR-V of each kernel. Needs no device."""

    def compile_only(
        program: Any, target: Any = "vulkan", pipeline: str = "default"
    ) -> list[tuple[dict[str, Any], bytes]]:
        kernels: list[tuple[dict[str, Any], bytes]] = []
        emit = build.__globals__["emit"]

        def keep(mod: tvm.IRModule) -> bytes:
            blob: bytes = emit(mod)
            kernels.extend(parse(blob))
            return blob

        mod = program if isinstance(program, tvm.IRModule) else tvm.IRModule({"main": program})
        with monkeypatch.context() as patch:
            patch.setitem(build.__globals__, "emit", keep)
            tvm.compile(mod, target=target, tir_pipeline=pipeline)
        return kernels

    return compile_only


@pytest.fixture
def elementwise(run: Callable[..., list[Array]]) -> Callable[..., Array]:
    """Computes `expression(*elements)` for arrays of one shape (n,), in vectors of `lanes`."""

    def compute(
        expression: Callable[..., Any], arrays: Sequence[Array], out: str, lanes: int = 1, target: str = "vulkan"
    ) -> Array:
        size = arrays[0].size
        inputs = [te.placeholder((size,), str(a.dtype), name=f"a{index}") for index, a in enumerate(arrays)]
        output = te.compute((size,), lambda i: expression(*(tensor[i] for tensor in inputs)), name="out")
        sch = tvm.s_tir.Schedule(te.create_prim_func([*inputs, output]))
        (loop,) = sch.get_loops(sch.get_sblock("out"))
        if target != "llvm":
            block, thread, vector = sch.split(loop, [None, 32, lanes])
            sch.bind(block, "blockIdx.x")
            sch.bind(thread, "threadIdx.x")
            if lanes > 1:
                sch.vectorize(vector)
        return run(sch.mod, *arrays, np.zeros(size, out), target=target)[-1]

    return compute
