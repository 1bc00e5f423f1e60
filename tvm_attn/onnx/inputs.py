"""What the inputs of a GPT-2's graph mean, from their types, their shapes and what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn.errors import OnnxError, one_line, shorten
from tvm_attn.jsonfile import shorten_path
from tvm_attn.onnx.reader import Graph, Value
from tvm_attn.onnx.terms import Const, Past, Space
from tvm_attn.onnx.trace import Refused
from tvm_attn.onnx.trace import Value as Traced

_BATCH, _LENGTH = 2, 5  # where the file leaves them open
_PASSES = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "Where")
_MAX_TOKENS = 1 << 14


class Inputs:
    """Concrete inputs of a graph.

    Attributes:
        batch: sequences.
        length: tokens of each.
        past: tokens that precede them.
        logits: the name of the output that is followed.
    """

    def __init__(self, graph: Graph, past: int) -> None:
        self._graph = graph
        self._rows = list(_indexing(graph))
        tokens = [value for value in graph.inputs if value.name in self._rows]
        if not tokens:
            raise Refused("no input is looked up in a table, as token ids are")
        shapes = [value.shape or (None, None) for value in tokens]
        self.length = next((s[-1] for s in shapes if s and isinstance(s[-1], int)), _LENGTH)
        self.batch = next((prod(map(_first_open, s[:-1])) for s in shapes if _fixed(s[:-1])), _BATCH)
        self.past = past
        if not 0 < self.batch * self.length <= _MAX_TOKENS:
            raise Refused(f"it is exported for {self.batch} x {self.length} tokens; export it with symbolic sizes")
        self.logits = _logits(graph)

    @staticmethod
    def past_lengths(graph: Graph, usual: int) -> list[int]:
        """Lengths of the past that the graph takes: none and some, or the one that it is exported for."""
        pasts = [value for value in graph.inputs if _is_past(value)]
        if not pasts:
            return [0]
        size = (pasts[0].shape or ())[_past_axis(pasts[0])]
        return [size] if isinstance(size, int) else [0, usual]

    def values(self, space: Space) -> dict[str, Traced]:
        """The values with which the graph is traced."""
        found: dict[str, Traced] = {}
        for value in self._graph.inputs:
            if _is_past(value):
                found[value.name] = space.whole(space.add(Past("the graph", self._past_shape(value), value.name)))
            elif (array := self._array(value)) is not None:
                marks = np.arange(self.batch * self.length).reshape(array.shape) if value.name in self._rows else None
                found[value.name] = Const(array, marks, value.name if marks is not None else "")
        return found

    def _array(self, value: Value) -> np.ndarray | None:
        dtype, shape = value.dtype, value.shape
        positions = np.arange(self.past, self.past + self.length)
        if dtype is None:
            return None
        if value.name in self._rows:
            if shape is None or len(shape) < 2:
                full: tuple[int, ...] = (self.batch, self.length)
            else:
                lead = [size if isinstance(size, int) else 1 for size in shape[:-1]]
                lead[0] = shape[0] if isinstance(shape[0], int) else self.batch // max(prod(lead[1:]), 1)
                full = (*lead, self.length)
            return np.broadcast_to(positions, full).astype(dtype)
        if dtype.kind == "b" and prod(size for size in shape or () if isinstance(size, int)) == 1:
            return np.full([1] * len(shape or ()), self.past > 0)
        if shape is not None and len(shape) == 0:
            return np.array(self.past + self.length, dtype)
        if shape is not None and len(shape) == 1:
            size = shape[0]
            if size == self.length or (isinstance(size, str) and any(size == s for s in self._names(-1))):
                return positions.astype(dtype)
            if size == 1:
                return np.array([self.past + self.length], dtype)
            return np.full(self.batch, self.past + self.length - 1, dtype)
        if shape is None or len(shape) == 2:
            total = shape[1] if shape is not None and isinstance(shape[1], int) else self.past + self.length
            return (np.arange(total) < self.past + self.length).astype(dtype) * np.ones((self.batch, 1), dtype)
        return None

    def _names(self, axis: int) -> Iterator[str]:
        for value in self._graph.inputs:
            if value.name in self._rows and value.shape and isinstance(value.shape[axis], str):
                yield str(value.shape[axis])

    def _past_shape(self, value: Value) -> tuple[int, ...]:
        shape = list(value.shape or ())
        axis = _past_axis(value)
        for index, size in enumerate(shape):
            if not isinstance(size, int):
                if index == axis:
                    shape[index] = self.past
                elif index == len(shape) - 4:
                    shape[index] = self.batch
                elif self.past:
                    raise Refused(f"the input {shorten(value.name)} does not say how many heads it has")
                else:
                    shape[index] = 1
        return tuple(int(size) for size in shape if isinstance(size, int))

    def original(self, path: Path, tokens: str, vocabulary: int) -> tuple[np.ndarray, np.ndarray] | None:
        """See `OnnxCheckpoint.original`; `tokens` is the input that holds the token ids."""
        if self.past or find_spec("onnxruntime") is None:
            return None
        import onnxruntime

        feeds: dict[str, Any] = {}
        ids = np.random.default_rng(0).integers(0, vocabulary, (self.batch, self.length))
        for value in self._graph.inputs:
            array = self._array(value)
            if _is_past(value):
                array = np.zeros(self._past_shape(value), value.dtype)
            if array is None:
                return None
            feeds[value.name] = ids.reshape(array.shape).astype(array.dtype) if value.name == tokens else array
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            (logits,) = session.run([self.logits], feeds)
        except Exception as error:  # of onnxruntime.capi
            raise OnnxError(f"ONNX Runtime cannot run {shorten_path(path)}: {one_line(error)}") from None
        return ids, np.asarray(logits, np.float32).reshape(self.batch, self.length, -1)


def _indexing(graph: Graph) -> dict[str, None]:
    """Inputs that reach the indices of a table: token ids, perhaps positions."""
    origin = {value.name: value.name for value in graph.inputs if value.dtype is not None and value.dtype.kind in "iu"}
    found: dict[str, None] = {}

    def walk(inner: Graph, known: dict[str, str], tables: set[str]) -> None:
        tables = tables | {n for n, t in inner.initializers.items() if len(t.shape) == 2}
        for node in inner.nodes:
            if node.op == "Gather" and node.inputs[0] in tables and node.inputs[1] in known:
                found[known[node.inputs[1]]] = None
            if node.op == "com.microsoft::EmbedLayerNormalization":
                for index in (0, 8):
                    if len(node.inputs) > index and node.inputs[index] in known:
                        found[known[node.inputs[index]]] = None
            if node.op in _PASSES:
                sources = [known[name] for name in node.inputs if name in known]
                if sources:
                    known[node.outputs[0]] = sources[0]
            if node.op in (*_PASSES, "DequantizeLinear", "Constant", "Transpose") and (
                node.op == "Constant" or (node.inputs and node.inputs[0] in tables)
            ):
                tables.add(node.outputs[0])
            for value in node.attributes.values():
                if isinstance(value, Graph):
                    walk(value, dict(known), tables)

    walk(graph, origin, set())
    return found


def _is_past(value: Value) -> bool:
    return value.dtype is not None and value.dtype.kind not in "iub" and len(value.shape or ()) >= 4


def _past_axis(value: Value) -> int:
    """The axis of the past tokens: the symbolic one of the two between batch and features."""
    shape = value.shape or ()
    middle = len(shape) - 3
    if not isinstance(shape[middle], int) and isinstance(shape[middle + 1], int):
        return middle
    return middle + 1


def _logits(graph: Graph) -> str:
    named = [value.name for value in graph.outputs if value.name == "logits"]
    flat = [value.name for value in graph.outputs if value.shape is None or len(value.shape) < 4]
    names = named or flat or [value.name for value in graph.outputs]
    if not names:
        raise Refused("it has no output")
    return names[0]


def _fixed(sizes: tuple[Any, ...]) -> bool:
    return bool(sizes) and all(isinstance(size, int) for size in sizes)


def _first_open(size: Any) -> int:
    return size if isinstance(size, int) else 1
