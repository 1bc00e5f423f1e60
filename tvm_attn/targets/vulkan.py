"""Vulkan devices."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_attn.targets.gpu import GpuTarget


@dataclass(frozen=True)
class VulkanTarget(GpuTarget):
    """Devices with a Vulkan 1.3 driver."""

    TVM_KIND = "vulkan"


TARGET_CLASS = VulkanTarget
