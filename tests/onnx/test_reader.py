"""Reading ONNX files: what a valid one holds, and one clear error for everything that can be wrong with one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvm_attn.errors import OnnxError
from tvm_attn.onnx import wire
from tvm_attn.onnx.reader import Graph, Node, OnnxFile, read_onnx


def graph(*nodes: Any, initializers: Any = (), inputs: Any = ("x",), outputs: Any = ("y",)) -> Any:
    def values(names: Any) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in names]

    return helper.make_graph(list(nodes), "g", values(inputs), values(outputs), list(initializers))


def saved(folder: Path, body: Any, opset: int = 18, **options: Any) -> Path:
    path = folder / "model.onnx"
    options.setdefault("opset_imports", [helper.make_opsetid("", opset)])
    path.write_bytes(helper.make_model(body, **options).SerializeToString())
    return path


def refused(path: Path) -> str:
    with pytest.raises(OnnxError) as caught:
        read_onnx(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


RELU = helper.make_node("Relu", ["x"], ["y"])


def test_what_a_file_holds(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w")
    body = graph(helper.make_node("Add", ["x", "w"], ["y"], name="sum"), initializers=[weight])
    file = read_onnx(saved(tmp_path, body, producer_name="test"))
    assert isinstance(file, OnnxFile) and (file.opset, file.opsets, file.producer) == (18, {"": 18}, "test")
    (node,) = file.graph.nodes
    assert (node.op, node.inputs, node.outputs, str(node)) == ("Add", ("x", "w"), ("y",), "Add node 'sum'")
    (value,) = file.graph.inputs
    assert (value.name, value.dtype, value.shape) == ("x", np.float32, ("n", 3))
    np.testing.assert_array_equal(file.graph.initializers["w"].array(), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "int8", "int64", "bool", "int4", "uint4"]
)
def test_tensors_of_every_type(dtype: str, raw: bool, tmp_path: Path) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = np.array([[1, 0, 3], [2, 5, 6]]).astype(kind)
    number = helper.np_dtype_to_tensor_dtype(kind)
    tensor = (
        numpy_helper.from_array(array, "w")
        if raw
        else helper.make_tensor("w", number, array.shape, array.ravel().tolist())
    )
    body = graph(RELU, initializers=[tensor])
    np.testing.assert_array_equal(read_onnx(saved(tmp_path, body)).graph.initializers["w"].array(), array, strict=True)


def test_nodes_are_sorted(tmp_path: Path) -> None:
    body = graph(helper.make_node("Relu", ["a"], ["y"]), helper.make_node("Abs", ["x"], ["a"]))
    assert [node.op for node in read_onnx(saved(tmp_path, body)).graph.nodes] == ["Abs", "Relu"]


def test_functions_become_their_nodes(tmp_path: Path) -> None:
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    slope = helper.make_node("LeakyRelu", ["a"], ["b"])
    slope.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    function = helper.make_function(
        "own", "twice", ["a"], ["c"], [slope, helper.make_node("Add", ["b", "b"], ["c"])], versions[:1], ["slope"]
    )
    calls = [helper.make_node("twice", ["x"], ["t"], domain="own", slope=0.5)]
    calls.append(helper.make_node("twice", ["t"], ["y"], domain="own", slope=0.25))
    nodes = read_onnx(saved(tmp_path, graph(*calls), functions=[function], opset_imports=versions)).graph.nodes
    assert [node.op for node in nodes] == ["LeakyRelu", "Add"] * 2
    assert [node.attributes["alpha"] for node in nodes[::2]] == [0.5, 0.25]
    assert nodes[1].outputs == nodes[2].inputs == ("t",) and nodes[3].outputs == ("y",)


def test_graphs_inside_see_the_names_outside(tmp_path: Path) -> None:
    """As in Optimum's merged decoders, a branch's result may have the name of the node's."""
    branches = [
        helper.make_graph([helper.make_node(op, ["x"], ["y"])], op, [], graph(RELU).output) for op in ("Abs", "Neg")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    body = graph(node)
    body.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    (read,) = read_onnx(saved(tmp_path, body)).graph.nodes
    assert isinstance(read, Node) and isinstance(read.attributes["then_branch"], Graph)
    assert [read.attributes[name].nodes[0].op for name in ("then_branch", "else_branch")] == ["Abs", "Neg"]


def external(folder: Path, **entries: object) -> Path:
    tensor = TensorProto(name="w", dims=[2, 3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return saved(folder, graph(RELU, initializers=[tensor]))


def test_external_data(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"????" + array.tobytes())
    file = read_onnx(external(tmp_path, location="data/w.bin", offset=4, length=24))
    np.testing.assert_array_equal(file.graph.initializers["w"].array(), array, strict=True)
    (tmp_path / "data" / "w.bin").write_bytes(b"?")
    with pytest.raises(OnnxError, match="became shorter"):
        file.graph.initializers["w"].array()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../secret"}, "not a file of its folder"),
        ({"location": "/etc/passwd"}, "not a file of its folder"),
        ({"location": "."}, "not a file of its folder"),
        ({}, "not a file of its folder"),
        ({"location": "a\\b"}, "not a file of its folder"),
        ({"location": "link"}, "links are not followed"),
        ({"location": "folder_link/secret"}, "links are not followed"),
        ({"location": "pipe"}, "is no file"),
        ({"location": "folder"}, "is no file"),
        ({"location": "missing"}, "No such file"),
        ({"location": "w.bin", "offset": 1}, "ends at byte 25 of 'w.bin', a file of 24 bytes"),
        ({"location": "w.bin", "offset": -1}, "the offset '-1'"),
        ({"location": "w.bin", "offset": 2**70}, "the offset '1180591620717411303424'"),
        ({"location": "w.bin", "length": 12}, r"of 12 bytes; float32 \(2, 3\) needs 24"),
    ],
)
def test_external_data_that_is_refused(entries: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(24))
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (folder / "w.bin").write_bytes(bytes(24))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder_link").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    with pytest.raises(OnnxError, match=message):
        read_onnx(external(folder, **entries))


def tensor(shape: list[int], data: bytes, kind: int = TensorProto.FLOAT) -> Any:
    return TensorProto(name="w", dims=shape, data_type=kind, raw_data=data)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (graph(RELU, initializers=[tensor([2], bytes(4))]), "of 4 bytes; float32 (2,) needs 8"),
        (graph(RELU, initializers=[tensor([2**31, 2**31, 2**31], b"")]), "which is impossible"),
        (graph(RELU, initializers=[tensor([-1], bytes(4))]), "which is impossible"),
        (graph(RELU, initializers=[tensor([1], bytes(4), 77)]), "the data type 77"),
        (graph(RELU, initializers=[tensor([1], b"", TensorProto.STRING)]), "the data type 8"),
        (graph(RELU, initializers=[TensorProto(name="w", dims=[3], data_type=1, float_data=[1, 2])]), "with 2 values"),
        (graph(RELU, initializers=[tensor([1], bytes(4))] * 2), "two weights named 'w'"),
        (graph(RELU, inputs=("x", "x")), "two inputs of one name"),
        (graph(RELU, RELU), "defines 'y' twice"),
        (graph(helper.make_node("Relu", ["z"], ["y"])), "uses 'z', which nothing defines"),
        (graph(RELU, outputs=("z",)), "the output 'z', which no node computes"),
        (
            graph(helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Abs", ["a"], ["b"]), outputs=("b",)),
            "has a cycle through the node 'Relu'",
        ),
        (graph(helper.make_node("Relu", ["y"], ["y"])), "has a cycle"),
        (graph(helper.make_node("Relu", ["x"], ["y"], domain="com.example")), "domain 'com.example', which is unknown"),
        (graph(helper.make_node("Unheard", ["x"], ["y"])), "opset 18 has no operator 'Unheard'"),
        (graph(helper.make_node("Attention", ["x"], ["y"])), "opset 18 has no operator 'Attention'"),
        (graph(helper.make_node("Relu", [], ["y"])), "with 0 inputs, which Relu does not take"),
        (graph(helper.make_node("Add", ["x", ""], ["y"])), "with 2 inputs, which Add does not take"),
        (graph(helper.make_node("Relu", ["x"], ["y", "z"])), "with 2 outputs, which Relu does not take"),
    ],
)
def test_graphs_that_are_refused(body: Any, message: str, tmp_path: Path) -> None:
    assert message in refused(saved(tmp_path, body))


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, graph(RELU))
    whole = path.read_bytes()
    for opset in (0, 6, 99):
        assert f"needs opset {opset} of" in refused(saved(tmp_path, graph(RELU), opset=opset))
    for text in (b"", b"not ONNX at all", b"\x0b\x0b", whole[:-3], whole[: len(whole) // 2]):
        path.write_bytes(text)
        assert "get it anew" in refused(path)
    path.write_bytes(whole.replace(b"Relu", b"Rel\xff"))
    assert "get it anew" in refused(path)  # a name that is no UTF-8
    with pytest.raises(OnnxError, match="is missing"):
        read_onnx(tmp_path / "nowhere")
    with pytest.raises(OnnxError, match="not a regular file"):
        read_onnx(tmp_path)
    with open(path, "wb") as file:
        file.truncate(2**31)  # takes no space
    assert "larger than 2 GiB" in refused(path)
    path.write_bytes(whole)
    monkeypatch.setattr(wire, "MAX_FIELDS", 5)
    assert "more than 5 fields" in refused(path)


def test_a_function_that_calls_itself(tmp_path: Path) -> None:
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    calls = [helper.make_node("f", ["a"], [name], domain="own") for name in ("b", "c")]
    function = helper.make_function("own", "f", ["a"], ["b"], calls, versions)
    body = graph(helper.make_node("f", ["x"], ["y"], domain="own"))
    assert "deep" in refused(saved(tmp_path, body, functions=[function], opset_imports=versions))


def test_small_files_that_would_need_much_memory(tmp_path: Path) -> None:
    """Two bytes make an empty node; 64 MB of them would take gigabytes."""

    def length(size: int) -> bytes:
        return bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21])

    nodes = b"\x0a\x00" * (32 << 20)
    path = tmp_path / "bomb.onnx"
    path.write_bytes(b"\x3a" + length(len(nodes)) + nodes)
    code = f"""
import resource, sys
import onnx
from tvm_attn.onnx.reader import read_onnx
from tvm_attn.errors import OnnxError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_onnx({str(path)!r})
except OnnxError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    message, grown = done.stdout.splitlines()
    assert "fields, more than any model needs" in message
    assert int(grown) < 200 << 10  # KiB: the file itself, and what Python needs
