"""How a library holds its tensors: a property of the model, the target and the storage dtype."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_attn.config import GPT2Config
from tvm_attn.errors import ConfigError, TargetError
from tvm_attn.storage import CACHE_WORD, KV_DTYPES, QUANTIZATIONS
from tvm_attn.targets import Target


@dataclass(frozen=True)
class Layout:
    """The layout of activations and weights in memory.

    Attributes:
        rows: R, the rows per group.
        columns: C, the widest strip of packed columns, a power of two.
        dtype: storage dtype of the position table, and of the KV cache if `kv` is None: float32, float16 or bfloat16.
        weights: format of the other matrices, see `tvm_attn.kernels.weights`.
        fuse_layers: whether a layer of decode is one kernel, see `tvm_attn.compiler.fusion`.
        group_kernels: whether decode has its own kernels for one group of rows.
        activations: dtype of the values between a layer's kernels: float32, or `dtype` on tensor cores, where C is 1.
            The residual stream and the logits are always float32.
        kv: "int8" for a KV cache in 8 bits, else None.
    """

    rows: int
    columns: int
    dtype: str
    weights: str
    fuse_layers: bool
    group_kernels: bool
    activations: str = "float32"
    kv: str | None = None

    @property
    def cache(self) -> str:
        """The dtype of the KV cache: `dtype` or int8."""
        return self.kv or self.dtype

    @property
    def tensor_cores(self) -> bool:
        """Whether activations have a dtype that tensor cores multiply."""
        return self.activations != "float32"

    def whole_groups(self, rows: int) -> int:
        """`rows` rounded up to whole row groups."""
        return -(-rows // self.rows) * self.rows

    @property
    def quantization(self) -> str:
        """The quantization of the weights, by its name in an artifact: none, int8 or int4."""
        return self.weights if self.weights in ("int8", "int4") else "none"


def check_types(target: Target, dtype: str, quant: str, kv: str | None = None) -> None:
    """Checks that a target supports a storage dtype and a dtype of the KV cache, and that the quantization exists.

    Raises:
        TargetError: one of them is not available.
    """
    if dtype not in target.dtypes:
        raise TargetError(f"dtype {dtype!r} is not available for {target.name}; available: {', '.join(target.dtypes)}")
    if quant not in QUANTIZATIONS:
        raise TargetError(f"quantization {quant!r} is not available; available: {', '.join(QUANTIZATIONS)}")
    if kv not in (None, *KV_DTYPES):
        raise TargetError(f"a KV cache in {kv!r} is not available; available: {', '.join(KV_DTYPES)}, or the dtype")
    if kv is not None and not target.QUANTIZED_CACHE:
        raise TargetError(f"a KV cache in {kv} is not available for {target.name}; build without --kv")


def check_cache(config: GPT2Config, kv: str | None) -> None:
    """Checks that a model's keys and values can be quantized.

    Raises:
        ConfigError: its heads have another number of dimensions than whole words.
    """
    if kv is not None and config.head_dim % CACHE_WORD:
        raise ConfigError(
            f"--kv {kv} needs heads in multiples of {CACHE_WORD} dimensions; these have {config.head_dim}"
        )
