"""Kernels for NVIDIA GPUs with tensor cores (sm_80 and later), as TIRx functions.

A kernel here is, like its siblings in `tvm_attn.kernels`, a frozen dataclass of static sizes with a float64 reference
and cases. Its loops depend on its tiles, which `tvm_attn.schedule.cuda` chooses.
"""

from tvm_attn.kernels.base import Kernel
from tvm_attn.kernels.cuda.attention import DecodeAttention, PrefillAttention
from tvm_attn.kernels.cuda.linear import Head, Linear, QKVLinear, ResidualLinear
from tvm_attn.kernels.cuda.norm import LayerNorm
from tvm_attn.kernels.cuda.sampling import Advance

FAMILIES: tuple[type[Kernel], ...] = (
    LayerNorm,
    Linear,
    ResidualLinear,
    QKVLinear,
    Head,
    PrefillAttention,
    DecodeAttention,
    Advance,
)

__all__ = [
    "FAMILIES",
    "Advance",
    "DecodeAttention",
    "Head",
    "LayerNorm",
    "Linear",
    "PrefillAttention",
    "QKVLinear",
    "ResidualLinear",
]
