"""OpenVINO: GPT-2 with ScaledDotProductAttention over a KV cache in state variables, which its CPU plug-in fuses."""

# mypy: disable-error-code="import-not-found, import-untyped"
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.server import serve
from benchmarks.peers.weights import Weights
from tvm_attn.benchmark.system import CachedSystem, Float32Array, Int32Array

_GROWTH = 16
"""Most tokens by which a decode case's context may grow."""


class OpenVinoSystem(CachedSystem):
    """A compiled model over the given weights, with its cache in the infer request."""

    def __init__(self, weights: Weights, precision: str, threads: int, scratch: Path) -> None:
        import openvino

        self.name, self.precision = "OpenVINO", precision
        self.version = openvino.get_version().split("-")[0]
        self.vocabulary = weights.config.vocab_size
        hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": hint,
            "KV_CACHE_PRECISION": hint,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._request = openvino.Core().compile_model(_model(weights), "CPU", properties).create_infer_request()
        self._length, self._positions = 0, weights.config.n_positions

    def prefill(self, prompts: Int32Array) -> Float32Array:
        """See `CachedSystem.prefill`."""
        self._request.reset_state()
        self._length = 0
        return self._run(prompts)

    def decode(self, token_ids: Int32Array, context: int) -> Float32Array:
        """See `CachedSystem.decode`; the position is the cache's next one, see `rewind`."""
        return self._run(token_ids[:, None])

    def _run(self, ids: Int32Array) -> Float32Array:
        batch, tokens = ids.shape
        inputs = {
            "ids": ids.astype(np.int64),
            "positions": np.arange(self._length, self._length + tokens, dtype=np.int64)[None],
            "beams": np.arange(batch, dtype=np.int32),
        }
        self._request.infer(inputs, share_inputs=True)
        self._length += tokens
        logits: Float32Array = self._request.get_output_tensor(0).data
        return logits.reshape(batch, self.vocabulary)

    def numpy(self, logits: Float32Array) -> Float32Array:
        """See `CachedSystem.numpy`."""
        return logits

    def rewind(self, context: int) -> None:
        """See `CachedSystem.rewind`. Changing the state slows the next call, so a few more tokens are allowed first."""
        import openvino

        if self._length < min(context + _GROWTH, self._positions):
            return
        for state in self._request.query_state():
            state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :context]))
        self._length = context


def _model(weights: Weights) -> Any:
    """GPT-2 as an OpenVINO model: ids (B, T), positions (1, T), beams (B,) -> logits (B, 1, V)."""
    import openvino
    from openvino import PartialShape, opset15
    from openvino.op.util import Variable, VariableInfo

    config = weights.config
    ids, positions, beams = (
        opset15.parameter(shape, kind, name=name)
        for name, shape, kind in (
            ("ids", [-1, -1], np.int64),
            ("positions", [1, -1], np.int64),
            ("beams", [-1], np.int32),
        )
    )
    for parameter, name in ((ids, "ids"), (positions, "positions"), (beams, "beams")):
        parameter.output(0).set_names({name})
    assigns = []

    def constant(value: Any, kind: Any = np.int64) -> Any:
        return opset15.constant(np.asarray(value, kind))

    def linear(x: Any, name: str) -> Any:
        # (out, in) and transposed, as in models that are converted to OpenVINO.
        weight = opset15.constant(np.ascontiguousarray(weights.read(f"{name}.weight").T))
        product = opset15.matmul(x, weight, False, True)
        return opset15.add(product, opset15.constant(weights.read(f"{name}.bias")))

    def norm(x: Any, name: str) -> Any:
        normed = opset15.mvn(x, constant([-1]), True, config.layer_norm_epsilon, "INSIDE_SQRT")
        scaled = opset15.multiply(normed, opset15.constant(weights.read(f"{name}.weight")))
        return opset15.add(scaled, opset15.constant(weights.read(f"{name}.bias")))

    def heads(x: Any) -> Any:
        """(B, T, E) -> (B, H, T, D)."""
        split = opset15.reshape(x, constant([0, 0, config.n_head, config.head_dim]), True)
        return opset15.transpose(split, constant([0, 2, 1, 3]))

    def cached(x: Any, name: str, batch: Any) -> Any:
        """The cache followed by x."""
        shape = [-1, config.n_head, -1, config.head_dim]
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = PartialShape(shape), openvino.Type.f32, name
        variable = Variable(info)
        empty = opset15.concat([batch, constant([config.n_head, 0, config.head_dim])], 0)
        past = opset15.read_value(opset15.broadcast(constant(0, np.float32), empty), variable)
        whole = opset15.concat([opset15.gather(past, beams, constant(0)), x], 2)
        assigns.append(opset15.assign(whole, variable))
        return whole

    batch = opset15.gather(opset15.shape_of(ids), constant([0]), constant(0))
    table = opset15.constant(weights.read("wte.weight"))
    wpe = opset15.constant(weights.read("wpe.weight"))
    x = opset15.add(opset15.gather(table, ids, constant(0)), opset15.gather(wpe, positions, constant(0)))
    mask = _causal_mask(x, positions, constant)
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = (heads(part) for part in opset15.split(qkv, constant(2), 3).outputs())
        keys, values = cached(k, f"{name}.key", batch), cached(v, f"{name}.value", batch)
        scale = constant(config.attention_scale(layer), np.float32)
        attended = opset15.scaled_dot_product_attention(q, keys, values, mask, scale)
        merged = opset15.reshape(
            opset15.transpose(attended, constant([0, 2, 1, 3])), constant([0, 0, config.n_embd]), True
        )
        x = opset15.add(x, linear(merged, f"{name}.attn.c_proj"))
        hidden = _activation(config.activation_function, linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        x = opset15.add(x, linear(hidden, f"{name}.mlp.c_proj"))
    last = opset15.slice(x, constant([-1]), constant([2**31 - 1]), constant([1]), constant([1]))
    head = table if config.tie_word_embeddings else opset15.constant(weights.read(weights.head))
    logits = opset15.matmul(norm(last, "ln_f"), head, False, True)
    return openvino.Model([opset15.result(logits)], assigns, [ids, positions, beams], "gpt2")


def _causal_mask(x: Any, positions: Any, constant: Any) -> Any:
    """(1, 1, T, P): 0 if a key's position is at most the query's, otherwise very low; P keys, up to the last query."""
    from openvino import opset15

    queries = opset15.reshape(positions, constant([1, 1, -1, 1]), False)
    end = opset15.add(opset15.reduce_max(positions, constant([0, 1])), constant(1))
    keys = opset15.range(constant(0), end, constant(1), "i64")
    seen = opset15.less_equal(keys, queries)
    return opset15.select(seen, constant(0, np.float32), constant(np.finfo(np.float32).min, np.float32))


def _activation(function: str, x: Any) -> Any:
    from openvino import opset15

    if function == "silu":
        return opset15.multiply(x, opset15.sigmoid(x))
    if function in ("gelu_new", "gelu"):
        return opset15.gelu(x, "TANH" if function == "gelu_new" else "ERF")
    return {"relu": opset15.relu, "tanh": opset15.tanh}[function](x)


if __name__ == "__main__":
    serve("openvino", OpenVinoSystem)
