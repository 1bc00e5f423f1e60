"""Merging kernels that run one after the other into one.

A call through Relax's virtual machine takes about 4 us; a layer of decode is eleven kernels, most of them little more.
A Relax function with the attribute "Primitive" becomes one TensorIR function here: the loops of its kernels follow each
other. A parallel loop is over when its pieces are done, so there are no barriers, and what a kernel does serially, the
thread that calls does.

Relax's own FuseTIR does not accept a call that updates an argument in place and also returns another tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import ir, relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm_ffi.structural import structural_map


@tvm.transform.module_pass(opt_level=0, name="FusePrimitiveFunctions")
def fuse_primitive_functions(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Replaces every Relax function with the attribute "Primitive", a sequence of kernel calls, by one kernel."""
    primitive = {
        variable: function
        for variable, function in module.functions_items()
        if isinstance(function, relax.Function) and function.attrs and "Primitive" in function.attrs
    }
    replacer = _CallReplacer(module)
    for variable, function in primitive.items():
        replacer.add(variable, _Fusion(module, function))
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function) and variable not in primitive:
            replaced = replacer.visit_expr(function)
            if not replaced.same_as(function):
                replacer.builder_.update_func(variable, replaced)
    functions = replacer.builder_.get().functions_items()
    return tvm.IRModule({variable: function for variable, function in functions if variable not in primitive})


class _Fusion:
    """One Relax function with the attribute "Primitive" as a TensorIR function.

    Attributes:
        function: the TensorIR function; its parameters are those of the Relax function, then its fresh results.
        in_place: for every result, the index of the parameter that it updates, or -1.
    """

    def __init__(self, module: tvm.IRModule, function: relax.Function) -> None:
        self._module = module
        self._sizes: dict[str, tirx.Var] = {}
        self._values: dict[relax.Var, Any] = {}  # a buffer, or a list of them for a tuple
        self._temporaries: list[Any] = []
        self._statements: list[tirx.Stmt] = []
        for parameter in function.params:
            self._values[parameter] = self._buffer(parameter.ty, parameter.name)
        parameters = [self._values[parameter] for parameter in function.params]
        for block in function.body.blocks:
            for binding in block.bindings:
                self._values[binding.var] = self._value(binding.value, binding.var.name)
        results = self._value(function.body.body, "")
        self.in_place = [next((i for i, p in enumerate(parameters) if p.same_as(result)), -1) for result in results]
        fresh = [result for result, place in zip(results, self.in_place, strict=True) if place < 0]
        inner = [buffer for buffer in self._temporaries if not any(buffer.same_as(result) for result in fresh)]
        root = s_tir.SBlock([], [], [], "root", tirx.SeqStmt(self._statements), alloc_buffers=inner)
        body = s_tir.SBlockRealize([], tirx.const(True), root)
        self.function = tirx.PrimFunc([*parameters, *fresh], body).with_attr("s_tir", True)

    def _buffer(self, kind: relax.TensorType, name: str) -> Any:
        """A buffer for a tensor; symbolic sizes of the same name are one int32 variable."""
        shape = []
        for size in kind.shape.values:
            if isinstance(size, tirx.Var):
                size = self._sizes.setdefault(size.name, tirx.Var(size.name, "int32"))
            shape.append(size if isinstance(size, tirx.Var) else tirx.IntImm("int32", int(size)))
        return tirx.decl_buffer(shape, kind.dtype, name.replace(".", "_"))

    def _value(self, value: relax.Expr, name: str) -> Any:
        if isinstance(value, relax.Var):
            return self._values[value]
        if isinstance(value, relax.Tuple):
            return [self._value(field, name) for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value, name)[value.index]
        return self._call(value, name)

    def _call(self, call: relax.Call, name: str) -> Any:
        """Adds the kernel of a call_tir or call_tir_inplace, and returns the buffers of its results."""
        variable, arguments = call.args[0], [self._value(argument, name) for argument in call.args[1].fields]
        (kind,) = call.ty_args
        kinds = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
        places = [-1] * len(kinds)
        if call.op.name == "relax.call_tir_inplace":
            places = [int(place) for place in call.attrs.inplace_indices]
        results = [
            arguments[place] if place >= 0 else self._buffer(kind, f"{name}_{i}")
            for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
        ]
        fresh = [result for result, place in zip(results, places, strict=True) if place < 0]
        self._temporaries += fresh
        # The same kernel may be called again, so its variables must be new each time.
        kernel = s_tir.renew_defs(self._module[variable])
        buffers = dict(zip(kernel.params, [*arguments, *fresh], strict=True))
        sizes = {
            size: given
            for own, buffer in buffers.items()
            for size, given in zip(own.ty.shape, buffer.ty.shape, strict=True)
            if isinstance(size, tirx.Var)
        }
        root = _substitute(kernel.body, {**buffers, **sizes}).block
        self._temporaries += list(root.alloc_buffers)
        self._statements += list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
        return results if isinstance(kind, relax.TupleType) else results[0]


def _substitute(body: tirx.Stmt, variables: dict[Any, Any]) -> Any:
    """The statement with variables replaced (buffers are variables too)."""
    return structural_map(body, (ir.Var, lambda variable: variables.get(variable, variable)))


@mutator
class _CallReplacer(PyExprMutator):
    """Turns calls of the fused functions into calls of their kernels."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self._fused: dict[Any, tuple[Any, Sequence[int]]] = {}

    def add(self, variable: tvm.ir.GlobalVar, fusion: _Fusion) -> None:
        """Adds the kernel of a fused function."""
        name = f"{variable.name_hint}_kernel"
        kernel = self.builder_.add_func(fusion.function.with_attr("global_symbol", name), name)
        self._fused[variable] = kernel, fusion.in_place

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """See `PyExprMutator`."""
        if call.op not in self._fused:
            return super().visit_call_(call)
        kernel, in_place = self._fused[call.op]
        arguments = relax.Tuple([self.visit_expr(argument) for argument in call.args])
        return relax.op.call_tir_inplace(kernel, arguments, list(in_place), list(call.ty.fields))
