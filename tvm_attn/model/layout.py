"""How a library holds its tensors: a property of the model, the target and the storage dtype."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_attn.config import GPT2Config
from tvm_attn.errors import TargetError
from tvm_attn.storage import QUANTIZATIONS
from tvm_attn.targets import CpuTarget, Target


@dataclass(frozen=True)
class Layout:
    """How activations and weights lie in memory.

    Attributes:
        rows: R, the rows of a group.
        columns: C, the widest strip of packed columns, a power of two.
        dtype: storage dtype of the KV cache and the position table: float32, float16 or bfloat16.
        weights: format of the other matrices, see `tvm_attn.kernels.weights`.
        fuse_layers: whether a layer of decode is one kernel, see `tvm_attn.compiler.fusion`.
        group_kernels: whether decode has kernels made for one group of rows.
        activations: dtype of what lies between a layer's kernels: float32, or on tensor cores `dtype`; then C is 1. The
            residual stream and the logits are float32 always.
    """

    rows: int
    columns: int
    dtype: str
    weights: str
    fuse_layers: bool
    group_kernels: bool
    activations: str = "float32"

    @property
    def tensor_cores(self) -> bool:
        """Whether activations are what tensor cores multiply."""
        return self.activations != "float32"

    def whole_groups(self, rows: int) -> int:
        """`rows` rounded up to whole row groups."""
        return -(-rows // self.rows) * self.rows

    @property
    def quantization(self) -> str:
        """That of the weights, as an artifact names it: none, int8 or int4."""
        return self.weights if self.weights in ("int8", "int4") else "none"


def check_types(target: Target, dtype: str, quant: str) -> None:
    """Checks that a target has a storage dtype, and that there is such a quantization.

    Raises:
        TargetError: one of them is not available.
    """
    if dtype not in target.dtypes:
        raise TargetError(f"dtype {dtype!r} is not available for {target.name}; available: {', '.join(target.dtypes)}")
    if quant not in QUANTIZATIONS:
        raise TargetError(f"quantization {quant!r} is not available; available: {', '.join(QUANTIZATIONS)}")


def layout_for(config: GPT2Config, target: Target, dtype: str, quant: str) -> Layout:
    """The layout of a model's library for a target."""
    rows, weights, on_cpu = target.tile_rows, _weight_format(config, target, dtype, quant), target.device == "cpu"
    if target.device == "cuda" and dtype != "float32":
        return Layout(rows, 1, dtype, weights, fuse_layers=False, group_kernels=True, activations=dtype)
    return Layout(rows, target.tile_columns, dtype, weights, fuse_layers=on_cpu, group_kernels=on_cpu)


def _weight_format(config: GPT2Config, target: Target, dtype: str, quant: str) -> str:
    """How a target's kernels take the matrices, see `tvm_attn.kernels.weights`."""
    if quant != "none":
        return quant
    native = isinstance(target, CpuTarget) and "avx512_bf16" in target.features
    even = config.n_embd % 2 == 0 and config.n_inner % 2 == 0
    return "bfloat16_pairs" if dtype == "bfloat16" and native and even else dtype
