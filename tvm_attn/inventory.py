"""What this machine has to run models on: devices with their features and limits, and which targets fit them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tvm_attn import targets
from tvm_attn.errors import DeviceError
from tvm_attn.runtime import cuda
from tvm_attn.runtime.device import obstacle as device_obstacle
from tvm_attn.runtime.machine import cpu_features, usable_cores


@dataclass(frozen=True)
class Device:
    """A device, usable or not.

    Attributes:
        device: its name in this project, e.g. "cpu" or "vulkan:0"; for one that cannot be used its class, "vulkan".
        name: the product's name.
        driver: driver and version, or None.
        features: what its code may use, sorted; of a processor, what some target asks for.
        limits: numbers by name; sizes are bytes.
        missing: what keeps it from being used; empty for a usable one.
    """

    device: str
    name: str
    driver: str | None
    features: tuple[str, ...]
    limits: dict[str, Any]
    missing: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """ "cpu", "cuda" or "vulkan"."""
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Fit:
    """Whether code for a target with weights of a storage dtype, not quantized, runs on a device.

    Attributes:
        target: the target's name.
        device: the device, or the class of devices where there is none.
        dtype: the storage dtype.
        missing: what the device lacks; empty where the code runs.
    """

    target: str
    device: str
    dtype: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    """All of it.

    Attributes:
        devices: the devices, processor first.
        absent: for each class of devices without a usable one, why.
        fits: every target with every device of its class, for each of the target's dtypes.
    """

    devices: tuple[Device, ...]
    absent: dict[str, str]
    fits: tuple[Fit, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def take_inventory() -> Inventory:
    """Looks at this machine, through TVM and Vulkan's loader. Starts no work on any device."""
    devices = [_processor()]
    absent = {}
    for kind, find in (("cuda", _cuda_devices), ("vulkan", _vulkan_devices)):
        try:
            devices += find()
        except DeviceError as error:
            absent[kind] = str(error)
    return Inventory(tuple(devices), absent, tuple(_fits(devices, absent)))


def _processor() -> Device:
    name = platform.processor() or platform.machine()
    try:
        from tvm.target.codegen import llvm_get_system_cpu

        name = f"{platform.machine()} ({llvm_get_system_cpu()})"
    except ImportError:  # TVM's runtime alone
        pass
    asked = {feature for target in targets.read_all() for feature in target.features}
    return Device("cpu", name, None, tuple(sorted(cpu_features() & asked)), {"cores": usable_cores()})


def _cuda_devices() -> list[Device]:
    import tvm

    if reason := cuda.obstacle(0):
        raise DeviceError(reason)
    found: list[Device] = []
    while (device := tvm.runtime.device("cuda", len(found))).exist:
        limits = {
            "compute_capability": str(device.compute_version),
            "max_threads_per_block": device.max_threads_per_block,
            "max_shared_memory_bytes": cuda.shared_memory(len(found)) or device.max_shared_memory_per_block,
            "warp_size": device.warp_size,
            "multiprocessors": device.multi_processor_count,
            "l2_bytes": device.l2_cache_size_bytes,
            "memory_bytes": device.total_global_memory,
        }
        found.append(Device(f"cuda:{len(found)}", device.device_name, cuda.driver_version(), (), limits))
    return found


def _vulkan_devices() -> list[Device]:
    import tvm  # noqa: F401  (loads the libraries that the Vulkan runtime refers to)

    from tvm_attn import vulkan

    found = []
    for entry in vulkan.devices():
        features = tuple(name for name, present in entry.get("features", {}).items() if present)
        driver = f"{entry['driver']} {entry['driver_info']}" if "driver" in entry else None
        usable = entry["index"] is not None
        missing = tuple(entry["missing"]) if usable or entry["missing"] else ("chosen by TVM_ATTN_VULKAN_DEVICE",)
        device = f"vulkan:{entry['index']}" if usable else "vulkan"
        name = f"{entry['name']}, {entry['type']}, Vulkan {entry['api_version']}"
        found.append(Device(device, name, driver, features, entry.get("limits", {}), missing))
    if not any(device.missing == () for device in found):
        lacking = "; ".join(f"{device.name} lacks {', '.join(device.missing)}" for device in found)
        raise DeviceError(f"no usable Vulkan device: {lacking or 'the loader reports none'}")
    return sorted(found, key=lambda device: (bool(device.missing), device.device))


def obstacle(target: targets.GpuTarget, dtype: str = "float32", quant: str = "none") -> str | None:
    """Why the first device of a target's class does not run its code, in words; None where it does."""
    if reason := device_obstacle(target.device):
        return reason
    devices = _cuda_devices() if target.device == "cuda" else _vulkan_devices()
    device = next(device for device in devices if device.device == f"{target.device}:0")
    lacking = ", ".join(_gpu_lacks(target, device, dtype, quant))
    return f"{device.device} lacks {lacking}" if lacking else None


def _fits(devices: list[Device], absent: dict[str, str]) -> Iterator[Fit]:
    for target in targets.read_all():
        usable = [device for device in devices if device.kind == target.device and not device.missing]
        for device in usable:
            for dtype in target.dtypes:
                yield Fit(target.name, device.device, dtype, tuple(_lacking(target, device, dtype)))
        if not usable:
            for dtype in target.dtypes:
                yield Fit(target.name, target.device, dtype, (absent.get(target.device, "no such device"),))


def _lacking(target: targets.Target, device: Device, dtype: str) -> Iterator[str]:
    if isinstance(target, targets.GpuTarget):
        yield from _gpu_lacks(target, device, dtype, "none")
    elif target.architecture != platform.machine():
        yield f"architecture {target.architecture}"
    else:
        yield from (feature for feature in target.features if feature not in device.features)


def _gpu_lacks(target: targets.GpuTarget, device: Device, dtype: str, quant: str) -> Iterator[str]:
    threads = device.limits.get("max_workgroup_invocations", device.limits.get("max_threads_per_block", 0))
    if threads < target.max_threads:
        yield f"blocks of {target.max_threads} threads (has {threads})"
    shared = device.limits["max_shared_memory_bytes"]
    if shared < target.shared_bytes:
        yield f"{target.shared_bytes} bytes of shared memory (has {shared})"
    if isinstance(target, targets.CudaTarget):
        version = device.limits["compute_capability"]
        if cuda.code_rank(target.architectures, target.ptx, cuda.parse_capability(version)) is None:
            yield f"what runs {', '.join(target.architectures)} (has compute capability {version})"
        return
    smallest, largest = (device.limits[f"{end}_subgroup_size"] for end in ("min", "max"))
    if target.subgroup is not None and not smallest <= target.subgroup <= largest:
        yield f"subgroups of {target.subgroup} (has {smallest}{f' to {largest}' if largest > smallest else ''})"
    yield from sorted(vulkan_features(target, dtype, quant) - set(device.features))


def vulkan_features(target: targets.GpuTarget, dtype: str, quant: str) -> set[str]:
    """The features that a library of a Vulkan target needs, as its kernels will record them when they are compiled."""
    needs = set()
    if dtype == "float16" or quant != "none":  # a quantized matrix has float16 scales
        needs |= {"float16", "storage16"}
    if quant != "none":
        needs |= {"int8", "storage8"}
    if target.subgroup is not None:
        needs.add("subgroup_shuffle")
    if target.matrix is not None and dtype == "float16" and quant == "none":
        needs |= {"cooperative_matrix", "vulkan_memory_model"}
    return needs
