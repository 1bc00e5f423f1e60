"""What the tests of the code generator share: every module that is emitted passes spirv-val, where it is installed."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from tvm_attn.vulkan.codegen import build as build_module_function
from tvm_attn.vulkan.codegen import parse

Array = np.ndarray[Any, Any]


def check_spirv(code: bytes, path: Path) -> None:
    """Fails where spirv-val finds fault."""
    path.write_bytes(code)
    command = ["spirv-val", "--target-env", "vulkan1.3", "--scalar-block-layout", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(autouse=True)
def every_module_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wraps the emitter, so that nothing is run that the validator refuses."""
    import sys

    module = sys.modules[build_module_function.__module__]
    original = module.emit

    def emit(mod: tvm.IRModule) -> bytes:
        blob = original(mod)
        if shutil.which("spirv-val"):
            for record, code in parse(blob):
                # The validator of Debian 12 is older than KHR cooperative matrices.
                if "cooperative_matrix" not in record["features"]:
                    check_spirv(code, tmp_path / "kernel.spv")
        return blob

    monkeypatch.setattr(module, "emit", emit)


@pytest.fixture
def run(vulkan: Any) -> Callable[..., list[Array]]:
    """Compiles a PrimFunc or module for Vulkan, calls it with copies of the arrays and gives all of them back."""

    def call(program: Any, *arguments: Any, target: Any = "vulkan") -> list[Array]:
        mod = program if isinstance(program, tvm.IRModule) else tvm.IRModule({"main": program})
        executable = tvm.compile(mod, target=target)
        device = tvm.cpu() if target == "llvm" else vulkan
        held = [tvm.runtime.tensor(a, device) if isinstance(a, np.ndarray) else a for a in arguments]
        executable(*held)
        return [tensor.numpy() for tensor in held if isinstance(tensor, tvm.runtime.Tensor)]

    return call


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
