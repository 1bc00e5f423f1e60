"""What a device class decides when a library is made for it. Its kernels' templates are in the target's `KERNELS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm

from tvm_attn.config import GPT2Config
from tvm_attn.errors import TargetError, one_line
from tvm_attn.model.layout import Layout


class Backend:
    """A device class in the compiler. The defaults are those of a GPU whose code TVM generates and links by itself."""

    def layout(self, config: GPT2Config, target: Any, dtype: str, quant: str) -> Layout:
        """How the library holds a model of a storage dtype and quantization."""
        weights = dtype if quant == "none" else quant
        return Layout(target.tile_rows, target.tile_columns, dtype, weights, fuse_layers=False, group_kernels=False)

    def host(self, target: Any) -> dict[str, str] | None:
        """The TVM target of the processor that starts the kernels; None where that is the device itself."""
        return {"kind": "llvm", "mtriple": f"{target.architecture}-linux-gnu"}

    def tvm_target(self, target: Any) -> tvm.target.Target:
        """The TVM target, with its host.

        Raises:
            TargetError: TVM does not know what the target's file says.
        """
        host = self.host(target)
        try:
            return tvm.target.Target(target.tvm, *([] if host is None else [host]))
        except Exception as error:
            raise TargetError(f"targets/{target.name}.toml: TVM refuses the table tvm: {one_line(error)}") from error

    def tir_pipeline(self, target: Any) -> str:
        """The name of the passes that lower kernels, which TVM knows after this call."""
        return "default"

    def check(self, target: Any) -> None:
        """Looks for the tools that are needed beside TVM and a C++ compiler.

        Raises:
            CompileError: one is missing.
        """

    def link(
        self, build: Callable[[], Any], target: Any, library: Path, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """Generates code and writes the shared library.

        Args:
            build: lowers the program and gives TVM's executable.
            target: as everywhere.
            library: where the library goes.
            progress: told what happens next, where that takes long.
        """
        build().export_library(str(library))
