"""What a device class decides when a library is built. Its templates are in the folder that `Target.KERNELS` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm

from tvm_attn.compiler.linker import linking
from tvm_attn.config import GPT2Config
from tvm_attn.errors import TargetError, one_line
from tvm_attn.model.layout import Layout


class Backend:
    """The compiler's side of a device class. The defaults suit a GPU whose code TVM generates and links by itself."""

    def layout(self, config: GPT2Config, target: Any, dtype: str, quant: str) -> Layout:
        """The layout of a model's tensors in the library, for a storage dtype and quantization."""
        weights = dtype if quant == "none" else quant
        return Layout(target.tile_rows, target.tile_columns, dtype, weights, fuse_layers=False, group_kernels=False)

    def host(self, target: Any) -> dict[str, str] | None:
        """The TVM target of the processor that starts the kernels; None if that is the device itself."""
        return {"kind": "llvm", "mtriple": f"{target.architecture}-linux-gnu"}

    def tvm_target(self, target: Any) -> tvm.target.Target:
        """The TVM target, with its host.

        Raises:
            TargetError: TVM rejects the table `tvm` of the target's file, or LLVM does not know what it names.
        """
        host = self.host(target)
        try:
            return tvm.target.Target(target.tvm, *([] if host is None else [host]))
        except Exception as error:
            raise TargetError(f"{target.place}: TVM refuses the table tvm: {one_line(error)}") from error

    def tir_pipeline(self, target: Any) -> str:
        """The name of the pipeline that lowers kernels; this call registers it with TVM."""
        return "default"

    def check(self, target: Any) -> None:
        """Looks for the tools that are needed in addition to TVM and a C++ compiler.

        Raises:
            CompileError: one is missing.
        """

    def link(
        self, build: Callable[[], Any], target: Any, library: Path, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """Generates code and writes the shared library.

        Args:
            build: lowers the program and returns TVM's executable, or lowers kernels and returns their module.
            target: the hardware.
            library: the path of the library.
            progress: called with a message before a step that takes long.
        """
        build().export_library(str(library), fcompile=linking(target.architecture))
