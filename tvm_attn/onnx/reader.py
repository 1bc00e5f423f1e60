"""Reads an ONNX file into plain Python, within bounds of memory and time whatever the file holds.

Everything that a consumer would have to check first is checked here: sizes before anything is parsed or allocated,
that tensors hold what their shapes say, that external data is inside the file's folder, that names are defined once
and before they are used, that domains and operators are known. Format: https://onnx.ai/onnx/repo-docs/IR.html.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn.errors import OnnxError, one_line, shorten
from tvm_attn.jsonfile import opened, shorten_path
from tvm_attn.onnx import require_onnx
from tvm_attn.onnx.wire import check_message

MAX_FILE_BYTES = 2**31
"""Protocol Buffers end there; larger weights are external data."""
MAX_NODES = 100_000
MAX_TENSOR_BYTES = 2**38
DOMAINS = ("", "com.microsoft")
"""The domains whose operators have a meaning here; functions of a file may have any."""
_EARLY = ("LayerNormalization",)  # ONNX Runtime writes it into graphs of opsets that do not have it yet
_FIRST_OPSET = 7
_MAX_GRAPH_DEPTH = 8


@dataclass(frozen=True)
class Tensor:
    """A constant of a file.

    Attributes:
        name: its name, for messages.
        shape: its dimensions.
        dtype: NumPy's or ml_dtypes' type.
        _read: loads it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    _read: Any = field(repr=False)

    def array(self) -> np.ndarray:
        """The values; external data is mapped, not copied.

        Raises:
            OnnxError: external data has changed or vanished since the file was opened.
        """
        array: np.ndarray = self._read()
        return array


@dataclass(frozen=True, eq=False)
class Node:
    """An operator of a graph.

    Attributes:
        op: its name, after `domain::` unless the domain is ONNX's own.
        name: of the node, for messages; may be empty.
        inputs: names of values; "" for an optional one that is absent.
        outputs: names of values; "" for one that nobody needs.
        attributes: int, float, str, bytes, `Tensor`, `Graph`, or a tuple of one of these.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        """How messages name it."""
        output = next((name for name in self.outputs if name), "")
        shown = self.name or output
        return f"{self.op} node {shown[:80]!r}" if shown else f"{self.op} node"


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: its name.
        dtype: its type; None if the file does not say.
        shape: sizes, names of symbolic dimensions, or None for a dimension that the file does not describe. None if
            the file does not say how many there are.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Graph:
    """A graph whose nodes are in an order in which they can be computed.

    Attributes:
        inputs: those that are no initializers.
        outputs: its results.
        nodes: calls of functions are replaced with their nodes.
        initializers: constants by name.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Tensor]


@dataclass(frozen=True)
class OnnxFile:
    """What a file holds.

    Attributes:
        path: the file.
        graph: its main graph.
        opset: version of ONNX's own operators.
        opsets: versions of the operators of each domain.
        metadata: its `metadata_props`.
        producer: the program that wrote it.
    """

    path: Path
    graph: Graph
    opset: int
    opsets: Mapping[str, int]
    metadata: Mapping[str, str]
    producer: str


def read_onnx(path: str | Path) -> OnnxFile:
    """Opens an ONNX file. Weights are read when they are used.

    Raises:
        OnnxError: onnx is not installed; the file is missing, truncated, malformed, larger than any model needs, or
            uses operators that are unknown; external data is missing, too short or outside the file's folder.
    """
    onnx = require_onnx()
    with opened(path, OnnxError) as file:
        size = os.fstat(file.fileno()).st_size
        if size >= MAX_FILE_BYTES:
            raise OnnxError(f"{shorten_path(path)} is larger than 2 GiB, so it is no ONNX file; weights go beside it")
        content = file.read(MAX_FILE_BYTES)
    return parse_onnx(content, Path(path), onnx)


def parse_onnx(content: bytes, path: Path, onnx: Any | None = None) -> OnnxFile:
    """As `read_onnx`, of a file's content; `path` names it in messages, and its folder holds external data."""
    onnx = onnx or require_onnx()
    what = shorten_path(path)
    check_message(memoryview(content), onnx.ModelProto.DESCRIPTOR, what)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # google.protobuf's DecodeError
        raise OnnxError(f"{what} is no ONNX file, or it is damaged ({one_line(error)}); get it anew") from None
    del content
    if not model.HasField("graph"):
        raise OnnxError(f"{what} has no graph, so it is no ONNX file, or it is cut off; get it anew")
    return _Reader(onnx, model, path).file()


class _Reader:
    def __init__(self, onnx: Any, model: Any, path: Path) -> None:
        self._onnx, self._model, self._path, self._what = onnx, model, path, shorten_path(path)
        self._nodes = 0
        self._functions = {(f.domain, f.name, f.overload): f for f in model.functions}

    def file(self) -> OnnxFile:
        model = self._model
        opsets = self._opsets(model.opset_import)
        graph = self._graph(model.graph, opsets, frozenset(), 0)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        producer = f"{model.producer_name} {model.producer_version}".strip()
        return OnnxFile(self._path, graph, opsets[""], opsets, metadata, producer)

    def _opsets(self, imports: Any) -> dict[str, int]:
        newest = self._onnx.defs.onnx_opset_version()
        opsets: dict[str, int] = {}
        for entry in imports:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if opsets.setdefault(domain, entry.version) != entry.version:
                raise self._error(f"imports two versions of the domain {shorten(domain)}")
        if not _FIRST_OPSET <= opsets.get("", 0) <= newest:
            raise self._error(
                f"needs opset {opsets.get('', 0)} of ONNX's operators; supported are {_FIRST_OPSET} to {newest}"
            )
        return opsets

    def _graph(self, proto: Any, opsets: Mapping[str, int], outer: frozenset[str], depth: int) -> Graph:
        """A graph; `outer` are the names that enclosing graphs define, which it may use, and may define anew."""
        if depth > _MAX_GRAPH_DEPTH:
            raise self._error(f"has graphs nested more than {_MAX_GRAPH_DEPTH} deep")
        if len(proto.sparse_initializer):
            raise self._error("has sparse weights, which are not supported")
        initializers: dict[str, Tensor] = {}
        for tensor in proto.initializer:
            if not tensor.name or tensor.name in initializers:
                raise self._error(f"has two weights named {shorten(tensor.name)}")
            initializers[tensor.name] = self._tensor(tensor, tensor.name)
        values = [self._value(value) for value in proto.input]
        if len({value.name for value in values}) < len(values):
            raise self._error("has two inputs of one name")
        inputs = tuple(value for value in values if value.name not in initializers)
        defined = {*initializers, *(value.name for value in inputs)}
        nodes = self._sorted(self._inlined(proto.node, opsets, 0), defined, outer)
        visible = outer | defined
        finished = tuple(self._node(node, versions, visible, depth) for node, versions in nodes)
        outputs = tuple(self._value(value) for value in proto.output)
        for value in outputs:
            if value.name not in visible:
                raise self._error(f"has the output {shorten(value.name)}, which no node computes")
        return Graph(inputs, outputs, finished, initializers)

    def _inlined(self, nodes: Any, opsets: Mapping[str, int], depth: int) -> list[tuple[Any, Mapping[str, int]]]:
        """Nodes with the opsets that they are written for; calls of the file's own functions are replaced."""
        found: list[tuple[Any, Mapping[str, int]]] = []
        for node in nodes:
            self._nodes += 1
            if self._nodes > MAX_NODES:
                raise self._error(f"has more than {MAX_NODES} nodes")
            function = self._functions.get((node.domain, node.op_type, node.overload))
            if function is None:
                found.append((node, opsets))
                continue
            if depth > _MAX_GRAPH_DEPTH:
                raise self._error(f"has functions that call each other more than {_MAX_GRAPH_DEPTH} deep")
            found += self._inlined(self._body(function, node), self._opsets(function.opset_import), depth + 1)
        return found

    def _body(self, function: Any, call: Any) -> Iterator[Any]:
        """The nodes of a function with the names and attributes of one call."""
        prefix = f"{call.name or call.op_type}.{self._nodes}/"
        names = dict(zip(function.input, call.input, strict=False)) | dict(
            zip(function.output, call.output, strict=False)
        )
        names |= {name: "" for name in function.input if name not in names} | {"": ""}
        given = {entry.name: entry for entry in function.attribute_proto}
        given |= {entry.name: entry for entry in call.attribute}
        for original in function.node:
            node = self._onnx.NodeProto()
            node.CopyFrom(original)
            node.name = prefix + original.name
            for field_ in (node.input, node.output):
                field_[:] = [names.get(name, prefix + name) for name in field_]
            del node.attribute[:]
            for entry in original.attribute:
                if entry.HasField("g"):
                    raise self._error(f"has a function {shorten(function.name)} with a graph in it; inline it first")
                if not entry.ref_attr_name:
                    node.attribute.add().CopyFrom(entry)
                elif entry.ref_attr_name in given:
                    node.attribute.add().CopyFrom(given[entry.ref_attr_name])
                    node.attribute[-1].name = entry.name
            yield node

    def _sorted(
        self, nodes: list[tuple[Any, Mapping[str, int]]], defined: set[str], outer: frozenset[str]
    ) -> list[tuple[Any, Mapping[str, int]]]:
        """The nodes in an order in which they can be computed; adds their outputs to `defined`."""
        for node, _ in nodes:
            for name in filter(None, node.output):
                if name in defined:
                    raise self._error(f"defines {shorten(name)} twice")
                defined.add(name)
        produced = {name: index for index, (node, _) in enumerate(nodes) for name in node.output if name}
        needs: list[set[int]] = []
        for node, _ in nodes:
            needs.append(set())
            for name in self._used(node):
                if name in produced:
                    needs[-1].add(produced[name])
                elif name not in defined and name not in outer and name in node.input:
                    raise self._error(f"has a node ({node.op_type}) that uses {shorten(name)}, which nothing defines")
        users: list[list[int]] = [[] for _ in nodes]
        for index, before in enumerate(needs):
            for other in before:
                users[other].append(index)
        missing = [len(before) for before in needs]
        ready = [index for index, count in enumerate(missing) if not count][::-1]
        order: list[int] = []
        while ready:
            order.append(ready.pop())
            for index in reversed(users[order[-1]]):
                missing[index] -= 1
                if not missing[index]:
                    ready.append(index)
        if len(order) < len(nodes):
            stuck = nodes[next(index for index, count in enumerate(missing) if count)][0]
            raise self._error(f"has a cycle through the node {shorten(stuck.name or stuck.op_type)}")
        return [nodes[index] for index in order]

    def _used(self, node: Any, depth: int = 0) -> Iterator[str]:
        """Names that a node uses, also those that the graphs in its attributes take from outside."""
        yield from filter(None, node.input)
        if depth > _MAX_GRAPH_DEPTH:
            return
        for entry in node.attribute:
            for graph in ([entry.g] if entry.HasField("g") else []) + list(entry.graphs):
                own = {name for inner in graph.node for name in inner.output}
                own |= {value.name for value in (*graph.input, *graph.initializer)}
                used = {value.name for value in graph.output}
                used.update(*(self._used(inner, depth + 1) for inner in graph.node))
                yield from used - own

    def _node(self, proto: Any, opsets: Mapping[str, int], outer: frozenset[str], depth: int) -> Node:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        op = f"{domain}::{proto.op_type}" if domain else proto.op_type
        where = f"node {shorten(proto.name or proto.op_type, 60)}"
        if domain not in DOMAINS:
            raise self._error(f"has the {where} of the domain {shorten(domain)}, which is unknown")
        if not domain and proto.op_type not in _EARLY:
            try:
                schema = self._onnx.defs.get_schema(proto.op_type, opsets[""], "")
            except self._onnx.defs.SchemaError:
                raise self._error(
                    f"has the {where}, and opset {opsets['']} has no operator {shorten(proto.op_type)}"
                ) from None
            self._check_operands(schema, proto, where)
        attributes: dict[str, Any] = {}
        for entry in proto.attribute:
            if entry.name in attributes:
                raise self._error(f"has the {where} with two attributes {shorten(entry.name)}")
            attributes[entry.name] = self._attribute(entry, where, opsets, outer, depth)
        return Node(op, proto.name, tuple(proto.input), tuple(proto.output), attributes)

    def _check_operands(self, schema: Any, proto: Any, where: str) -> None:
        """Numbers of inputs and outputs; those that the operator needs have names."""
        single = self._onnx.defs.OpSchema.FormalParameterOption.Single
        for what, names, formal, least, most in (
            ("inputs", proto.input, schema.inputs, schema.min_input, schema.max_input),
            ("outputs", proto.output, schema.outputs, schema.min_output, schema.max_output),
        ):
            needed = all(name for name, one in zip(names, formal, strict=False) if one.option == single)
            if not least <= len(names) <= most or not needed:
                raise self._error(f"has the {where} with {len(names)} {what}, which {proto.op_type} does not take")

    def _attribute(self, entry: Any, where: str, opsets: Mapping[str, int], outer: frozenset[str], depth: int) -> Any:
        kinds, graph = self._onnx.AttributeProto, partial(self._graph, opsets=opsets, outer=outer, depth=depth + 1)
        tensor = partial(self._tensor, name=f"{where}.{entry.name}")
        match entry.type:
            case kinds.INT:
                return int(entry.i)
            case kinds.FLOAT:
                return float(entry.f)
            case kinds.STRING:
                return _text(entry.s)
            case kinds.TENSOR:
                return tensor(entry.t)
            case kinds.GRAPH:
                return graph(entry.g)
            case kinds.INTS:
                return tuple(entry.ints)
            case kinds.FLOATS:
                return tuple(entry.floats)
            case kinds.STRINGS:
                return tuple(map(_text, entry.strings))
        raise self._error(f"has the {where} with the attribute {shorten(entry.name)} of a kind that is not supported")

    def _value(self, proto: Any) -> Value:
        if not proto.name or not proto.type.HasField("tensor_type"):
            return Value(proto.name, None, None)
        tensor = proto.type.tensor_type
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
            if any(isinstance(size, int) and not 0 <= size < 2**31 for size in shape):
                raise self._error(f"has the value {shorten(proto.name)} of shape {shorten(shape)}")
        return Value(proto.name, self._dtype(tensor.elem_type, proto.name) if tensor.elem_type else None, shape)

    def _dtype(self, number: int, name: str) -> np.dtype:
        try:
            dtype = np.dtype(self._onnx.helper.tensor_dtype_to_np_dtype(number))
        except (KeyError, TypeError, ValueError):
            dtype = np.dtype(object)
        if dtype.hasobject or dtype.kind in "US":
            raise self._error(f"has {shorten(name)} of the data type {number}, which is not supported")
        return dtype

    def _tensor(self, proto: Any, name: str) -> Tensor:
        shape, dtype = tuple(proto.dims), self._dtype(proto.data_type, name)
        bits = 4 if dtype.name.endswith("int4") else 2 if dtype.name.endswith("int2") else 8 * dtype.itemsize
        if "float4" in dtype.name:
            bits = 4
        size = (prod(shape) * bits + 7) // 8 if all(0 <= d < 2**40 for d in shape) else -1
        if not 0 <= size < MAX_TENSOR_BYTES or len(shape) > 32:
            raise self._error(f"has the weight {shorten(name)} of shape {shorten(shape)}, which is impossible")
        if proto.data_location == self._onnx.TensorProto.EXTERNAL:
            return self._external(proto, name, shape, dtype, size)
        if proto.HasField("raw_data") and len(proto.raw_data) != size:
            raise self._error(
                f"has the weight {shorten(name)} of {len(proto.raw_data)} bytes; {dtype.name} {shape} needs {size}"
            )
        if not proto.HasField("raw_data"):
            fields = (proto.float_data, proto.int32_data, proto.int64_data, proto.double_data, proto.uint64_data)
            count = max(map(len, fields))
            per_byte = 8 // bits if bits < 8 else 1
            if count != -(-prod(shape) // per_byte) * (2 if dtype.kind == "c" else 1):
                raise self._error(f"has the weight {shorten(name)} of shape {shape} with {count} values")
        return Tensor(name, shape, dtype, _Cached(partial(self._inline, proto, name, shape, dtype, bits)))

    def _inline(self, proto: Any, name: str, shape: tuple[int, ...], dtype: np.dtype, bits: int) -> np.ndarray:
        if proto.HasField("raw_data") and bits >= 8:
            return np.frombuffer(proto.raw_data, dtype).reshape(shape)
        try:
            array: np.ndarray = self._onnx.numpy_helper.to_array(proto)
        except Exception as error:  # TypeError, ValueError
            raise self._error(f"has the weight {shorten(name)}, which cannot be read: {one_line(error)}") from None
        return array.reshape(shape)

    def _external(self, proto: Any, name: str, shape: tuple[int, ...], dtype: np.dtype, size: int) -> Tensor:
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        numbers = []
        for key, default in (("offset", 0), ("length", size)):
            text = entries.get(key, str(default))
            if not (text.isascii() and text.isdigit() and len(text) < 16):
                raise self._error(f"has the external weight {shorten(name)} with the {key} {shorten(text)}")
            numbers.append(int(text))
        offset, length = numbers
        if length != size:
            raise self._error(
                f"has the external weight {shorten(name)} of {length} bytes; {dtype.name} {shape} needs {size}"
            )
        descriptor = self._open_beside(location, name)
        held = os.fstat(descriptor).st_size
        os.close(descriptor)
        if offset + size > held:
            raise self._error(
                f"has the external weight {shorten(name)}, which ends at byte {offset + size} of {shorten(location)}, "
                f"a file of {held} bytes; get it anew"
            )
        return Tensor(name, shape, dtype, partial(self._mapped, location, name, offset, shape, dtype, size))

    def _open_beside(self, location: str, name: str) -> int:
        """Opens a file in the folder of the ONNX file or below it, following no links."""
        parts = location.split("/")
        if not location or "\\" in location or "\0" in location or any(part in ("", ".", "..") for part in parts):
            raise self._error(
                f"has the external weight {shorten(name)} in {shorten(location)}, which is not a file of its folder"
            )
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            descriptor = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as failure:
            raise self._error(
                f"has the external weight {shorten(name)} in {shorten(location)}, which cannot be read "
                f"({failure.strerror}); links are not followed"
            ) from None
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise self._error(f"has the external weight {shorten(name)} in {shorten(location)}, which is no file")
        return descriptor

    def _mapped(
        self, location: str, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype, size: int
    ) -> np.ndarray:
        with open(self._open_beside(location, name), "rb") as file:
            if os.fstat(file.fileno()).st_size < offset + size:
                raise self._error(f"has the external weight {shorten(name)}, which became shorter")
            if not size:
                return np.zeros(shape, dtype)
            data = np.memmap(file, np.uint8, "r", offset, (size,))
        if size == prod(shape) * dtype.itemsize:
            return data.view(np.ndarray).view(dtype).reshape(shape)
        tensor = self._onnx.TensorProto(
            dims=shape, data_type=self._onnx.helper.np_dtype_to_tensor_dtype(dtype), raw_data=data.tobytes()
        )
        return self._inline(tensor, name, shape, dtype, 4)

    def _error(self, text: str) -> OnnxError:
        return OnnxError(f"{self._what} {text}")


class _Cached:
    """Calls a function once. protobuf copies bytes whenever they are asked for."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self._array: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        if self._array is None:
            self._array = self._read()
        return self._array


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
