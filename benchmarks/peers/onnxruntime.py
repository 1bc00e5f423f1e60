"""ONNX Runtime: GPT-2 as an ONNX graph with its GroupQueryAttention, whose KV cache is updated in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.server import serve
from benchmarks.peers.weights import Weights
from tvm_attn.benchmark.system import CachedSystem, Case, Float32Array, Int32Array

_MAX_BATCH = 64
_DOMAIN = "com.microsoft"


class OnnxRuntimeSystem(CachedSystem):
    """An inference session over the given weights, with the caches bound as input and output at once."""

    def __init__(self, weights: Weights, precision: str, threads: int, scratch: Path) -> None:
        import onnxruntime

        self._onnxruntime = onnxruntime
        self.name, self.version, self.precision = "ONNX Runtime", onnxruntime.__version__, precision
        config = self._config = weights.config
        self.vocabulary = config.vocab_size
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = scratch / "model.onnx"
        _write_graph(weights, path)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._caches: list[Any] = []
        self._batch = 0

    def _reserve(self, batch: int) -> None:
        if batch == self._batch:
            return
        config = self._config
        shape = (batch, config.n_head, config.n_positions, config.head_dim)
        make = self._onnxruntime.OrtValue.ortvalue_from_numpy
        self._caches = [make(np.zeros(shape, np.float32)) for _ in range(2 * config.n_layer)]
        self._batch = batch

    def prefill(self, prompts: Int32Array) -> Float32Array:
        """See `CachedSystem.prefill`."""
        return self._run(prompts, 0)

    def decode(self, token_ids: Int32Array, context: int) -> Float32Array:
        """See `CachedSystem.decode`."""
        return self._run(token_ids[:, None], context)

    def _run(self, ids: Int32Array, start: int) -> Float32Array:
        batch, tokens = ids.shape
        self._reserve(batch)
        binding = self._session.io_binding()
        binding.bind_cpu_input("ids", ids.astype(np.int64))
        binding.bind_cpu_input("positions", np.arange(start, start + tokens, dtype=np.int64)[None])
        binding.bind_cpu_input("last", np.full(batch, start + tokens - 1, np.int32))
        binding.bind_cpu_input("total", np.array(start + tokens, np.int32))
        for index, cache in enumerate(self._caches):
            binding.bind_ortvalue_input(f"past.{index}", cache)
            binding.bind_ortvalue_output(f"present.{index}", cache)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        logits: Float32Array = binding.get_outputs()[-1].numpy()
        return logits.reshape(batch, self.vocabulary)

    def numpy(self, logits: Float32Array) -> Float32Array:
        """See `CachedSystem.numpy`."""
        return logits

    def supports(self, case: Case) -> bool:
        """See `System.supports`."""
        return case.batch <= _MAX_BATCH


def _write_graph(weights: Weights, path: Path) -> None:
    """Writes GPT-2 as ONNX: ids (B, T), positions (1, T), last (B,), total () and the caches -> logits (B, 1, V)."""
    import onnx
    from onnx import TensorProto, helper

    config, nodes, tensors = weights.config, [], []

    def constant(name: str, array: np.ndarray) -> str:
        raw = np.ascontiguousarray(array)
        kind = helper.np_dtype_to_tensor_dtype(raw.dtype)
        tensors.append(helper.make_tensor(name, kind, raw.shape, raw.tobytes(), raw=True))
        return name

    def node(operator: str, inputs: list[str], output: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output, *outputs], name=output, **attributes))
        return output

    def norm(x: str, name: str) -> str:
        scale, bias = (constant(f"{name}.{part}", weights.read(f"{name}.{part}")) for part in ("weight", "bias"))
        return node("LayerNormalization", [x, scale, bias], f"{name}.out", axis=-1, epsilon=config.layer_norm_epsilon)

    def linear(x: str, name: str) -> str:
        product = node("MatMul", [x, constant(f"{name}.weight", weights.read(f"{name}.weight"))], f"{name}.product")
        return node("Add", [product, constant(f"{name}.bias", weights.read(f"{name}.bias"))], f"{name}.out")

    table = constant("wte.weight", weights.read("wte.weight"))
    token = node("Gather", [table, "ids"], "token")
    position = node("Gather", [constant("wpe.weight", weights.read("wpe.weight")), "positions"], "position")
    x = node("Add", [token, position], "embedding")
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        past, present = ([f"{kind}.{2 * layer + part}" for part in (0, 1)] for kind in ("past", "present"))
        attended = node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "last", "total"],
            f"{name}.attn.out",
            tuple(present),
            domain=_DOMAIN,
            num_heads=config.n_head,
            kv_num_heads=config.n_head,
            scale=config.attention_scale(layer),
        )
        x = node("Add", [linear(attended, f"{name}.attn.c_proj"), x], f"{name}.attn.residual")
        hidden = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        active = _activation(config.activation_function, hidden, f"{name}.mlp.act", node)
        x = node("Add", [linear(active, f"{name}.mlp.c_proj"), x], f"{name}.out")
    final = node("Slice", [x, *(constant(f"slice.{i}", np.array([v])) for i, v in enumerate((-1, 2**31, 1)))], "final")
    head = constant("head", np.ascontiguousarray(weights.read(weights.head).T))
    node("MatMul", [norm(final, "ln_f"), head], "logits")

    cache: list[str | int] = ["batch", config.n_head, config.n_positions, config.head_dim]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("positions", TensorProto.INT64, [1, "tokens"]),
        helper.make_tensor_value_info("last", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
    ]
    outputs = []
    for index in range(2 * config.n_layer):
        inputs.append(helper.make_tensor_value_info(f"past.{index}", TensorProto.FLOAT, cache))
        outputs.append(helper.make_tensor_value_info(f"present.{index}", TensorProto.FLOAT, cache))
    outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, config.vocab_size]))
    graph = helper.make_graph(nodes, "gpt2", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    # Protocol buffers are limited to 2 GiB, so the weights are in a separate file.
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights.bin")


def _activation(function: str, x: str, name: str, node: Any) -> str:
    if function == "silu":
        return str(node("Mul", [x, node("Sigmoid", [x], f"{name}.sigmoid")], name))
    operators: dict[str, tuple[str, dict[str, str]]] = {
        "gelu_new": ("Gelu", {"approximate": "tanh"}),
        "gelu": ("Gelu", {"approximate": "none"}),
        "relu": ("Relu", {}),
        "tanh": ("Tanh", {}),
    }
    operator, attributes = operators[function]
    return str(node(operator, [x], name, **attributes))


if __name__ == "__main__":
    serve("onnxruntime", OnnxRuntimeSystem)
