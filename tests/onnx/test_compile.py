"""`tvm_attn.onnx.compile`: graphs of attention blocks against PyTorch, and what it refuses."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import tvm_attn.onnx
from tests.kernels.devices import vulkan_devices
from tests.onnx.test_export import SMALL, expected, run_in_steps, save_checkpoint, tokens
from tvm_attn.errors import DeviceError, OnnxError, TargetError
from tvm_attn.onnx.export import export
from tvm_attn.quantization import relative_error

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
WIDTH, HEADS = 32, 4


def model(
    nodes: list[Any], inputs: dict[str, Any], outputs: list[str], weights: dict[str, np.ndarray], opset: int = 23
) -> Any:
    """A graph of float inputs with these shapes; (shape, type) for an input of another type."""
    declared = []
    for name, given in inputs.items():
        shape, kind = given if isinstance(given, tuple) else (given, FLOAT)
        declared.append(helper.make_tensor_value_info(name, kind, shape))
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", declared, results, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def attention_block() -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    """A block of causal self-attention with a residual connection, and the same in PyTorch in float64."""
    rng = np.random.default_rng(0)
    shapes = {"gain": (WIDTH,), "shift": (WIDTH,), "qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) / 5 for name, shape in shapes.items()}
    make = helper.make_node
    nodes = [
        make("LayerNormalization", ["x", "gain", "shift"], ["normed"]),
        make("MatMul", ["normed", "qkv"], ["joined"]),
        make("Split", ["joined"], ["q", "k", "v"], axis=-1, num_outputs=3),
        make("Attention", ["q", "k", "v"], ["mixed"], is_causal=1, q_num_heads=HEADS, kv_num_heads=HEADS),
        make("MatMul", ["mixed", "out"], ["change"]),
        make("Add", ["x", "change"], ["y"]),
    ]

    def reference(x: np.ndarray) -> np.ndarray:
        exact = {name: torch.from_numpy(array).double() for name, array in weights.items()}
        rows = torch.from_numpy(x).double()
        normed = torch.nn.functional.layer_norm(rows, (WIDTH,), exact["gain"], exact["shift"])
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (normed @ exact["qkv"]).chunk(3, dim=-1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: np.ndarray = (rows + mixed.transpose(1, 2).flatten(2) @ exact["out"]).numpy()
        return found

    return model(nodes, {"x": ["batch", "length", WIDTH]}, ["y"], weights), reference


@pytest.fixture(scope="module")
def block() -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    graph, reference = attention_block()
    return tvm_attn.onnx.compile(graph), reference


def test_a_block_of_symbolic_sizes(block: tuple[Any, Callable[[np.ndarray], np.ndarray]]) -> None:
    session, reference = block
    assert (session.inputs, session.outputs, session.symbolic) == (("x",), ("y",), True)
    for batch, length in ((1, 1), (2, 7), (3, 70)):
        x = np.random.default_rng(length).standard_normal((batch, length, WIDTH)).astype(np.float32)
        (y,) = session(x)
        assert y.dtype == np.float32 and relative_error(y, reference(x)) < 1e-12
        np.testing.assert_array_equal(session(x=x)[0], y)
        np.testing.assert_array_equal(session(torch.from_numpy(x))[0], y)


def test_inputs_that_do_not_fit(block: tuple[Any, Callable[[np.ndarray], np.ndarray]]) -> None:
    session, _ = block
    x = np.zeros((1, 2, WIDTH), np.float32)
    for wrong, message in (
        (lambda: session(), r"missing: \['x'\]"),
        (lambda: session(x, x), "2 inputs were given; the graph has 1"),
        (lambda: session(x, z=x), r"unknown: \['z'\]"),
        (lambda: session(x.astype(np.float64)), "input 'x' has dtype float64, not float32"),
        (lambda: session(x[0]), r"input 'x' has shape \(2, 32\)"),
        (lambda: session(x[:, :, 1:]), r"input 'x' has shape \(1, 2, 31\)"),
    ):
        with pytest.raises(OnnxError, match=message):
            wrong()


def test_a_shape_that_is_an_input() -> None:
    graph = model([helper.make_node("Reshape", ["x", "shape"], ["y"])], {"x": [6], "shape": ([2], INT64)}, ["y"], {})
    session = tvm_attn.onnx.compile(graph)
    assert not session.symbolic
    x = np.arange(6, dtype=np.float32)
    for shape in ((2, 3), (3, -1), (6, 1), (2, 3)):
        np.testing.assert_array_equal(session(x, np.array(shape))[0], x.reshape(shape))
    with pytest.raises(OnnxError, match=r"\(Reshape\): 6 elements cannot be divided by 4"):
        session(x, np.array([4, -1]))


def test_shapes_that_are_computed() -> None:
    """The heads of attention as exporters split them, in sizes that are known at run time only."""
    make = helper.make_node
    nodes = [
        make("Shape", ["x"], ["sizes"]),
        make("Gather", ["sizes", "first"], ["batch"]),
        make("Slice", ["sizes", "one", "two"], ["length"]),
        make("Concat", ["batch", "length", "split"], ["target"], axis=0),
        make("Reshape", ["x", "target"], ["heads"]),
        make("Transpose", ["heads"], ["moved"], perm=[0, 2, 1, 3]),
        make("Squeeze", ["length"], ["count"]),
        make("Range", ["zero", "count", "step"], ["places"]),
        make("Cast", ["places"], ["numbers"], to=FLOAT),
        make("Unsqueeze", ["numbers", "one"], ["column"]),
        make("Add", ["moved", "column"], ["y"]),
    ]
    whole = {"first": [0], "one": [1], "two": [2], "split": [HEADS, -1], "zero": 0, "step": 1}
    weights = {name: np.array(numbers, np.int64) for name, numbers in whole.items()}
    session = tvm_attn.onnx.compile(model(nodes, {"x": ["b", "t", WIDTH]}, ["y"], weights))
    assert session.symbolic
    for shape in ((1, 1, WIDTH), (2, 5, WIDTH)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        parts = x.reshape(*shape[:2], HEADS, -1).transpose(0, 2, 1, 3)
        np.testing.assert_array_equal(session(x)[0], parts + np.arange(shape[1], dtype=np.float32)[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "vulkan"])
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_layer_of_torch(kind: str, opset: int, target: str, tmp_path: Path) -> None:
    """The layers of "Attention is all you need" (Vaswani et al., 2017), exported by PyTorch."""
    if target == "vulkan" and not vulkan_devices():
        pytest.skip("no Vulkan device")
    torch.manual_seed(0)
    options = {"dim_feedforward": 48, "batch_first": True}
    classes = {"encoder": torch.nn.TransformerEncoderLayer, "decoder": torch.nn.TransformerDecoderLayer}
    layer = classes[kind](WIDTH, HEADS, **options).eval()
    count = 1 if kind == "encoder" else 2
    batch = torch.export.Dim("batch")
    sizes = tuple({0: batch, 1: torch.export.Dim(name)} for name in ("length", "memory_length")[:count])

    def inputs(batch: int, *lengths: int) -> list[torch.Tensor]:
        return [torch.randn(batch, length, WIDTH) for length in lengths[:count]]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            layer, tuple(inputs(2, 7, 5)), dynamo=True, opset_version=opset, dynamic_shapes=sizes, verbose=False
        )
        assert program is not None
        program.save(tmp_path / "layer.onnx")
        session = tvm_attn.onnx.compile(tmp_path / "layer.onnx", target=target)
        exact = layer.double()
        for given in (inputs(2, 7, 5), inputs(1, 1, 9), inputs(3, 40, 33)):
            (found,) = session(*(array.numpy() for array in given))
            assert relative_error(found, exact(*(array.double() for array in given)).numpy()) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23])
def test_a_whole_decoder(opset: int, tmp_path: Path) -> None:
    """GPT-2 with past keys and values and padding, compiled as any other graph."""
    folder = save_checkpoint(tmp_path / "model", SMALL)
    session = tvm_attn.onnx.compile(export(folder, tmp_path / "model.onnx", opset=opset).file)
    assert session.symbolic
    logits = run_in_steps(session.run, SMALL, [5, 3], [4, 1, 2], np.float32)
    reference = expected(folder, SMALL, [5, 3], 7)
    assert relative_error(tokens(logits, [7, 5]), tokens(reference, [7, 5])) < 1e-11


def test_what_is_refused(tmp_path: Path) -> None:
    make, x = helper.make_node, {"x": ["n", 4]}
    for graph, message in (
        (
            model([make("Conv", ["x", "x"], ["y"], name="first")], x, ["y"], {}),
            r"^node 'first' \('Conv'\): this operator",
        ),
        (model([make("Nonesuch", ["x"], ["y"])], x, ["y"], {}), r"^node 'y' \('Nonesuch'\): opset 23 has no such"),
        (model([make("Gelu", ["x"], ["y"], domain="com.microsoft")], x, ["y"], {}), "domain 'com.microsoft'"),
        (model([make("Relu", ["z"], ["y"])], x, ["y"], {}), "reads 'z' before it is computed"),
        (model([make("Relu", ["x"], ["y"])], x, ["z"], {}), "the output 'z' is computed by no node"),
        (model([make("Concat", ["x", "x"], ["y"], axis=5)], x, ["y"], {}), "axis 5 does not exist"),
        (model([make("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E5M2)], x, ["y"], {}), "dtype float8_e5m2 is not"),
        (model([make("Relu", ["x"], ["y"])], {"x": (["n"], TensorProto.STRING)}, ["y"], {}), "is not supported"),
        (model([make("Relu", ["x"], ["y"])], x, ["y"], {}, opset=99), "opset 99 of ai.onnx is not supported"),
        (model([make("Attention", ["x", "x", "x"], ["y"])], x, ["y"], {}), r"\(Attention\): inputs need 4 dimensions"),
    ):
        with pytest.raises(OnnxError, match=message):
            tvm_attn.onnx.compile(graph)
    graph = model([make("Relu", ["x"], ["y"])], x, ["y"], {})
    onnx.save(graph, tmp_path / "good.onnx")
    (tmp_path / "bad.onnx").write_bytes((tmp_path / "good.onnx").read_bytes()[:-5])
    np.testing.assert_array_equal(
        tvm_attn.onnx.compile(tmp_path / "good.onnx")(np.float32([[-1, 2, 3, 4]]))[0][0, 0], 0
    )
    for name in ("bad.onnx", "nowhere.onnx"):
        with pytest.raises(OnnxError, match=name):
            tvm_attn.onnx.compile(tmp_path / name)
    with pytest.raises(DeviceError, match="cannot run code for target"):
        tvm_attn.onnx.compile(graph, target="cpu", device="vulkan:0")
    with pytest.raises(TargetError, match="unknown target"):
        tvm_attn.onnx.compile(graph, target="abacus")
    with pytest.raises(TargetError, match="for processors and Vulkan devices"):
        tvm_attn.onnx.compile(graph, target="cuda")
    with pytest.raises(DeviceError, match="vulkan:99"):
        tvm_attn.onnx.compile(graph, target="vulkan", device="vulkan:99")
