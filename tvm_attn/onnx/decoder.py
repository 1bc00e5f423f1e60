"""GPT-2 as an ONNX graph.

Names and shapes of the inputs and outputs are those of Optimum's text generation, which ONNX Runtime's clients know:

| input | shape | |
|---|---|---|
| input_ids | (batch_size, sequence_length) int64 | |
| attention_mask | (batch_size, past_sequence_length + sequence_length) int64 | 0 for padding, which may be anywhere |
| position_ids | (batch_size, sequence_length) int64 | less than n_positions |
| past_key_values.I.key, .value | (batch_size, n_head, past_sequence_length, head_dim) | of block I; may be empty |

| output | shape | |
|---|---|---|
| logits | (batch_size, sequence_length, vocab_size) | |
| present.I.key, .value | (batch_size, n_head, past_sequence_length + sequence_length, head_dim) | past and new |

From opset 23 on attention is the operator `Attention`, before it is decomposed; `Gelu` exists from opset 20 on. Weights
are the canonical parameters under their names. Where the graph computes with 16 bits, vectors are stored in float32, as
in an artifact, and cast in the graph; LayerNorm and softmax are computed in float32.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import numpy as np

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.onnx import require_onnx
from tvm_attn.storage import numpy_dtype

OPSETS = range(18, 25)
"""Versions of the operators that a graph can be written for."""
_ATTENTION, _GELU = 23, 20  # the first versions with these operators


def decoder_graph(config: GPT2Config, dtype: str, opset: int) -> Any:
    """GPT-2 as a GraphProto without its weights: the caller adds the canonical parameters as initializers.

    Args:
        config: the hyperparameters.
        dtype: of the matrices and of everything that is computed: "float32", "float16" or "bfloat16".
        opset: a version in `OPSETS`.
    """
    return _Decoder(config, dtype, opset).graph()


class _Decoder:
    """Writes the nodes. A method appends nodes, and returns the names of their results."""

    def __init__(self, config: GPT2Config, dtype: str, opset: int) -> None:
        self._helper = require_onnx().helper
        self._config, self._opset, self._dtype = config, opset, numpy_dtype(dtype)
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._type: int = self._helper.np_dtype_to_tensor_dtype(self._dtype)

    def graph(self) -> Any:
        config, value, type_ = self._config, self._helper.make_tensor_value_info, self._type
        new, past = "sequence_length", "past_sequence_length"
        both, int64 = f"{past} + {new}", self._helper.np_dtype_to_tensor_dtype(np.dtype("int64"))
        inputs = [
            value("input_ids", int64, ["batch_size", new]),
            value("attention_mask", int64, ["batch_size", both]),
            value("position_ids", int64, ["batch_size", new]),
        ]
        outputs = [value("logits", type_, ["batch_size", new, config.vocab_size])]
        for layer in range(config.n_layer):
            for kind in ("key", "value"):
                shape = ["batch_size", config.n_head, past, config.head_dim]
                inputs.append(value(f"past_key_values.{layer}.{kind}", type_, shape))
                outputs.append(value(f"present.{layer}.{kind}", type_, [*shape[:2], both, shape[3]]))
        self._forward()
        return self._helper.make_graph(self._nodes, "gpt2", inputs, outputs, list(self._constants.values()))

    def _forward(self) -> None:
        config = self._config
        tokens = self._node("Gather", "wte.weight", "input_ids")
        x = self._node("Add", tokens, self._node("Gather", "wpe.weight", "position_ids"))
        mask = self._mask()
        for layer in range(config.n_layer):
            block = f"h.{layer}"
            x = self._node("Add", x, self._attention(self._layer_norm(x, f"{block}.ln_1"), layer, mask))
            inner = self._activation(self._linear(self._layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            x = self._node("Add", x, self._linear(inner, f"{block}.mlp.c_proj"))
        head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        x = self._layer_norm(x, "ln_f")
        self._node("MatMul", x, self._node("Transpose", head, perm=[1, 0]), to="logits")

    def _mask(self) -> str:
        """What each token sees, bool (batch_size, 1, sequence_length, past_sequence_length + sequence_length).

        The mask is explicit because the meaning of the attribute `is_causal` with past keys has changed between
        releases of ONNX. Every token sees itself, also padding, so no row of the softmax is empty.
        """
        zero, one = (self._constant(np.array(number, np.int64)) for number in (0, 1))
        past = self._node("Squeeze", self._node("Shape", "past_key_values.0.key", start=2, end=3))
        new = self._node("Squeeze", self._node("Shape", "input_ids", start=1, end=2))
        both = self._node("Add", past, new)
        rows = self._node("Range", past, both, one)
        rows = self._node("Unsqueeze", rows, self._constant(np.array([1], np.int64)))
        columns = self._node("Range", zero, both, one)
        causal, itself = self._node("LessOrEqual", columns, rows), self._node("Equal", columns, rows)
        padding = self._node("Equal", "attention_mask", zero)
        tokens = self._node("Unsqueeze", self._node("Not", padding), self._constant(np.array([1, 2], np.int64)))
        return self._node("And", causal, self._node("Or", tokens, itself))

    def _attention(self, x: str, layer: int, mask: str) -> str:
        """Causal self-attention of one block, (batch_size, sequence_length, n_embd) to the same."""
        config, kinds = self._config, ("key", "value")
        past, present = ([f"{name}.{layer}.{kind}" for kind in kinds] for name in ("past_key_values", "present"))
        joined = self._linear(x, f"h.{layer}.attn.c_attn")
        q, k, v = (f"{joined}.{part}" for part in "qkv")
        self._append("Split", [joined], [q, k, v], axis=2, num_outputs=3)
        scale = config.attention_scale(layer)
        if self._opset >= _ATTENTION:
            y = f"h.{layer}.attn"
            heads = {"q_num_heads": config.n_head, "kv_num_heads": config.n_head}
            softmax = {"softmax_precision": 1}  # float32
            self._append("Attention", [q, k, v, mask, *past], [y, *present], scale=scale, **heads, **softmax)
        else:
            y = self._decomposed(q, k, v, mask, past, present, scale)
        return self._linear(y, f"h.{layer}.attn.c_proj")

    def _decomposed(self, q: str, k: str, v: str, mask: str, past: list[str], present: list[str], scale: float) -> str:
        q, k, v = (self._heads(part) for part in (q, k, v))
        for new, old, both in zip((k, v), past, present, strict=True):
            self._node("Concat", old, new, axis=2, to=both)
        # Scaled before the product, which float16 could not hold otherwise.
        q = self._node("Mul", q, self._constant(np.array(scale, self._dtype)))
        scores = self._float32(self._node("MatMul", q, self._node("Transpose", present[0], perm=[0, 1, 3, 2])))
        least = self._constant(np.array(np.finfo(np.float32).min))
        weights = self._node("Softmax", self._node("Where", mask, scores, least), axis=3)
        y = self._node("MatMul", self._narrow(weights), present[1])
        return self._reshape(self._node("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, self._config.n_embd)

    def _heads(self, x: str) -> str:
        """(batch_size, sequence_length, n_embd) to (batch_size, n_head, sequence_length, head_dim)."""
        split = self._reshape(x, 0, 0, self._config.n_head, self._config.head_dim)
        return self._node("Transpose", split, perm=[0, 2, 1, 3])

    def _reshape(self, x: str, *shape: int) -> str:
        """A reshape in which 0 keeps a dimension."""
        return self._node("Reshape", x, self._constant(np.array(shape, np.int64)))

    def _linear(self, x: str, name: str) -> str:
        return self._node("Add", self._node("MatMul", x, f"{name}.weight"), self._narrow(f"{name}.bias"))

    def _layer_norm(self, x: str, name: str) -> str:
        weight, bias = (self._narrow(f"{name}.{part}") for part in ("weight", "bias"))
        return self._node("LayerNormalization", x, weight, bias, axis=-1, epsilon=self._config.layer_norm_epsilon)

    def _activation(self, x: str) -> str:
        name = self._config.activation_function
        if name in ("gelu", "gelu_new"):
            return self._gelu(x, tanh=name == "gelu_new")
        if name == "silu":
            return self._node("Mul", x, self._node("Sigmoid", x))
        return self._node({"relu": "Relu", "tanh": "Tanh"}[name], x)

    def _gelu(self, x: str, tanh: bool) -> str:
        """GELU (Hendrycks and Gimpel, arXiv:1606.08415), with the error function or its approximation by tanh."""
        if self._opset >= _GELU:
            return self._node("Gelu", x, approximate="tanh" if tanh else "none")
        half, one, cubic, root, width = (
            self._constant(np.array(number, self._dtype)) for number in (0.5, 1, 0.044715, sqrt(2 / pi), sqrt(0.5))
        )
        if tanh:
            cube = self._node("Mul", self._node("Mul", x, x), x)
            odd = self._node("Add", x, self._node("Mul", cube, cubic))
            share = self._node("Tanh", self._node("Mul", odd, root))
        else:
            share = self._node("Erf", self._node("Mul", x, width))
        return self._node("Mul", self._node("Mul", x, half), self._node("Add", share, one))

    def _float32(self, x: str) -> str:
        return x if self._dtype == np.float32 else self._node("Cast", x, to_type=np.dtype("float32"))

    def _narrow(self, x: str) -> str:
        """A float32 tensor in the graph's dtype."""
        return x if self._dtype == np.float32 else self._node("Cast", x, to_type=self._dtype)

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant.{array.dtype.name}.{array.tolist()}"
        if name not in self._constants:
            tensor = self._helper.np_dtype_to_tensor_dtype(array.dtype)
            self._constants[name] = self._helper.make_tensor(name, tensor, array.shape, array.tobytes(), raw=True)
        return name

    def _node(
        self, operator: str, *inputs: str, to: str | None = None, to_type: np.dtype | None = None, **attributes: Any
    ) -> str:
        """Appends a node with one output, and returns that output's name."""
        output = to or f"{operator.lower()}.{len(self._nodes)}"
        if to_type is not None:
            attributes["to"] = self._helper.np_dtype_to_tensor_dtype(to_type)
        self._append(operator, list(inputs), [output], **attributes)
        return output

    def _append(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self._nodes.append(self._helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))


def weight_types(config: GPT2Config, dtype: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the graph's weights, by name: matrices in `dtype`, vectors in float32."""
    return {
        name: (shape, numpy_dtype(dtype if len(shape) > 1 else "float32"))
        for name, shape in param_shapes(config).items()
    }
