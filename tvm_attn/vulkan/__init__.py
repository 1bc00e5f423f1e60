"""Vulkan for a TVM that was built without it: code generation in Python, the device runtime in C++.

`import tvm` finds `autoload` through the entry point group `tvm.backends`, both with the compiler and with only TVM's
runtime (`TVM_USE_RUNTIME_LIB=1`). It loads the runtime library, if the package was built with it, and registers what
TVM looks up; names that TVM already has stay TVM's. Neither needs a Vulkan driver: libvulkan is opened when a device is
first used.

| environment variable | does |
|---|---|
| `TVM_ATTN_VULKAN_DEVICE` | chooses and orders the devices: indices or parts of names, separated by commas |
| `TVM_ATTN_VULKAN_VALIDATE=1` | the validation layer, including synchronization; see `validation_messages` |
"""

from __future__ import annotations

import atexit
import ctypes
import json
from pathlib import Path
from typing import Any

from tvm_attn.errors import ArtifactError, CompileError, DeviceError

LIBRARY = Path(__file__).with_name("libtvm_attn_vulkan.so")


def is_built() -> bool:
    """Whether this installation includes the device runtime."""
    return LIBRARY.is_file()


def autoload() -> None:
    """Registers the Vulkan backend with the TVM that is being imported. Calling it again changes nothing."""
    import tvm_ffi

    # The runtime library's errors arrive as these types.
    for error in (ArtifactError, CompileError, DeviceError):
        tvm_ffi.register_error(error.__name__, error)
    if is_built() and not _registered("tvm_attn.vulkan.devices"):
        ctypes.CDLL(str(LIBRARY))  # registers its functions when it is loaded
        atexit.register(_global("tvm_attn.vulkan.flush"))
    if not _registered("target.build.vulkan"):
        tvm_ffi.register_global_func("target.build.vulkan", _build)
    if not _registered("tvm_attn.vulkan.disassemble"):
        tvm_ffi.register_global_func("tvm_attn.vulkan.disassemble", _disassemble)
    _register_target_detection()


def devices() -> list[dict[str, Any]]:
    """The Vulkan devices of this machine, usable or not: name, type, versions, features, limits, what is `missing`.

    `index` is TVM's number for the device, or None. Raises DeviceError if there is no Vulkan.
    """
    return list(json.loads(_global("tvm_attn.vulkan.devices")()))


def statistics(index: int = 0) -> dict[str, int]:
    """Memory and stream of `vulkan:index`: bytes allocated by tensors and reserved from the driver, allocations,
    blocks, operations recorded, submissions, barriers; and the number of validation-layer messages in this process.
    Raises DeviceError if there is no such device.
    """
    return dict(json.loads(_global("tvm_attn.vulkan.statistics")(index)))


def validation_messages() -> list[str]:
    """The validation layer's messages in this process, at most 100.

    Raises DeviceError if the layer does not run: TVM_ATTN_VULKAN_VALIDATE=1 switches it on, before first use.
    """
    report = json.loads(_global("tvm_attn.vulkan.validation")())
    if not report["enabled"]:
        raise DeviceError("the validation layer is not running: set TVM_ATTN_VULKAN_VALIDATE=1 and use a device first")
    return list(report["messages"])


def require_device(module: Any, index: int = 0, name: str = "the module") -> None:
    """Checks that `vulkan:index` can run every Vulkan kernel in a loaded `module` (a tvm_ffi.Module) and its imports.

    Raises DeviceError that names the device and everything it lacks that `name` needs. The first launch of a kernel
    checks the same.
    """
    _global("tvm_attn.vulkan.require_device")(module, index, name)


def _registered(name: str) -> bool:
    import tvm_ffi

    return tvm_ffi.get_global_func(name, allow_missing=True) is not None


def _global(name: str) -> Any:
    import tvm_ffi

    function = tvm_ffi.get_global_func(name, allow_missing=True)
    if function is None and is_built():
        import tvm  # noqa: F401  (its import calls autoload)

        autoload()  # needed if TVM's own autoloading is switched off
        function = tvm_ffi.get_global_func(name, allow_missing=True)
    if function is None:
        raise DeviceError(
            "tvm-attn was built without its Vulkan runtime: install CMake, a C++ compiler and Vulkan's headers "
            "(Debian: cmake g++ libvulkan-dev), then reinstall tvm-attn"
        )
    return function


def _build(mod: Any, target: Any) -> Any:
    from tvm_attn.vulkan import codegen

    return codegen.build(mod, target)


def _disassemble(code: bytes) -> str:
    from tvm_attn.vulkan import codegen

    return codegen.disassemble(code)


def _register_target_detection() -> None:
    """`Target.from_device("vulkan")` as in TVM, except for two limits.

    TVM leaves `max_num_threads` at 256, and sets `thread_warp_size` to the subgroup size. Here the latter is 1, TVM's
    default for the kind: a program that exchanges data within subgroups asks for their size, and runs only where they
    have it.
    """
    from tvm.base import _RUNTIME_ONLY

    if _RUNTIME_ONLY:
        return
    from tvm.target import Target
    from tvm.target.detect_target import SUPPORTED_DEVICE, register_device_target_detector

    detect = SUPPORTED_DEVICE.get("vulkan")
    if detect is None:
        return

    def detect_all(device: Any) -> Target:
        target = detect(device)
        return Target({**target.export(), "max_num_threads": device.max_threads_per_block, "thread_warp_size": 1})

    register_device_target_detector("vulkan", detect_all)
