"""Vulkan devices, through `tvm_attn.vulkan`, the runtime that the TVM wheel lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tvm_attn.errors import DeviceError
from tvm_attn.runtime.devices.base import DeviceClass, Found, exists_in_tvm, lacks_of_block

if TYPE_CHECKING:
    from tvm_attn.targets import GpuTarget


class Vulkan(DeviceClass):
    """The devices that the Vulkan loader reports."""

    kind, dlpack = "vulkan", 7

    def find(self) -> list[Found]:
        """See `DeviceClass`."""
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
            found.append(Found(device, name, driver, features, entry.get("limits", {}), missing))
        if not any(device.missing == () for device in found):
            lacking = "; ".join(f"{device.name} lacks {', '.join(device.missing)}" for device in found)
            raise DeviceError(f"no usable Vulkan device: {lacking or 'the loader reports none'}")
        return sorted(found, key=lambda device: (bool(device.missing), device.device))

    def obstacle(self, index: int = 0) -> str | None:
        """See `DeviceClass`."""
        return exists_in_tvm("vulkan", index)

    def lacks(self, target: Any, device: Found, dtype: str, quant: str) -> Iterator[str]:
        """See `DeviceClass`."""
        limits = device.limits
        yield from lacks_of_block(target, limits["max_workgroup_invocations"], limits["max_shared_memory_bytes"])
        smallest, largest = (limits[f"{end}_subgroup_size"] for end in ("min", "max"))
        if target.subgroup is not None and not smallest <= target.subgroup <= largest:
            yield f"subgroups of {target.subgroup} (has {smallest}{f' to {largest}' if largest > smallest else ''})"
        yield from sorted(features_needed(target, dtype, quant) - set(device.features))

    def is_software(self, index: int = 0) -> bool:
        """See `DeviceClass`."""
        import tvm

        name = str(tvm.runtime.device("vulkan", index).device_name).lower()
        return "llvmpipe" in name or "swiftshader" in name

    def require(self, module: Any, index: int, name: str) -> None:
        """See `DeviceClass`; a launch would check the same."""
        from tvm_attn.vulkan import require_device

        require_device(module, index, name)


def features_needed(target: GpuTarget, dtype: str, quant: str) -> set[str]:
    """The features that a library for a Vulkan target needs: what its kernels will record when compiled."""
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


DEVICE_CLASS = Vulkan()
