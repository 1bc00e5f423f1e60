"""Loading TVM's CUDA runtime: what is searched for and where, and what the user is told, without a GPU."""

import ctypes
import ctypes.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tvm_attn.errors import DeviceError
from tvm_attn.runtime.devices import cuda, device_class

NO_DEVICE, STUB = 100, 34


class FakeDriver:
    """libcuda.so.1 with the functions that are called; all but the version return `error`."""

    def __init__(self, version: int = 13000, count: int = 1, error: int = 0) -> None:
        self.version, self.count, self.error = version, count, error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return self.error

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index + 10
        return 0 if index < self.count else 101

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        assert attribute == 97 and device.value >= 10
        value._obj.value = 232448
        return self.error

    def cuGetErrorName(self, error: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_STUB_LIBRARY" if error == STUB else None
        return 0 if error == STUB else 1


class Machine:
    """The libraries that can be loaded; opening TVM's CUDA runtime marks it as loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.libraries: dict[str, Any] = {cuda.DRIVER: FakeDriver(), cuda.CUDART: object()}
        self.opened: list[str] = []
        self.loaded, self.broken = False, False
        self.existing = 1
        monkeypatch.setattr(cuda, "_open", self.open)
        monkeypatch.setattr(cuda, "_is_loaded", lambda: self.loaded)
        monkeypatch.setattr(cuda, "_exists", lambda index: self.loaded and index < self.existing)
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)

    def open(self, name: str) -> Any:
        self.opened.append(name)
        if name.endswith("libtvm_runtime_cuda.so") and not self.broken:
            self.loaded = True
            return object()
        if name not in self.libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return self.libraries[name]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_runtime_is_loaded_once_and_last(machine: Machine) -> None:
    assert device_class("cuda").obstacle() is None
    assert [Path(name).name for name in machine.opened] == [cuda.DRIVER, cuda.CUDART, "libtvm_runtime_cuda.so"]
    cuda.load_runtime()
    assert len(machine.opened) == 3


def test_nothing_is_loaded_where_tvm_has_done_it(machine: Machine) -> None:
    machine.loaded = True
    cuda.load_runtime()
    assert machine.opened == []


def remove(name: str) -> Callable[[Machine], None]:
    def change(machine: Machine) -> None:
        del machine.libraries[name]

    return change


def driver(**arguments: int) -> Callable[[Machine], None]:
    def change(machine: Machine) -> None:
        machine.libraries[cuda.DRIVER] = FakeDriver(**arguments)
        machine.existing = 0

    return change


def breaks(machine: Machine) -> None:
    machine.broken = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(cuda.DRIVER), "no NVIDIA driver (libcuda.so.1 is missing): install it"),
        (
            remove(cuda.CUDART),
            "libcudart.so.13 was not found: pip install 'nvidia-cuda-runtime==13.*', or install the CUDA toolkit",
        ),
        (
            driver(version=12040),
            "the NVIDIA driver is for CUDA 12.4, TVM needs 13.0: install driver 580 or newer",
        ),
        (driver(error=NO_DEVICE), "the NVIDIA driver finds no CUDA device"),
        (driver(count=0), "the NVIDIA driver finds no CUDA device"),
        (
            driver(error=STUB),
            "NVIDIA's driver does not start: CUDA_ERROR_STUB_LIBRARY (34); nvidia-smi may say more",
        ),
        (driver(error=999), "NVIDIA's driver does not start: error 999; nvidia-smi may say more"),
        (driver(), "CUDA's runtime does not see it, though the driver does"),
        (breaks, "TVM's CUDA runtime cannot be loaded: "),
    ],
)
def test_what_is_missing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, change: Callable[[Machine], None], message: str
) -> None:
    monkeypatch.setattr(cuda, "_cudart_files", lambda folder: iter(()))
    change(machine)
    reason = device_class("cuda").obstacle()
    assert reason is not None and reason.startswith(message) and "\n" not in reason
    # The devices command says the same.
    with pytest.raises(DeviceError) as caught:
        device_class("cuda").find()
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("count", "index", "visible", "message"),
    [
        (1, 1, None, "there is no device cuda:1, but cuda:0 alone"),
        (4, 7, None, "there is no device cuda:7, but cuda:0 to cuda:3"),
        (2, 2, "0,1", "there is no device cuda:2, but cuda:0 to cuda:1 (CUDA_VISIBLE_DEVICES is '0,1')"),
        (0, 0, "", "the NVIDIA driver finds no CUDA device (CUDA_VISIBLE_DEVICES is '')"),
    ],
)
def test_index_of_no_device(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, count: int, index: int, visible: str | None, message: str
) -> None:
    machine.libraries[cuda.DRIVER] = FakeDriver(count=count)
    machine.existing = count
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_class("cuda").obstacle(index) == message
    assert all(device_class("cuda").obstacle(there) is None for there in range(count))


def test_where_libcudart_is_looked_for(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In addition to the loader's path: with TVM, in PyPI's package, with PyTorch, in a toolkit."""
    folders = ["tvm/lib", "site/nvidia/cu13/lib", "site/torch/lib", "toolkit/lib64"]
    files = [tmp_path / folder / cuda.CUDART for folder in folders]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "site/torch/lib/libcudart.so.12").touch()
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "site")])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert [file for file in cuda._cudart_files(tmp_path / "tvm/lib") if tmp_path in file.parents] == files
    # The first one that can be loaded is taken.
    del machine.libraries[cuda.CUDART]
    machine.libraries[str(files[2])] = object()
    assert device_class("cuda").obstacle() is None
    assert machine.opened[1:4] == [cuda.CUDART, str(files[1]), str(files[2])]


def test_shared_memory_and_version_of_the_driver(machine: Machine) -> None:
    assert cuda.shared_memory(0) == 232448
    assert cuda.shared_memory(1) is None
    assert cuda.driver_version() == "CUDA 13.0"
    del machine.libraries[cuda.DRIVER]
    assert cuda.shared_memory(0) is None
    assert cuda.driver_version() is None


# --- TVM's own library, with a driver that has no devices ---

# Every function of the driver that TVM's CUDA runtime refers to.
STUB_SOURCE = """
#define REFUSE(name) int name() { return 100; }
REFUSE(cuInit) REFUSE(cuDeviceGetCount) REFUSE(cuDeviceGetName) REFUSE(cuFuncSetAttribute) REFUSE(cuGetErrorName)
REFUSE(cuGetErrorString) REFUSE(cuLaunchKernelEx) REFUSE(cuModuleGetFunction) REFUSE(cuModuleLoadData)
REFUSE(cuModuleUnload) REFUSE(cuTensorMapEncodeTiled)
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
"""
PROBE = """
from tvm_attn.runtime.devices import cuda
from tvm_attn.runtime.tvm_import import import_tvm
import_tvm()
import tvm, tvm_ffi
print(cuda.obstacle(0))
print(tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None)
print(tvm_ffi.get_global_func("vm.builtin.cuda_graph.run_or_capture", allow_missing=True) is not None)
print(tvm.runtime.device("cuda", 0).exist)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a stand-in for Linux's driver")
@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a real driver")
def test_runtime_alone_over_a_driver_without_devices(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    try:
        ctypes.CDLL(cuda.CUDART)
    except OSError:
        if not any(cuda._cudart_files(tmp_path)):
            pytest.skip("no libcudart: pip install 'tvm-attn[cuda]'")
    source, library = tmp_path / "driver.c", tmp_path / cuda.DRIVER
    source.write_text(STUB_SOURCE)
    options = ["-shared", "-fPIC", f"-Wl,-soname,{cuda.DRIVER}", "-o", str(library)]
    subprocess.run([compiler, *options, str(source)], check=True)
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1", "LD_LIBRARY_PATH": str(tmp_path)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the NVIDIA driver finds no CUDA device", "True", "True", "False"]
