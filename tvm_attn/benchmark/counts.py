"""The work of a call: operations, and the least number of bytes that must be moved.

Letters are those of `tvm_attn.kernels`: E = n_embd, V = vocabulary, K/N = input/output features of a linear layer. A
multiply-add is two operations. Only matrix products and attention are counted, causally: row i of a prompt attends to
i + 1 keys. Norms, activations and softmax add less than one per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm_attn.config import GPT2Config

_FLOAT32 = 4
# Quantized weights have a float16 scale per 32 weights.
_WEIGHT_BYTES = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "bfloat16_pairs": 2.0,
    "int8": 1.0 + 2 / 32,
    "int4": 0.5 + 2 / 32,
}
# Bytes per input of a linear layer: quantized inputs have a float32 scale and correction per 32.
_INPUT_BYTES = {"bfloat16_pairs": 2.0, "int8": 1.0 + 8 / 32, "int4": 1.0 + 8 / 32}
_ARITHMETIC = {"bfloat16_pairs": "bfloat16", "int8": "int8", "int4": "int8"}


@dataclass(frozen=True)
class Storage:
    """How a library holds its numbers.

    Attributes:
        weights: format of the matrices, as `tvm_attn.kernels` names it.
        dtype: storage dtype of everything that is not quantized.
        cache: dtype of the KV cache.
    """

    weights: str
    dtype: str
    cache: str

    @property
    def weight_bytes(self) -> float:
        """Bytes per weight, including its share of a scale."""
        return _WEIGHT_BYTES[self.weights]

    @property
    def cache_bytes(self) -> float:
        """Bytes per element of the KV cache; in int8 a float32 scale for 64 values."""
        return _WEIGHT_BYTES[self.cache]

    @property
    def dtype_bytes(self) -> float:
        """Bytes per element of the position table."""
        return _WEIGHT_BYTES[self.dtype]

    @property
    def arithmetic(self) -> str:
        """The arithmetic of matrix products: "float32", or "bfloat16" or "int8" dot products."""
        return _ARITHMETIC.get(self.weights, "float32")


@dataclass(frozen=True)
class Work:
    """Work of a call: operations of matrix products and of attention, and bytes if everything is moved once."""

    products: int
    attention: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention, self.bytes + other.bytes)

    @property
    def flops(self) -> int:
        """All operations."""
        return self.products + self.attention


def _layer_weights(config: GPT2Config) -> int:
    """Elements of the four matrices of a layer."""
    width = config.n_embd
    return width * 3 * width + width * width + 2 * width * config.n_inner


def _vectors(config: GPT2Config) -> int:
    """Elements of all vectors: the biases of the four matrices and two norms a layer, and the last norm."""
    width = config.n_embd
    return config.n_layer * (3 * width + width + config.n_inner + width + 4 * width) + 2 * width


def _forward(
    config: GPT2Config, rows: int, last_rows: int, pairs: tuple[int, int], keys: int, storage: Storage
) -> Work:
    """A forward pass of `rows` tokens; for tokens without logits the last layer computes only keys and values.

    Args:
        config: the model.
        rows: tokens that pass through the layers.
        last_rows: tokens whose logits are computed.
        pairs: (query, key) pairs that attention looks at, in one of the other layers and in the last.
        keys: positions of all sequences whose keys and values are read or written.
        storage: how the library holds its numbers.
    """
    width, layers, weights = config.n_embd, config.n_layer, _layer_weights(config)
    keys_and_values = 2 * width * width
    products = 2 * rows * ((layers - 1) * weights + keys_and_values)
    products += 2 * last_rows * (weights - keys_and_values + width * config.vocab_size)
    attention = 4 * ((layers - 1) * pairs[0] + pairs[1]) * width
    # The head reads the whole token table; the embedding reads one row of each table per token.
    matrices = layers * weights + config.vocab_size * width + rows * width
    moved = matrices * storage.weight_bytes + rows * width * storage.dtype_bytes + _vectors(config) * _FLOAT32
    moved += layers * 2 * keys * width * storage.cache_bytes
    return Work(products, attention, round(moved))


def prefill_work(config: GPT2Config, tokens: int, storage: Storage) -> Work:
    """Work of a prompt of `tokens` tokens whose last logits are computed."""
    return _forward(config, tokens, 1, (tokens * (tokens + 1) // 2, tokens), tokens, storage)


def decode_work(config: GPT2Config, context: int, batch: int, storage: Storage) -> Work:
    """Work of one token for each of `batch` sequences that have `context` tokens in the KV cache."""
    keys = batch * (context + 1)
    return _forward(config, batch, batch, (keys, keys), keys, storage)


def kernel_work(
    kernel: Mapping[str, Any], rows: int, spans: Sequence[tuple[int, int]], storage: Storage
) -> Work | None:
    """Work of one call of a kernel.

    Args:
        kernel: its entry in the manifest: "family" and its static sizes.
        rows: rows that it computes, including padding.
        spans: for attention, the number of rows and the position of the first row of each sequence.
        storage: how the library holds its numbers.

    Returns:
        None if the family is not known here.
    """
    family = kernel["family"]
    if family in ("linear", "residual_linear", "qkv_linear", "head"):
        k, n = kernel["in_features"], kernel["out_features"]
        activations = _WEIGHT_BYTES[kernel.get("activations", "float32")]
        input_bytes = k * (_INPUT_BYTES.get(storage.weights, _FLOAT32) if activations == _FLOAT32 else activations)
        output_bytes = n * {"residual_linear": 2 * _FLOAT32, "head": _FLOAT32}.get(family, activations)
        return Work(2 * rows * k * n, 0, round(k * n * storage.weight_bytes + rows * (input_bytes + output_bytes)))
    if family in ("prefill_attention", "decode_attention"):
        width = kernel["heads"] * kernel["head_dim"]
        pairs = sum(count * first + count * (count + 1) // 2 for count, first in spans)
        keys = sum(first + count for count, first in spans)
        queries = sum(count for count, _ in spans)
        moved = round(
            2 * keys * width * storage.cache_bytes
            + 2 * queries * width * _WEIGHT_BYTES[kernel.get("activations", "float32")]
        )
        return Work(0, 4 * pairs * width, moved)
    if family == "attention_weights":
        keys = kernel["heads"] * rows
        return Work(0, keys * rows * kernel["head_dim"], keys * rows * _FLOAT32)
    bytes_of_row = {
        "layer_norm": lambda: 2 * kernel["width"] * _FLOAT32,
        "embedding": lambda: round(kernel["width"] * (storage.weight_bytes + storage.dtype_bytes + _FLOAT32)),
        "cache_write": lambda: round(kernel["heads"] * kernel["head_dim"] * (4 * _FLOAT32 + 2 * storage.cache_bytes)),
        "gather_rows": lambda: 2 * kernel["width"] * _FLOAT32,
        "pack_pairs": lambda: kernel["width"] * (_FLOAT32 + 2),
        "quantize_rows": lambda: round(kernel["width"] * (_FLOAT32 + _INPUT_BYTES[kernel["weights"]])),
        "advance": lambda: kernel["columns"] * _FLOAT32,
        "argmax": lambda: kernel["columns"] * _FLOAT32,
        "exp_sums": lambda: kernel["columns"] * _FLOAT32,
        "top_logits": lambda: kernel["columns"] * _FLOAT32,
    }
    return Work(0, 0, rows * bytes_of_row[family]()) if family in bytes_of_row else None
