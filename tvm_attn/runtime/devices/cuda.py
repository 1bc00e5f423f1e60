"""NVIDIA GPUs: loading TVM's CUDA runtime, why a device cannot be used, and which code a device can run.

TVM with its compiler tries to load `libtvm_runtime_cuda.so` when it is imported, finds the libraries that this needs
only on the loader's path, and fails silently; TVM's runtime without the compiler (`TVM_USE_RUNTIME_LIB=1`) does not
try. So `load_runtime` does it, when a CUDA device is asked for.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tvm_attn.errors import DeviceError
from tvm_attn.runtime.devices.base import DeviceClass, Found, lacks_of_block
from tvm_attn.runtime.devices.cuda_copies import Copies

DRIVER = "libcuda.so.1"
CUDART = "libcudart.so.13"
"""The CUDA runtime that TVM's CUDA runtime is linked with."""
MINIMUM_VERSION = 13000
"""The driver version that TVM's CUDA runtime needs, as `cuDriverGetVersion` counts: 1000 * major + 10 * minor."""
MINIMUM_DRIVER = 580
"""The first series of NVIDIA's driver with that version."""

_SHARED_MEMORY_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN

Capability = tuple[int, int]
"""Compute capability of a device: major and minor."""


class Driver:
    """The few functions of NVIDIA's driver that say why there is no device; see its Driver API reference.

    Raises:
        DeviceError: there is no driver.
    """

    def __init__(self) -> None:
        try:
            self._library = _open(DRIVER)
        except OSError as error:
            raise DeviceError(f"no NVIDIA driver ({DRIVER} is missing): install it") from error

    def version(self) -> int:
        """The CUDA version of the driver, counted as in `MINIMUM_VERSION`; 0 if it does not say."""
        version = ctypes.c_int()
        return 0 if self._library.cuDriverGetVersion(ctypes.byref(version)) else version.value

    def count(self) -> int:
        """The number of devices that CUDA_VISIBLE_DEVICES leaves visible.

        Raises:
            DeviceError: the driver does not start.
        """
        count = ctypes.c_int()
        error = self._library.cuInit(0) or self._library.cuDeviceGetCount(ctypes.byref(count))
        if error == 100:  # CUDA_ERROR_NO_DEVICE
            return 0
        if error:
            raise DeviceError(f"NVIDIA's driver does not start: {self._error_name(error)}; nvidia-smi may say more")
        return count.value

    def shared_memory(self, index: int) -> int | None:
        """Bytes of shared memory that a block may ask for; None if the driver does not say."""
        value, device = ctypes.c_int(), ctypes.c_int()
        error = (
            self._library.cuInit(0)
            or self._library.cuDeviceGet(ctypes.byref(device), index)
            or self._library.cuDeviceGetAttribute(ctypes.byref(value), _SHARED_MEMORY_OPTIN, device)
        )
        return None if error else value.value

    def copies(self) -> Copies:
        """Copies of a stream's tensors to the host."""
        return Copies(self._library)

    def _error_name(self, error: int) -> str:
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(error, ctypes.byref(name))
        return f"{name.value.decode()} ({error})" if name.value else f"error {error}"


def _open(name: str) -> Any:
    return ctypes.CDLL(name)


def load_runtime() -> None:
    """Makes CUDA devices known to TVM, which must be importable. Calling it again changes nothing.

    Raises:
        DeviceError: the driver, libcudart or TVM's CUDA runtime is missing, or the driver is too old.
    """
    import tvm

    if _is_loaded():
        return
    library = Path(tvm.libinfo.find_libtvm_runtime()).with_name("libtvm_runtime_cuda.so")
    if not library.is_file():
        raise DeviceError("this TVM has no CUDA runtime (libtvm_runtime_cuda.so); install apache-tvm from PyPI")
    if reason := _too_old(Driver().version()):
        raise DeviceError(reason)
    _load_cudart(library.parent)
    try:
        _open(str(library))  # registers its functions while it is loaded
    except OSError as error:
        raise DeviceError(f"TVM's CUDA runtime cannot be loaded: {error}") from error


def _is_loaded() -> bool:
    import tvm_ffi

    return tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None


def _too_old(version: int) -> str | None:
    if not 0 < version < MINIMUM_VERSION:
        return None
    has, needs = (f"{number // 1000}.{number % 1000 // 10}" for number in (version, MINIMUM_VERSION))
    return f"the NVIDIA driver is for CUDA {has}, TVM needs {needs}: install driver {MINIMUM_DRIVER} or newer"


def _load_cudart(folder: Path) -> None:
    """Loads libcudart, so that the loader then finds it by name; `folder` is that of TVM's libraries."""
    for path in [CUDART, *map(str, _cudart_files(folder))]:
        try:
            _open(path)
            return
        except OSError:
            continue
    raise DeviceError(f"{CUDART} was not found: pip install 'nvidia-cuda-runtime==13.*', or install the CUDA toolkit")


def _cudart_files(folder: Path) -> Iterator[Path]:
    """Where libcudart may be, other than on the loader's path: `folder`, PyPI packages, PyTorch, the CUDA toolkit."""
    packages = [Path(entry) for entry in sys.path if entry]
    folders = [folder, *(root / "nvidia" / name / "lib" for root in packages for name in ("cu13", "cuda_runtime"))]
    folders += [root / "torch" / "lib" for root in packages]
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkits += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-13*"), reverse=True)]
    folders += [toolkit / name for toolkit in toolkits for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return (path for folder in folders if (path := folder / CUDART).is_file())


def obstacle(index: int) -> str | None:
    """Why `cuda:index` cannot be used, as text; None if it can."""
    try:
        load_runtime()
        if _exists(index):
            return None
        driver = Driver()
        count = driver.count()
    except DeviceError as error:
        return str(error)
    if count == 0:
        return f"the NVIDIA driver finds no CUDA device{_hidden()}"
    if index >= count:
        there = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return f"there is no device cuda:{index}, but {there}{_hidden()}"
    return _too_old(driver.version()) or "CUDA's runtime does not see it, though the driver does"


def _exists(index: int) -> bool:
    import tvm

    return bool(tvm.runtime.device("cuda", index).exist)


def _hidden() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"


def driver_version() -> str | None:
    """The CUDA version of the driver, as text; None if it does not say."""
    try:
        version = Driver().version()
    except DeviceError:
        return None
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else None


def shared_memory(index: int) -> int | None:
    """Bytes of shared memory that a block may ask for; TVM only knows what a block gets without asking."""
    try:
        return Driver().shared_memory(index)
    except DeviceError:
        return None


def capability(index: int) -> Capability:
    """Compute capability of `cuda:index`, which must exist."""
    import tvm

    return parse_capability(str(tvm.runtime.device("cuda", index).compute_version))


def parse_capability(version: str) -> Capability:
    """(9, 0) from "9.0"."""
    major, minor = version.split(".")
    return int(major), int(minor)


def select(index: int) -> None:
    """Makes `cuda:index` the current device of this thread: CUDA graphs are captured and launched there."""
    _set_device()(2, index)  # kDLCUDA


@cache
def _set_device() -> Any:
    import tvm_ffi

    return tvm_ffi.get_global_func("__tvm_set_device")


def code_rank(architectures: Sequence[str], ptx: str | None, capability: Capability) -> tuple[int, int] | None:
    """How well code for several architectures suits a device: larger is better, None if it cannot run.

    Machine code for sm_XY runs on X.Y and later minor versions, for sm_XYf on the same family, for sm_XYa only on X.Y;
    the driver compiles PTX for compute_XY on X.Y and everything later. See "GPU Compilation" in NVIDIA's documentation
    of nvcc.
    """
    ranks = [rank for name in architectures if (rank := _machine_code_rank(name, capability)) is not None]
    if ptx is not None and (rank := _ptx_rank(ptx, capability)) is not None:
        ranks.append(rank)
    return max(ranks, default=None)


def _machine_code_rank(name: str, capability: Capability) -> tuple[int, int] | None:
    version, suffix = _version(name)
    if suffix == "a":
        return (3, capability[1]) if version == capability else None
    if version[0] != capability[0] or version[1] > capability[1]:
        return None
    return (2 if suffix == "f" else 1, version[1])


def _ptx_rank(name: str, capability: Capability) -> tuple[int, int] | None:
    version, suffix = _version(name)
    fits = version == capability if suffix == "a" else version <= capability
    return (0, version[0] * 10 + version[1]) if fits else None


def _version(name: str) -> tuple[Capability, str]:
    """(9, 0) and "a" from "sm_90a"."""
    found = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)([af]?)", name, re.ASCII)
    if found is None:
        raise ValueError(f"{name!r:.40} is no CUDA architecture")
    return (int(found[1]), int(found[2])), found[3]


class Cuda(DeviceClass):
    """NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible."""

    kind, dlpack = "cuda", 2
    has_streams = True

    def find(self) -> list[Found]:
        """See `DeviceClass`."""
        import tvm

        if reason := obstacle(0):
            raise DeviceError(reason)
        found: list[Found] = []
        while (device := tvm.runtime.device("cuda", len(found))).exist:
            limits = {
                "compute_capability": str(device.compute_version),
                "max_threads_per_block": device.max_threads_per_block,
                "max_shared_memory_bytes": shared_memory(len(found)) or device.max_shared_memory_per_block,
                "warp_size": device.warp_size,
                "multiprocessors": device.multi_processor_count,
                "l2_bytes": device.l2_cache_size_bytes,
                "memory_bytes": device.total_global_memory,
            }
            found.append(Found(f"cuda:{len(found)}", device.device_name, driver_version(), (), limits))
        return found

    def obstacle(self, index: int = 0) -> str | None:
        """See `DeviceClass`."""
        return obstacle(index)

    def lacks(self, target: Any, device: Found, dtype: str, quant: str) -> Iterator[str]:
        """See `DeviceClass`."""
        limits = device.limits
        yield from lacks_of_block(target, limits["max_threads_per_block"], limits["max_shared_memory_bytes"])
        version = limits["compute_capability"]
        if code_rank(target.architectures, target.ptx, parse_capability(version)) is None:
            yield f"support for {', '.join(target.architectures)} (has compute capability {version})"

    def capability(self, index: int = 0) -> Capability:
        """Compute capability of the device."""
        return capability(index)

    def select(self, index: int) -> None:
        """See `DeviceClass`."""
        select(index)

    def copies(self) -> Copies | None:
        """See `DeviceClass`."""
        try:
            return Driver().copies()
        except DeviceError:  # TVM's device is not this driver's, as in tests
            return None


DEVICE_CLASS = Cuda()
