"""What is computed: GPT-2's kernels in TensorIR, one family a file.

Shape letters: g = row groups (symbolic), R = rows of a group, E = n_embd, H = heads, D = head_dim, P = n_positions,
V = vocabulary, K/N = input/output features of a linear layer, C = columns of a packed weight strip, S = KV-cache slots.

Rows (tokens) come in groups of R: an activation is (g, R, E). A register tile of R rows is then a static loop and needs
no predicate, whatever the number of tokens; the caller pads with rows whose position is -1, and those write nothing to
the KV cache.
"""

from tvm_attn.kernels.base import Case, Kernel, PortableKernel
from tvm_attn.kernels.decode_attention import DecodeAttention
from tvm_attn.kernels.embedding import Embedding, GatherRows
from tvm_attn.kernels.matmul import Head, Linear, QKVLinear, ResidualLinear
from tvm_attn.kernels.norm import LayerNorm
from tvm_attn.kernels.prefill_attention import PrefillAttention
from tvm_attn.kernels.quant import PackPairs, QuantizeRows
from tvm_attn.kernels.sampling import Argmax
from tvm_attn.kernels.weights import PackPlain, PackWords

FAMILIES: tuple[type[PortableKernel], ...] = (
    Embedding,
    GatherRows,
    LayerNorm,
    Linear,
    ResidualLinear,
    QKVLinear,
    Head,
    PackPairs,
    QuantizeRows,
    PackPlain,
    PackWords,
    PrefillAttention,
    DecodeAttention,
    Argmax,
)

__all__ = [
    "FAMILIES",
    "Argmax",
    "Case",
    "DecodeAttention",
    "Embedding",
    "GatherRows",
    "Head",
    "Kernel",
    "LayerNorm",
    "Linear",
    "PackPairs",
    "PackPlain",
    "PackWords",
    "PortableKernel",
    "PrefillAttention",
    "QKVLinear",
    "QuantizeRows",
    "ResidualLinear",
]
