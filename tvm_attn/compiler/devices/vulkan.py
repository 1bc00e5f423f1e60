"""Vulkan devices: TVM calls `tvm_attn.vulkan.codegen`, and the library holds the SPIR-V that it generates."""

from __future__ import annotations

from typing import Any

from tvm_attn.compiler.devices.base import Backend


class VulkanBackend(Backend):
    """Code from this project's own generator."""

    def tir_pipeline(self, target: Any) -> str:
        """See `Backend`; subgroup operations need passes of their own."""
        if target.subgroup is None:
            return "default"
        from tvm_attn.vulkan.codegen import pipeline

        pipeline.register()
        return pipeline.NAME


BACKEND = VulkanBackend()
