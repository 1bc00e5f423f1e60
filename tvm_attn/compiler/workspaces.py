"""Puts the scratch memory of kernels into Relax's memory plan, instead of a pool of the thread that starts them.

A kernel that allocates global memory takes it from TVM's pool when it is started. The pool gives memory back to the
device when a later kernel needs more, or when its thread ends, and two streams of one thread get the same memory. A
CUDA graph keeps the address that it was captured with. So here the buffer becomes a parameter of the kernel, and every
call passes a tensor that is planned like the other intermediates.

A buffer that a function fills with zeros first and leaves so (`ZEROED`) becomes a constant of zeros instead, and the
function loses its first kernel: each virtual machine has its own copies of constants, so models share none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_attn.errors import CompileError
from tvm_attn.kernels.base import ZEROED


@tvm.transform.module_pass(opt_level=0, name="PlanWorkspaces")
def plan_workspaces(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Gives TIRx kernels their scratch memory as parameters. Runs after CallTIRRewrite, before memory is planned.

    TIRx kernels carry `tirx.is_scheduled`; S-TIR kernels stay as they are.

    Raises:
        CompileError: the size of a workspace is not static.
    """
    functions = dict(module.functions_items())
    kernels = {
        variable: function
        for variable, function in functions.items()
        if isinstance(function, tirx.PrimFunc)
        and function.attrs
        and function.attrs.get("tirx.is_scheduled", False)
        and _buffers(function)
    }
    if not kernels:
        return module
    # A function's variable has the function's type, so changed functions get new variables.
    passer = _Passer(tvm.IRModule({key: value for key, value in functions.items() if key not in kernels}))
    for variable, function in kernels.items():
        passer.add(variable, function)
    for variable, function in functions.items():
        if isinstance(function, relax.Function):
            passer.builder_.update_func(variable, passer.visit_expr(function))
    return passer.builder_.get()


def allocates(function: tirx.PrimFunc) -> bool:
    """Whether a kernel takes scratch memory from the pool."""
    if isinstance(function.body, s_tir.SBlockRealize):
        return any(buffer.scope() in ("", "global") for buffer in function.body.block.alloc_buffers)
    return any(map(_is_global, _statements(function)))


def _statements(function: tirx.PrimFunc) -> list[tirx.Stmt]:
    """The host's statements: those around the kernels."""
    return list(function.body.seq) if isinstance(function.body, tirx.SeqStmt) else [function.body]


def _is_global(statement: tirx.Stmt) -> bool:
    return isinstance(statement, tirx.AllocBuffer) and statement.buffer.scope() == "global"


def _is_kernel(statement: tirx.Stmt) -> bool:
    return isinstance(statement, tirx.AttrStmt) and statement.attr_key == "tirx.device_entry"


def _buffers(function: tirx.PrimFunc) -> list[tirx.Buffer]:
    """The scratch memory that a TIRx function allocates."""
    return [statement.buffer for statement in _statements(function) if _is_global(statement)]


def with_parameters(name: str, function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with the buffers that it allocates as its last parameters; one that it zeroes is zeroed already.

    Args:
        name: its name, for the error.
        function: a TIRx function.

    Raises:
        CompileError: the size of a buffer is not static.
    """
    buffers = _buffers(function)
    for buffer in buffers:
        if not all(isinstance(size, tirx.IntImm) for size in buffer.shape):
            raise CompileError(f"the workspace {buffer.name!r} of kernel {name!r} has no static size")
    rest = [statement for statement in _statements(function) if not _is_global(statement)]
    if ZEROED in function.attrs:
        del rest[next(index for index, statement in enumerate(rest) if _is_kernel(statement))]
    body = tirx.SeqStmt(rest) if len(rest) > 1 else rest[0]
    return tirx.PrimFunc([*function.params, *buffers], body, function.ret_type, function.attrs).without_attr(ZEROED)


@mutator
class _Passer(PyExprMutator):
    """Passes a new tensor for each workspace of the kernel that is called."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self._kernels: dict[Any, tuple[Any, list[tirx.Buffer | relax.Expr]]] = {}

    def add(self, variable: tvm.ir.GlobalVar, function: tirx.PrimFunc) -> None:
        """Adds a kernel whose allocations become parameters."""
        name, zeroed = variable.name_hint, function.attrs.get(ZEROED, None)
        kernel = self.builder_.add_func(with_parameters(name, function), name)
        self._kernels[variable] = (
            kernel,
            [_zeros(buffer) if buffer.name == zeroed else buffer for buffer in _buffers(function)],
        )

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """See `PyExprMutator`."""
        if call.op not in self._kernels:
            return super().visit_call_(call)
        kernel, scratch = self._kernels[call.op]
        tensors = [self._new(entry) if isinstance(entry, tirx.Buffer) else entry for entry in scratch]
        return relax.Call(kernel, [*(self.visit_expr(argument) for argument in call.args), *tensors])

    def _new(self, buffer: tirx.Buffer) -> relax.Expr:
        shape = relax.ShapeExpr([int(size) for size in buffer.shape])
        return self.builder_.emit(relax.op.builtin.alloc_tensor(shape, str(buffer.dtype), 0, "global"))


def _zeros(buffer: tirx.Buffer) -> relax.Expr:
    dtype = str(buffer.dtype)
    return relax.const(np.zeros([int(size) for size in buffer.shape], dtype), dtype)
