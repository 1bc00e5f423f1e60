"""Compiles ONNX graphs made of attention blocks, and runs them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir import dlight

from tvm_attn.compiler.devices import backend_for
from tvm_attn.compiler.kernel_cache import compiled_kernel
from tvm_attn.errors import CompileError, DeviceError, OnnxError, TargetError, TvmAttnError, one_line, shorten
from tvm_attn.jsonfile import shorten_path
from tvm_attn.onnx import require_onnx
from tvm_attn.onnx.converter import Converter, NeedsInputs, Types, dtype_name
from tvm_attn.onnx.operators import OPERATORS
from tvm_attn.onnx.reader import read_onnx
from tvm_attn.runtime.device import parse_device
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.machine import thread_count
from tvm_attn.storage import numpy_dtype
from tvm_attn.targets import CudaTarget, resolve

_CONVERTED = 13
"""Graphs of older opsets, where axes are attributes, are converted to this one."""
_DOMAINS = ("", "ai.onnx")
_KEPT = 16
"""How many versions of a graph a session keeps, if each set of shapes needs its own."""
_VALUE_ELEMENTS = 4096
"""Most elements of an input that is compiled into the graph."""


def compile(model: Any, target: str = "cpu", device: str | None = None) -> Session:
    """Compiles a graph of ai.onnx operators, such as an attention block, an encoder or a decoder layer.

    Args:
        model: a ModelProto, or the path of a file.
        target: "cpu", "vulkan", or the name of a file in `targets/`, as for `tvm-attn build`.
        device: where to run: "cpu", "vulkan:0"; default: the first device of the target's class.

    Returns:
        A `Session`, which runs it.

    Raises:
        OnnxError: the file is not valid, or the graph has something that is not supported; the error names the first
            such node.
        TargetError, DeviceError: the target or the device is unknown, or absent.
        CompileError: TVM failed.
    """
    return Session(model, target, device)


# Relax's pipeline "zero" without FoldConstant, which compiles a program for every constant that it computes.
_FUSE = tvm.transform.Sequential(
    [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
)


@dataclass(frozen=True)
class _Version:
    """A graph that is compiled for some shapes or all.

    Attributes:
        machine: the virtual machine with its function.
        parameters: the inputs that the function takes.
        kernels: the modules of our kernels that it calls.
    """

    machine: Any
    parameters: list[str]
    kernels: list[Any]


class Session:
    """A compiled graph. Calls from several threads must take turns.

    Sizes that the graph names stay symbolic, so one version serves all shapes. If the graph's structure depends on the
    sizes, or on the values of some inputs (a shape that is an input), a version is compiled at the first call with
    them, and the last ones are kept.

    Attributes:
        inputs, outputs: the names of the graph's inputs and outputs, in order.
        symbolic: whether one version serves all shapes.
    """

    def __init__(self, model: Any, target: str = "cpu", device: str | None = None) -> None:
        self._target = resolve(target)
        chosen = parse_device(device or ("cpu" if self._target.device == "cpu" else f"{self._target.device}:0"))
        if chosen is None or chosen[0] != self._target.device:
            raise DeviceError(f"device {shorten(device)} cannot run code for target {shorten(target)}")
        if isinstance(self._target, CudaTarget):
            raise TargetError("graphs are compiled for processors and Vulkan devices; choose the target cpu or vulkan")
        if obstacle := device_class(chosen[0]).obstacle(chosen[1]):
            raise DeviceError(f"{chosen[0]}:{chosen[1]} cannot be used: {obstacle}")
        self._device = tvm.runtime.device(*chosen)
        model = _prepared(model)
        self._graph = model.graph
        self._opset = next(entry.version for entry in model.opset_import if entry.domain in _DOMAINS)
        stored = {tensor.name for tensor in self._graph.initializer}
        self._values = [value for value in self._graph.input if value.name not in stored]
        self.inputs = tuple(value.name for value in self._values)
        self.outputs = tuple(value.name for value in self._graph.output)
        self._dtypes = {value.name: _dtype(value) for value in self._values}
        self._needed: frozenset[str] | None = None
        self._versions: OrderedDict[Any, _Version] = OrderedDict()
        try:
            self._whole: _Version | None = self._compiled(_symbolic(self._values, self._dtypes), {})
        except NeedsInputs as error:
            self._whole, self._needed = None, error.names
        self.symbolic = self._whole is not None

    def __call__(self, *arrays: Any, **named: Any) -> tuple[np.ndarray, ...]:
        """The outputs for inputs in the graph's order, or by name; arrays or anything that NumPy converts."""
        if len(arrays) > len(self.inputs):
            raise OnnxError(f"{len(arrays)} inputs were given; the graph has {len(self.inputs)}")
        return tuple(self.run(dict(zip(self.inputs, arrays, strict=False)) | named))

    def run(self, feeds: Mapping[str, Any]) -> list[np.ndarray]:
        """The outputs, in the graph's order.

        Args:
            feeds: every input by name.

        Raises:
            OnnxError: an input is missing, unknown, or of another dtype or shape.
        """
        if set(feeds) != set(self.inputs):
            missing, unknown = set(self.inputs) - set(feeds), set(feeds) - set(self.inputs)
            raise OnnxError(
                f"the inputs are {', '.join(self.inputs)}; missing: {sorted(missing)}, unknown: {sorted(unknown)}"
            )
        arrays = {name: self._checked(value, feeds[value.name]) for value in self._values for name in [value.name]}
        version = self._whole or self._version(arrays)
        tensors = [tvm.runtime.tensor(arrays[name], self._device) for name in version.parameters]
        try:
            if self._target.device == "cpu":
                for kernel in version.kernels:
                    kernel.get_function("set_threads", query_imports=True)(thread_count(None))
            results = version.machine["main"](*tensors)
        except Exception as error:
            raise OnnxError(f"the graph cannot run with these inputs: {one_line(error)}") from error
        return [result.numpy() for result in results]

    def _checked(self, value: Any, given: Any) -> np.ndarray:
        """An input as an array of its dtype, whose shape fits."""
        array = np.asarray(given)
        if array.dtype != numpy_dtype(self._dtypes[value.name]):
            raise OnnxError(f"input {shorten(value.name)} has dtype {array.dtype}, not {self._dtypes[value.name]}")
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
        fixed = value.type.tensor_type.HasField("shape")
        fits = len(sizes) == array.ndim and all(s in (None, n) for s, n in zip(sizes, array.shape, strict=True))
        if fixed and not fits:
            raise OnnxError(f"input {shorten(value.name)} has shape {array.shape}, not {tuple(sizes)}")
        return np.ascontiguousarray(array).reshape(array.shape)

    def _version(self, arrays: dict[str, np.ndarray]) -> _Version:
        """The version for these shapes, and these values of the inputs that it needs."""
        types = {name: (array.shape, self._dtypes[name]) for name, array in arrays.items()}
        for _ in range(len(arrays) + 1):
            needed = self._needed or frozenset()
            for name in needed:
                if arrays[name].size > _VALUE_ELEMENTS:
                    raise OnnxError(f"shapes depend on the input {shorten(name)}, which is too large for that")
            key = tuple((name, types[name][0], arrays[name].tobytes() if name in needed else None) for name in arrays)
            if key in self._versions:
                self._versions.move_to_end(key)
                return self._versions[key]
            try:
                version = self._compiled(types, {name: arrays[name] for name in needed})
            except NeedsInputs as error:
                if error.names <= needed:
                    raise OnnxError(error.why) from error
                self._needed = needed | error.names
                continue
            self._versions[key] = version
            if len(self._versions) > _KEPT:
                self._versions.popitem(last=False)
            return version
        raise AssertionError("each round needs the value of one more input")

    def _compiled(self, types: Types, values: Mapping[str, np.ndarray]) -> _Version:
        """The graph for these types of inputs, and these values of some."""
        converter = Converter(self._graph, self._opset, OPERATORS, types, values, self._target.name)
        module = converter.module()
        try:
            kernels = [_callable(name, kernel, self._target) for name, kernel in converter.kernels.items()]
            machine = relax.VirtualMachine(_built(module, self._target), self._device)
            return _Version(machine, [name for name in types if name not in values], kernels)
        except TvmAttnError:
            raise
        except Exception as error:  # TVM raises whatever its C++ code maps to
            raise CompileError(f"compiling for {self._target.name} failed: {one_line(error)}") from error


def _callable(name: str, kernel: Any, target: Any) -> Any:
    """The compiled kernel's module. Its function gets a global name, by which graphs call it."""
    module = compiled_kernel(kernel, target)
    tvm_ffi.register_global_func(name, module["main"], override=True)
    return module


def _built(module: Any, target: Any) -> Any:
    """The executable of a Relax module whose functions TVM schedules."""
    backend = backend_for(target)
    plain = target
    if "avx512f" in getattr(target, "features", ()):
        # LLVM 22 vectorizes some indices with `%` wrongly for AVX-512 (a test of Tile finds it), but not for AVX2.
        plain = replace(target, tvm={**target.tvm, "mattr": [*target.tvm.get("mattr", ()), "-avx512f"]})
    tvm_target = backend.tvm_target(plain)
    with tvm_target:
        module = _FUSE(module)
        if backend.host(target) is not None:
            module = _without_empty_loops(module)
            rules = (dlight.gpu.Matmul(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
            module = dlight.ApplyDefaultSchedule(*rules)(module)
    return tvm.compile(module, target=tvm_target)


@tvm.transform.module_pass(opt_level=0, name="WithoutEmptyLoops")
def _without_empty_loops(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Functions whose result has no elements do nothing: DLight divides by the extents of their loops."""
    functions = dict(module.functions_items())
    for variable, function in functions.items():
        if isinstance(function, tirx.PrimFunc) and function.params:
            type_ = function.params[-1].ty
            if isinstance(type_, tirx.BufferType) and any(
                isinstance(s, tirx.IntImm) and not s.value for s in type_.shape
            ):
                idle = function.with_body(tirx.Evaluate(tirx.IntImm("int32", 0)))
                functions[variable] = idle.with_attr("tirx.is_scheduled", True)
    return tvm.IRModule(functions)


def _prepared(model: Any) -> Any:
    """A valid ModelProto of supported operators, its functions expanded.

    Raises:
        OnnxError: it is not valid, or a node is not supported.
    """
    onnx = require_onnx()
    if not isinstance(model, onnx.ModelProto):
        read_onnx(model)  # checks everything that can be wrong with a file before it is loaded as a whole
        try:
            model = onnx.load(model)
        except Exception as error:  # protobuf's errors, and those of external data
            raise OnnxError(f"{shorten_path(model)} is not a readable ONNX file ({one_line(error)})") from error
    from onnx import inliner, version_converter

    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset, newest = versions.get("", versions.get("ai.onnx")), onnx.defs.onnx_opset_version()
    if opset is None or not 1 <= opset <= newest:
        raise OnnxError(f"opset {opset} of ai.onnx is not supported, only 1 to {newest} with onnx {onnx.__version__}")
    model = inliner.inline_local_functions(model)
    if opset < _CONVERTED:
        try:
            model, opset = version_converter.convert_version(model, _CONVERTED), _CONVERTED
        except Exception as error:  # of C++, of various types
            raise OnnxError(f"opset {opset} cannot be converted to {_CONVERTED} ({one_line(error)})") from error
    while functions := _functions(onnx, model.graph, opset):
        model = inliner.inline_selected_functions(model, sorted(functions), inline_schema_functions=True)
    return model


def _functions(onnx: Any, graph: Any, opset: int) -> set[tuple[str, str]]:
    """The operators of a graph that must be replaced by the functions that define them.

    Raises:
        OnnxError: a node is not supported and has no such function.
    """
    found = set()
    for node in graph.node:
        where = f"node {shorten(node.name or ''.join(node.output[:1]), 80)} ({shorten(node.op_type, 60)})"
        if node.domain not in _DOMAINS:
            raise OnnxError(f"{where}: the domain {shorten(node.domain)} is not supported, only ai.onnx")
        if node.op_type in OPERATORS:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset)
        except Exception:
            raise OnnxError(f"{where}: opset {opset} has no such operator") from None
        if not (schema.has_function or schema.has_context_dependent_function):
            raise OnnxError(f"{where}: this operator is not supported")
        found.add(("", node.op_type))
    return found


def _dtype(value: Any) -> str:
    if value.type.WhichOneof("value") != "tensor_type":
        raise OnnxError(f"input {shorten(value.name)} is no tensor, which is not supported")
    return dtype_name(value.type.tensor_type.elem_type)


def _symbolic(values: list[Any], dtypes: Mapping[str, str]) -> dict[str, tuple[tuple[Any, ...], str]]:
    """The inputs' types as the graph declares them; sizes with the same name are the same, unnamed ones differ."""
    variables: dict[str, tirx.Var] = {}
    fresh = itertools.count()
    types = {}
    for value in values:
        if not value.type.tensor_type.HasField("shape"):
            raise NeedsInputs(frozenset(), f"input {shorten(value.name)} has no declared shape")
        shape = []
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_value"):
                shape.append(size.dim_value)
                continue
            total: Any = None
            for name in (size.dim_param or f" {next(fresh)}").split(" + "):  # exporters write sums of sizes
                variable = variables.setdefault(name, tirx.Var(f"n{len(variables)}", "int64"))
                total = variable if total is None else total + variable
            shape.append(total)
        types[value.name] = (tuple(shape), dtypes[value.name])
    return types
