"""Puts the scratch memory of kernels into Relax's memory plan, instead of a pool of the thread that starts them.

A kernel that allocates global memory takes it from TVM's pool when it is started. The pool gives memory back to the
device when a later kernel needs more, or when its thread ends, and two streams of one thread get the same memory. A
CUDA graph keeps the address that it was captured with. So here the buffer becomes a parameter of the kernel, and every
call passes a tensor that is planned like the other intermediates.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_attn.errors import CompileError


@tvm.transform.module_pass(opt_level=0, name="PlanWorkspaces")
def plan_workspaces(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Gives TIRx kernels their scratch memory as parameters. Runs after CallTIRRewrite, before memory is planned.

    TIRx kernels carry `tirx.is_scheduled`; S-TIR kernels stay as they are.

    Raises:
        CompileError: the size of a workspace is not static.
    """
    functions = dict(module.functions_items())
    workspaces: dict[Any, list[tirx.Stmt]] = {}
    for variable, function in functions.items():
        if isinstance(function, tirx.PrimFunc) and function.attrs and function.attrs.get("tirx.is_scheduled", False):
            allocated = [statement for statement in _statements(function) if _is_global(statement)]
            if allocated:
                workspaces[variable] = allocated
    if not workspaces:
        return module
    # A function's variable has the function's type, so changed functions get new variables.
    passer = _Passer(tvm.IRModule({key: value for key, value in functions.items() if key not in workspaces}))
    for variable, allocated in workspaces.items():
        passer.add(variable, _with_parameters(variable.name_hint, functions[variable], allocated), allocated)
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


def _with_parameters(name: str, function: tirx.PrimFunc, allocated: list[tirx.Stmt]) -> tirx.PrimFunc:
    """The function with the allocated buffers added after its parameters."""
    for statement in allocated:
        if not all(isinstance(size, tirx.IntImm) for size in statement.buffer.shape):
            raise CompileError(f"the workspace {statement.buffer.name!r} of kernel {name!r} has no static size")
    rest = [s for s in _statements(function) if not any(s.same_as(statement) for statement in allocated)]
    parameters = [*function.params, *(statement.buffer for statement in allocated)]
    body = tirx.SeqStmt(rest) if len(rest) > 1 else rest[0]
    return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)


@mutator
class _Passer(PyExprMutator):
    """Passes a new tensor for each workspace of the kernel that is called."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self._kernels: dict[Any, tuple[Any, list[tirx.Stmt]]] = {}

    def add(self, variable: tvm.ir.GlobalVar, function: tirx.PrimFunc, allocated: list[tirx.Stmt]) -> None:
        """Adds a kernel whose allocations have become parameters."""
        self._kernels[variable] = self.builder_.add_func(function, variable.name_hint), allocated

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """See `PyExprMutator`."""
        if call.op not in self._kernels:
            return super().visit_call_(call)
        kernel, allocated = self._kernels[call.op]
        tensors = []
        for statement in allocated:
            shape = relax.ShapeExpr([int(size) for size in statement.buffer.shape])
            dtype = str(statement.buffer.dtype)
            tensors.append(self.builder_.emit(relax.op.builtin.alloc_tensor(shape, dtype, 0, "global")))
        return relax.Call(kernel, [*(self.visit_expr(argument) for argument in call.args), *tensors])
