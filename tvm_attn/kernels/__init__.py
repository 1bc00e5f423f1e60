"""GPT-2's kernels: what each computes, one family a file; how, by device class in `cpu`, `gpu` and `cuda`.

A family's file holds its dataclasses, their float64 references and their cases. The loops and templates of a device
class are in the file of the same name in that class's folder; `unscheduled` has the TensorIR that several device
classes schedule.

Shape letters: g = row groups (symbolic), R = rows of a group, E = n_embd, H = heads, D = head_dim, P = n_positions,
V = vocabulary, K/N = input/output features of a linear layer, C = columns of a packed weight strip, S = KV-cache slots.

Rows (tokens) come in groups of R: an activation is (g, R, E). A register tile of R rows is then a static loop and needs
no predicate, whatever the number of tokens; the caller pads with rows whose position is -1, and those write nothing to
the KV cache.
"""

from tvm_attn.kernels.attention_operator import AttentionOperator, AttentionScores
from tvm_attn.kernels.attention_weights import AttentionWeights
from tvm_attn.kernels.base import Case, Kernel
from tvm_attn.kernels.cache_write import CacheWrite
from tvm_attn.kernels.decode_attention import DecodeAttention
from tvm_attn.kernels.embedding import Embedding, GatherRows
from tvm_attn.kernels.linear import Head, Linear, LinearKernel, QKVLinear, ResidualLinear
from tvm_attn.kernels.logprobs import ExpSums, TopLogits
from tvm_attn.kernels.norm import LayerNorm
from tvm_attn.kernels.prefill_attention import PrefillAttention
from tvm_attn.kernels.quant import PackPairs, QuantizeRows
from tvm_attn.kernels.sampling import Advance, Argmax
from tvm_attn.kernels.weights import PackPlain, PackWords

FAMILIES: tuple[type[Kernel], ...] = (
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
    CacheWrite,
    AttentionWeights,
    AttentionOperator,
    AttentionScores,
    Argmax,
    Advance,
    ExpSums,
    TopLogits,
)

__all__ = [
    "FAMILIES",
    "Advance",
    "Argmax",
    "AttentionOperator",
    "AttentionScores",
    "AttentionWeights",
    "CacheWrite",
    "Case",
    "DecodeAttention",
    "Embedding",
    "ExpSums",
    "GatherRows",
    "Head",
    "Kernel",
    "LayerNorm",
    "Linear",
    "LinearKernel",
    "PackPairs",
    "PackPlain",
    "PackWords",
    "PrefillAttention",
    "QKVLinear",
    "QuantizeRows",
    "ResidualLinear",
    "TopLogits",
]
