"""Vulkan devices: SPIR-V of `tvm_attn.vulkan.codegen`, which TVM calls, inside the library."""

from __future__ import annotations

from typing import Any

from tvm_attn.compiler.devices.base import Backend


class VulkanBackend(Backend):
    """Code of this project's own generator."""

    def tir_pipeline(self, target: Any) -> str:
        """See `Backend`; where subgroups may be used they need passes of their own."""
        if target.subgroup is None:
            return "default"
        from tvm_attn.vulkan.codegen import pipeline

        pipeline.register()
        return pipeline.NAME


BACKEND = VulkanBackend()
