"""Processors: a decode layer is one kernel, and bfloat16 matrices are pairs if the processor can multiply pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm

from tvm_attn.compiler.devices.base import Backend
from tvm_attn.compiler.processors import unknown
from tvm_attn.compiler.threads import export_with_threads
from tvm_attn.config import GPT2Config
from tvm_attn.errors import TargetError
from tvm_attn.kernels.cpu.dot import BFLOAT16, find_dot
from tvm_attn.model.layout import Layout


class CpuBackend(Backend):
    """Code of LLVM, with threads of its own."""

    def layout(self, config: GPT2Config, target: Any, dtype: str, quant: str) -> Layout:
        """See `Backend`."""
        layout = replace(super().layout(config, target, dtype, quant), fuse_layers=True, group_kernels=True)
        even = config.n_embd % 2 == 0 and config.n_inner % 2 == 0
        if layout.weights == "bfloat16" and find_dot(BFLOAT16, target) and even:
            return replace(layout, weights="bfloat16_pairs")
        return layout

    def link(
        self, build: Callable[[], Any], target: Any, library: Path, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """See `Backend`."""
        export_with_threads(build(), library, target.architecture)

    def tvm_target(self, target: Any) -> tvm.target.Target:
        """See `Backend`."""
        found = super().tvm_target(target)
        if refusal := unknown(target.tvm):
            raise TargetError(f"{target.place}: {refusal}")
        return found

    def host(self, target: Any) -> dict[str, str] | None:
        """None: the processor is the device."""
        return None


BACKEND = CpuBackend()
