"""TIR statements to SPIR-V: stores, bindings, threads, structured control flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.analysis import UNROLL_LIMIT
from tvm_attn.vulkan.codegen.calls import Calls
from tvm_attn.vulkan.codegen.interface import Interface
from tvm_attn.vulkan.codegen.values import INT32, Value, from_tvm, number

_UNROLLED = 3


class Statements(Calls):
    """Visits the body of a kernel."""

    interface: Interface

    def run(self, interface: Interface, parameters: Any, body: Any) -> None:
        """Emits the kernel; `parameters` are the scalar ones by position."""
        self.interface = interface
        for index, parameter in enumerate(parameters):
            if not hasattr(parameter.ty, "element_type"):
                self.variables[parameter.__chandle__()] = interface.scalar(index)
        if any(tag.startswith("blockIdx") for tag in self.analysis.threads):
            interface.leave_outside_grid()
        self.statement(body)

    def statement(self, node: Any) -> None:
        """Emits one statement, unless it cannot be reached."""
        if self.builder.terminated:
            return
        method: Callable[[Any], None] | None = getattr(self, f"_stmt_{type(node).__name__}", None)
        if method is None:
            raise CompileError(f"statements of kind {type(node).__name__} are not supported")
        method(node)

    def _stmt_SeqStmt(self, node: Any) -> None:
        for statement in node.seq:
            self.statement(statement)

    def _stmt_Evaluate(self, node: Any) -> None:
        if type(node.value).__name__ == "Call":
            self.effect(node.value)

    def _stmt_Bind(self, node: Any) -> None:
        self.bind(node.var, node.value)

    def _stmt_BufferStore(self, node: Any) -> None:
        view = self.view(node.buffer)
        value = self.expr(node.value)
        if getattr(node, "predicate", None) is not None:
            raise CompileError(f"a predicated store to buffer {view.root.name} is not supported; use if")
        self.memory.store(view, self.index(view, node.indices), value)

    def _stmt_AllocBuffer(self, node: Any) -> None:
        """Emits nothing: the analysis has declared the allocation."""

    _stmt_DeclBuffer = _stmt_AllocBuffer

    def _stmt_AssertStmt(self, node: Any) -> None:
        """Emits nothing: shaders cannot report a failure, so an assertion is taken as true."""

    def _stmt_AttrStmt(self, node: Any) -> None:
        if node.attr_key == "thread_extent":
            var = node.node.var
            self.variables[var.__chandle__()] = self.interface.thread(str(node.node.thread_tag), from_tvm(var.ty.dtype))
        self.statement(node.body)

    # Control flow -----------------------------------------------------------------------------------------------

    def _stmt_IfThenElse(self, node: Any) -> None:
        condition = self.expr(node.condition)
        known = self.arith.literal(condition)
        if known is not None:
            taken = node.then_case if known else node.else_case
            if taken is not None:
                self.statement(taken)
            return
        choice = self.choice(node)
        if choice is not None and self.is_deep(choice):
            for guard, leaf in self.flattened(choice):
                self.builder.branch(guard.id, partial(self.statement, leaf))
            return
        otherwise = node.else_case
        self.builder.branch(
            condition.id,
            lambda: self.statement(node.then_case),
            None if otherwise is None else lambda: self.statement(otherwise),
        )

    def _stmt_For(self, node: Any) -> None:
        low, extent = self.expr(node.min), self.expr(node.extent)
        dtype = low.dtype
        step = self.arith.constant(dtype, 1) if node.step is None else self.expr(node.step)
        handle = node.loop_var.__chandle__()
        count = number(node.extent)
        fact = self.facts.of(node.loop_var)
        narrow = dtype.bits == 64 and low.narrow and extent.narrow and fact.fits_int32 and fact.high < (1 << 31) - 1
        if narrow:
            low, extent = self._as32(low), self._as32(extent)
            step = self.arith.constant(INT32, 1) if node.step is None else self.low32(node.step)
        low, extent, step = self.arith.wide(low), self.arith.wide(extent), self.arith.wide(step)
        arithmetic = low.dtype

        def bodies(first: Value, number_of: int) -> None:
            for offset in range(number_of):
                place = self.arith.binary("add", first, self.arith.constant(arithmetic, offset))
                self.variables[handle] = Value(dtype, place.parts, narrow)
                self.statement(node.body)

        copies = self.analysis.copies.get(handle, 1)
        if count is not None and count <= copies and node.step is None and handle not in self.analysis.left:
            bodies(low, count)
            return
        rest = 0 if count is None else count % copies
        step = self.arith.binary("mul", step, self.arith.constant(arithmetic, copies))
        end = self.arith.binary("add", low, self.arith.binary("sub", extent, self.arith.constant(arithmetic, rest)))
        hint = count is not None and count <= UNROLL_LIMIT and handle in self.analysis.unroll
        control = "Unroll" if hint or node.kind == _UNROLLED else "None"
        self.memory.invalidate()
        self.builder.loop(
            [low.id],
            lambda values: self.arith.compare("lt", Value(arithmetic, values), end).id,
            lambda values: bodies(Value(arithmetic, values), copies),
            lambda values: [self.arith.binary("add", Value(arithmetic, values), step).id],
            control,
        )
        self.memory.invalidate()
        bodies(end, rest)

    def _stmt_While(self, node: Any) -> None:
        self.memory.invalidate()
        self.builder.loop(
            [],
            lambda _: self.expr(node.condition).id,
            lambda _: self.statement(node.body),
            lambda _: [],
            simple=False,
        )
        self.memory.invalidate()

    def _stmt_Break(self, node: Any) -> None:
        if not self.builder.in_loop:
            raise CompileError("break is outside of a loop")
        self.builder.break_()

    def _stmt_Continue(self, node: Any) -> None:
        if not self.builder.in_loop:
            raise CompileError("continue is outside of a loop")
        self.builder.continue_()

    def _stmt_Return(self, node: Any) -> None:
        self.builder.emit("Return", None)
