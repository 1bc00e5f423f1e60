"""ONNX graphs in Relax: one function per operator, which `tvm_attn.onnx.operators` lists.

A value of the graph is a Relax expression, or `Known`: numbers that the conversion knows, which may be expressions of
symbolic sizes. Shapes are computed from known values, so `Reshape` and `Expand` of symbolic sizes need no special case.
Where the result's shape depends on a number that only an input has, or two sizes cannot be shown to be equal, the
conversion raises `NeedsInputs`: with the inputs' shapes, and the values of those that it names, it will succeed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import relax, sym, te, tirx
from tvm.ir import Expr

from tvm_attn.errors import OnnxError, one_line, shorten
from tvm_attn.kernels import Kernel
from tvm_attn.onnx import require_onnx
from tvm_attn.storage import numpy_dtype

DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
"""The dtypes that tensors may have."""
_SMALL = 1024
"""Most numbers of an input of an operator whose result is computed when the graph is converted."""
_REARRANGING = (
    "Cast",
    "Concat",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators whose results have at most as many numbers as their inputs, so that these may be large."""
_GROWING = ("ConstantOfShape", "Expand", "Pad", "Range", "Tile")
"""Operators that make many numbers from few; their own functions decide."""


class NeedsInputs(Exception):
    """The conversion needs the inputs' shapes, and the values of some of them.

    Attributes:
        names: the inputs whose values are needed.
        why: the node and what it needs, for an error.
    """

    def __init__(self, names: frozenset[str], why: str) -> None:
        super().__init__(why)
        self.names, self.why = names, why


@dataclass(frozen=True)
class Known:
    """Numbers that are known when the graph is converted.

    Attributes:
        array: the numbers; an array of objects holds whole numbers and TIR expressions of int64.
    """

    array: np.ndarray

    @property
    def symbolic(self) -> bool:
        """Whether there are expressions among the numbers."""
        return self.array.dtype == object

    @property
    def dtype(self) -> str:
        """The tensor's dtype."""
        return "int64" if self.symbolic else self.array.dtype.name


def known(numbers: Any, shape: tuple[int, ...] | None = None) -> Known:
    """Whole numbers and expressions of sizes as int64; expressions that are constant become numbers."""
    analyzer, array = sym.Analyzer(), np.array(numbers, object)
    flat = [analyzer.simplify(e) if isinstance(e, Expr) else int(e) for e in array.reshape(-1)]
    flat = [e.value if isinstance(e, tirx.IntImm) else e for e in flat]
    plain = all(isinstance(e, int) for e in flat)
    result = np.array(flat, np.int64) if plain else np.empty(len(flat), object)
    if not plain:
        result[:] = flat
    return Known(result.reshape(array.shape if shape is None else shape))


def broadcast_known(*values: Value | None) -> list[np.ndarray] | None:
    """Known values as arrays of objects of one shape; None if one is not known, or they have many elements."""
    arrays = [value.array.astype(object) for value in values if isinstance(value, Known) and value.array.size <= _SMALL]
    if len(arrays) < len(values) or prod(np.broadcast_shapes(*(array.shape for array in arrays))) > _SMALL:
        return None
    return list(np.broadcast_arrays(*arrays))


Value: TypeAlias = "relax.Expr | Known"
Types = Mapping[str, tuple[tuple[Any, ...], str]]


@dataclass
class Node:
    """A node of the graph, as an operator's function sees it.

    Attributes:
        converter: the conversion.
        proto: the NodeProto.
        inputs: its inputs; None for one that is left out.
        attributes: its attributes as Python values.
    """

    converter: Converter
    proto: Any
    inputs: list[Value | None]
    attributes: dict[str, Any]

    @property
    def opset(self) -> int:
        """The version of the operators."""
        return self.converter.opset

    @property
    def builder(self) -> relax.BlockBuilder:
        """The builder of the Relax function."""
        return self.converter.builder

    def has(self, index: int) -> bool:
        """Whether an input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def wants(self, index: int) -> bool:
        """Whether an output is used."""
        return index < len(self.proto.output) and bool(self.proto.output[index])

    def tensor(self, index: int) -> relax.Expr:
        """An input as an expression."""
        return self.emit(self.converter.tensor(self._given(index)))

    def known(self, index: int) -> np.ndarray:
        """The numbers of an input, int or TIR expressions if they are sizes.

        Raises:
            NeedsInputs: they depend on the graph's inputs.
        """
        value = self._given(index)
        if isinstance(value, Known):
            return value.array
        raise NeedsInputs(self.converter.origins(self.proto.input[index]), self.says(f"input {index} must be constant"))

    def numbers(self, index: int) -> list[int]:
        """The whole numbers of an input, which may not be symbolic; as `known`."""
        array = self.known(index)
        if array.dtype == object:
            raise self.needs_shapes(f"input {index} depends on a symbolic size")
        return [int(number) for number in array.reshape(-1)]

    def shape(self, index: int) -> list[Any]:
        """The shape of an input: whole numbers and TIR expressions."""
        value = self._given(index)
        return list(value.array.shape) if isinstance(value, Known) else shape_of(value)

    def dtype(self, index: int) -> str:
        """The dtype of an input."""
        value = self._given(index)
        return value.dtype if isinstance(value, Known) else str(value.ty.dtype)

    def axis(self, rank: int, default: int = 0, name: str = "axis") -> int:
        """An axis as a number from 0 on."""
        return self.normal(self.attributes.get(name, default), rank)

    def normal(self, axis: int, rank: int) -> int:
        """An axis as a number from 0 on."""
        if not -rank <= axis < rank:
            raise self.error(f"axis {axis} does not exist in a tensor of {rank} dimensions")
        return axis % rank if rank else 0

    def emit(self, expression: relax.Expr) -> relax.Expr:
        """Adds an expression to the function."""
        return expression if isinstance(expression, relax.Var) else self.builder.emit(expression)

    def compute(self, function: Callable[..., Any], *arguments: Any) -> relax.Expr:
        """Adds a call of a TIR function that a tensor expression gives; arguments are tensors and sizes."""
        return self.builder.emit_te(function, *arguments, primfunc_name_hint=self.proto.op_type.lower())

    def call_kernel(self, kernel: Kernel, arguments: list[relax.Expr], shape: list[Any], dtype: str) -> relax.Expr:
        """Adds a call of one of our kernels, which the caller of the conversion compiles."""
        facts = f"{self.converter.target} {kernel!r}"
        name = f"tvm_attn.onnx.{kernel.family}.{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        self.converter.kernels[name] = kernel
        return self.emit(relax.op.call_dps_packed(name, arguments, out_ty=relax.TensorType(shape, dtype)))

    def says(self, what: str) -> str:
        """`what`, with the node before it."""
        name = self.proto.name or (self.proto.output[0] if self.proto.output else "")
        return f"node {shorten(name, 80)} ({self.proto.op_type}): {what}"

    def error(self, what: str) -> OnnxError:
        """An error that names the node."""
        return OnnxError(self.says(what))

    def needs_shapes(self, what: str) -> NeedsInputs:
        """The exception that asks for the inputs' shapes."""
        if self.converter.static:
            raise self.error(what)
        return NeedsInputs(frozenset(), self.says(what))

    def _given(self, index: int) -> Value:
        if not self.has(index):
            raise self.error(f"input {index} is missing")
        value = self.inputs[index]
        assert value is not None
        return value


Operator = Callable[[Node], Any]


class Converter:
    """One conversion.

    Args:
        graph: the GraphProto, without functions and subgraphs.
        opset: the version of its operators.
        operators: the function of each operator.
        types: shape and dtype of every input; sizes are whole numbers or TIR variables.
        values: inputs whose values are known, which the Relax function does not have as parameters.
        target: the name of the target, for which the kernels' functions are named too.

    Attributes:
        builder: builds the function.
        opset, target: see above.
        kernels: the kernels that the function calls, by the names of their functions.
        static: whether no size is symbolic.
    """

    def __init__(
        self,
        graph: Any,
        opset: int,
        operators: Mapping[str, Operator],
        types: Types,
        values: Mapping[str, np.ndarray],
        target: str,
    ) -> None:
        self.builder, self.opset, self.target = relax.BlockBuilder(), opset, target
        self.static = all(isinstance(size, int) for shape, _ in types.values() for size in shape)
        self.kernels: dict[str, Any] = {}
        self._graph, self._operators, self._types = graph, operators, types
        self._known_inputs = dict(values)
        self._values: dict[str, Value | None] = {"": None}
        self._origins: dict[str, frozenset[str]] = {"": frozenset()}
        self._onnx = require_onnx()

    def module(self) -> Any:
        """The IRModule with the function "main", which returns a tuple of all outputs.

        Raises:
            OnnxError: a node cannot be converted.
            NeedsInputs: see the module.
        """
        to_array = self._onnx.numpy_helper.to_array
        for tensor in self._graph.initializer:
            self._values[tensor.name] = Known(to_array(tensor))
            self._origins[tensor.name] = frozenset()
        parameters: list[Any] = []
        for name, (shape, dtype) in self._types.items():
            self._origins[name] = frozenset({name})
            if name in self._known_inputs:
                self._values[name] = Known(self._known_inputs[name])
            else:
                variable = relax.Var(f"p{len(parameters)}", relax.TensorType(shape, dtype))
                self._values[name] = variable
                parameters.append(variable)
        problem: Exception | None = None
        with self.builder.function("main", parameters):
            with self.builder.dataflow():
                outputs = []
                try:
                    for proto in self._graph.node:
                        self._convert(proto)
                    outputs = [self._output(value.name) for value in self._graph.output]
                except (OnnxError, NeedsInputs) as error:
                    problem = error  # raised below: TVM prints a warning if a function is not ended
                result = self.builder.emit_output(relax.Tuple(outputs))
            self.builder.emit_func_output(result)
        if problem is not None:
            raise problem
        return self.builder.get()

    def origins(self, name: str) -> frozenset[str]:
        """The inputs of the graph on which a value depends."""
        return self._origins[name]

    def tensor(self, value: Value) -> relax.Expr:
        """A value as an expression: known numbers become a constant, or are computed from sizes."""
        if not isinstance(value, Known):
            return value
        if not value.symbolic:
            return array_constant(value.array)
        shape, sizes = value.array.shape, list(value.array.reshape(-1))

        def select(*sizes: Any) -> Any:
            def element(*index: Any) -> Any:
                place = sum(
                    (i * int(np.prod(shape[axis + 1 :])) for axis, i in enumerate(index)), tirx.IntImm("int64", 0)
                )
                result = sizes[-1]
                for number, size in reversed(list(enumerate(sizes[:-1]))):
                    result = tirx.if_then_else(place == number, size, result)
                return tirx.Cast("int64", result)

            return te.compute(shape, element, name="sizes")

        return self.builder.emit_te(select, *(tirx.IntImm("int64", s) if isinstance(s, int) else s for s in sizes))

    def _output(self, name: str) -> relax.Expr:
        if name not in self._values:
            raise OnnxError(f"the output {shorten(name)} is computed by no node")
        return self.builder.emit(self.tensor(self._values[name]))

    def _convert(self, proto: Any) -> None:
        for name in proto.input:
            if name not in self._values:
                raise OnnxError(
                    f"node {shorten(proto.name, 80)} ({proto.op_type}) reads {shorten(name)} before it is computed"
                )
        inputs = [self._values[name] for name in proto.input]
        attributes = {a.name: self._onnx.helper.get_attribute_value(a) for a in proto.attribute}
        node = Node(self, proto, inputs, attributes)
        results = self._folded(node)
        if results is None:
            results = self._called(node)
        origins = frozenset().union(*(self._origins[name] for name in proto.input))
        for name, result in zip(proto.output, results, strict=False):
            if name:
                self._values[name] = result if isinstance(result, Known) else node.emit(result)
                self._origins[name] = origins

    def _called(self, node: Node) -> Sequence[Value]:
        operator = self._operators.get(node.proto.op_type)
        if operator is None:
            raise node.error("this operator is not supported")
        try:
            results = operator(node)
        except (OnnxError, NeedsInputs):
            raise
        except Exception as error:  # TVM raises whatever its C++ code maps to
            raise node.error(f"cannot be converted ({one_line(error)})") from error
        return results if isinstance(results, list | tuple) else [results]

    def _folded(self, node: Node) -> Sequence[Value] | None:
        """The results of a node whose inputs are numbers; None if they are not, or the results might be large."""
        arrays = [value.array for value in node.inputs if isinstance(value, Known)]
        given, operator = sum(value is not None for value in node.inputs), node.proto.op_type
        if not given or len(arrays) < given or any(array.dtype == object for array in arrays):
            return None
        small = max(array.size for array in arrays) <= _SMALL and operator not in _GROWING
        if operator not in self._operators or not (small or operator in _REARRANGING):
            return None
        helper = self._onnx.helper
        names = [name for name in dict.fromkeys(node.proto.input) if name]
        values = dict(zip((n for n in node.proto.input if n), arrays, strict=True))
        make = helper.make_empty_tensor_value_info
        graph = helper.make_graph(
            [node.proto], "node", [make(n) for n in names], [make(n) for n in node.proto.output if n]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            from onnx.reference import ReferenceEvaluator

            with np.errstate(all="ignore"):
                found = iter(ReferenceEvaluator(model).run(None, values))
        except (
            Exception
        ):  # the evaluator does not implement everything, or the operator's own function says what is wrong
            return None
        return [Known(np.asarray(next(found))) if name else Known(np.zeros(0)) for name in node.proto.output]


def shape_of(expression: relax.Expr) -> list[Any]:
    """The shape of a tensor: whole numbers and TIR expressions."""
    type_ = expression.ty
    if not isinstance(type_, relax.TensorType) or type_.shape is None:
        raise OnnxError("the graph has a value of unknown shape, which is not supported")
    return [size.value if isinstance(size, tirx.IntImm) else size for size in type_.shape]


def dtype_name(element_type: int) -> str:
    """The name of a TensorProto.DataType.

    Raises:
        OnnxError: tensors may not have it.
    """
    onnx = require_onnx()
    try:
        name = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type)).name
    except (KeyError, ValueError, TypeError):
        name = f"number {element_type}"
    if name not in DTYPES or element_type == onnx.TensorProto.STRING:
        raise OnnxError(f"dtype {name} is not supported; supported are {', '.join(DTYPES)}")
    return name


def cast(node: Node, expression: relax.Expr, dtype: str) -> relax.Expr:
    """An expression in another dtype."""
    return expression if str(expression.ty.dtype) == dtype else node.emit(relax.op.astype(expression, dtype))


def equal_sizes(a: Any, b: Any) -> bool:
    """Whether two sizes are provably the same."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sym.Analyzer().can_prove_equal(a, b))


def is_size(expression: Any) -> bool:
    """Whether an expression is a sum or product of sizes."""
    if isinstance(expression, tirx.Add | tirx.Mul):
        return is_size(expression.a) and is_size(expression.b)
    return isinstance(expression, tirx.Var) or (isinstance(expression, tirx.IntImm) and expression.value >= 0)


def constant(number: float, dtype: str) -> relax.Expr:
    """A scalar."""
    return array_constant(np.array(number, numpy_dtype(dtype)))


def array_constant(array: np.ndarray) -> relax.Expr:
    """A constant tensor, in the array's dtype: `relax.const` makes int32 of int64."""
    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)))
