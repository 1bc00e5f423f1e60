"""NVIDIA GPUs: machine code for several architectures, made by nvcc or NVRTC on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_attn.compiler import cuda_module
from tvm_attn.compiler.cuda import compile_fatbin, find_compiler
from tvm_attn.compiler.devices.base import Backend
from tvm_attn.config import GPT2Config
from tvm_attn.model.layout import Layout


class CudaBackend(Backend):
    """CUDA C that TVM generates, compiled by NVIDIA's compiler."""

    def layout(self, config: GPT2Config, target: Any, dtype: str, quant: str) -> Layout:
        """See `Backend`; 16-bit dtypes use tensor cores, which take matrices as they are stored."""
        layout = super().layout(config, target, dtype, quant)
        return layout if dtype == "float32" else replace(layout, columns=1, group_kernels=True, activations=dtype)

    def tir_pipeline(self, target: Any) -> str:
        """See `Backend`."""
        cuda_module.register_pipeline()
        return cuda_module.PIPELINE

    def check(self, target: Any) -> None:
        """See `Backend`."""
        find_compiler(target.images)

    def link(
        self, build: Callable[[], Any], target: Any, library: Path, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """See `Backend`; machine code replaces the CUDA C."""
        with cuda_module.without_runtime():
            executable = build()
            progress(f"compiling for {target.name}: machine code for {', '.join(target.images)}")
            fatbin = compile_fatbin(cuda_module.device_source(getattr(executable, "mod", executable)), target.images)
            cuda_module.export_library(executable, library, fatbin)


BACKEND = CudaBackend()
