"""Processors: a decode layer is one kernel, and bfloat16 matrices are pairs if the processor can multiply pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm_attn.compiler.devices.base import Backend
from tvm_attn.config import GPT2Config
from tvm_attn.model.layout import Layout


class CpuBackend(Backend):
    """Code that LLVM generates."""

    def layout(self, config: GPT2Config, target: Any, dtype: str, quant: str) -> Layout:
        """See `Backend`."""
        layout = replace(super().layout(config, target, dtype, quant), fuse_layers=True, group_kernels=True)
        even = config.n_embd % 2 == 0 and config.n_inner % 2 == 0
        if layout.weights == "bfloat16" and "avx512_bf16" in target.features and even:
            return replace(layout, weights="bfloat16_pairs")
        return layout

    def host(self, target: Any) -> dict[str, str] | None:
        """None: the processor is the device."""
        return None


BACKEND = CpuBackend()
