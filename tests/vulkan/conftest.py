"""Fixtures that the Vulkan tests share."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).with_name("kernels")


@pytest.fixture(scope="session")
def vulkan() -> Any:
    """TVM's device vulkan:0, with the backend registered. Skips if the runtime or a device is missing."""
    import tvm

    from tvm_attn import vulkan as backend

    if not backend.is_built():
        pytest.skip("tvm_attn was built without its Vulkan runtime")
    backend.autoload()
    device = tvm.vulkan(0)
    if not device.exist:
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    return device


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(code, silent=True, **environment) runs `code` in its own process, with this checkout's package, only
    TVM's runtime and no PyTorch.

    `silent`: the validation layer, if it runs, must not issue a message.
    """

    def run(code: str, silent: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"PYTHONPATH": str(Path(__file__).parents[2]), "TVM_USE_RUNTIME_LIB": "1"}
        command = [sys.executable, "-c", f"import sys\nsys.modules['torch'] = None\n{code}"]
        variables = {**os.environ, **own, **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
        assert not silent or "Vulkan validation:" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def listed(vulkan: Any) -> dict[str, Any]:
    """The entry of vulkan:0 in `tvm_attn.vulkan.devices`."""
    from tvm_attn import vulkan as backend

    return next(device for device in backend.devices() if device["index"] == 0)


@pytest.fixture(scope="session")
def axpy_code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """kernels/axpy.spvasm as SPIR-V: c = a + scale * b."""
    assembler = shutil.which("spirv-as")
    if assembler is None:
        pytest.skip("no spirv-as: install spirv-tools")
    out = tmp_path_factory.mktemp("spirv") / "axpy.spv"
    command = [assembler, "--target-env", "spv1.6", KERNELS / "axpy.spvasm", "-o", out]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_bytes()


@pytest.fixture
def axpy_record(axpy_code: bytes) -> dict[str, Any]:
    """The description of axpy in the module format; each test gets its own to change."""
    return {
        "name": "axpy",
        "params": ["handle", "handle", "handle", "int32", "float32"],
        "reads": [True, True, False],
        "writes": [False, False, True],
        "launch_params": ["blockIdx.x", "threadIdx.x"],
        "workgroup_size": [64, 1, 1],
        "block_size": 48,
        "block_offsets": [0, 8, 16, 24, 28],
        "aliases": [],
        "shared_bytes": 0,
        "subgroup_size": None,
        "features": [],
        "offset": 0,
        "size": len(axpy_code),
    }


@pytest.fixture(scope="session")
def pack(axpy_code: bytes) -> Callable[..., bytes]:
    """pack(record, ..., code=axpy) -> a module in the module format."""

    def pack_module(*records: Any, code: bytes = axpy_code) -> bytes:
        description = json.dumps({"kernels": list(records)}).encode()
        return b"TVMATTNV" + struct.pack("<II", 2, len(description)) + description + code

    return pack_module


@pytest.fixture(scope="session")
def create_module(vulkan: Any) -> Callable[[bytes], Any]:
    """The runtime's own constructor of modules."""
    import tvm_ffi

    return tvm_ffi.get_global_func("tvm_attn.vulkan.create_module")


@pytest.fixture
def axpy(create_module: Callable[[bytes], Any], pack: Callable[..., bytes], axpy_record: dict[str, Any]) -> Any:
    """axpy(a, b, c, n, scale, workgroups, 64) on vulkan:0."""
    return create_module(pack(axpy_record))["axpy"]
