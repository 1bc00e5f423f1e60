"""TIR operators that are calls: control, barriers, bits, external names. Mathematics is in `mathematics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.mathematics import Mathematics
from tvm_attn.vulkan.codegen.matrices import MatrixCalls
from tvm_attn.vulkan.codegen.spirv import GLSL_BY_NUMBER
from tvm_attn.vulkan.codegen.threads import SUBGROUP, WORKGROUP
from tvm_attn.vulkan.codegen.values import INT32, DType, Value, number, text

# Annotations that inform TVM's passes and do nothing.
_NOTHING = frozenset(("tirx.assume", "tirx.prefetch", "tirx.type_annotation"))
_TRANSPARENT = frozenset(("prim.likely", "tirx.likely", "tirx.tvm_thread_invariant", "tirx.ignore_loop_partition"))
_ATOMICS = {
    "atomicAdd": "add",
    "atomicMin": "min",
    "atomicMax": "max",
    "atomicAnd": "and",
    "atomicOr": "or",
    "atomicXor": "xor",
    "atomicExch": "exchange",
}


class Calls(MatrixCalls):
    """Visits calls."""

    def _Call(self, node: Any) -> Value:
        name = str(getattr(node.op, "name", node.op))
        method: Callable[[Any], Value] | None = getattr(self, "_call_" + name.replace(".", "_"), None)
        if method is not None:
            return method(node)
        if name in _TRANSPARENT:
            return self.expr(node.args[0])
        short = name.rpartition(".")[2]
        if short in Mathematics.NAMES:
            return self._mathematics(short, node.args, node)
        raise CompileError(f"the operator {name} is not supported; docs/vulkan-operators.md lists those that are")

    def _mathematics(self, name: str, arguments: Any, node: Any) -> Value:
        return Mathematics(self.arith).call(name, [self.expr(argument) for argument in arguments], self.dtype(node))

    def effect(self, node: Any) -> None:
        """Emits a call whose value nobody reads."""
        name = str(getattr(node.op, "name", node.op))
        method: Callable[[Any], None] | None = getattr(self, "_effect_" + name.replace(".", "_"), None)
        if method is not None:
            method(node)
        elif name not in _NOTHING:
            self.expr(node)

    # Control ----------------------------------------------------------------------------------------------------

    def _call_prim_if_then_else(self, node: Any) -> Value:
        return self.if_then_else(*node.args)

    _call_tirx_if_then_else = _call_prim_if_then_else

    def _effect_tirx_thread_return(self, node: Any) -> None:
        self.builder.emit("Return", None)

    def _effect_tirx_break_loop(self, node: Any) -> None:
        self.builder.break_()

    def _effect_tirx_continue_loop(self, node: Any) -> None:
        self.builder.continue_()

    def _effect_tirx_tvm_storage_sync(self, node: Any) -> None:
        scope = text(node.args[0])
        if scope != "warp" and not scope.startswith("shared"):
            raise CompileError(
                f'tvm_storage_sync("{scope}") is not supported; no barrier spans the workgroups of a dispatch'
            )
        threads = SUBGROUP if scope == "warp" and self.analysis.subgroup is not None else WORKGROUP
        if scope == "warp" and threads == WORKGROUP and self.builder.nested:
            # Outside branches and loops, a barrier of the whole workgroup works.
            raise CompileError(
                'tvm_storage_sync("warp") in a branch or loop, but the target does not say how large a warp is; '
                "set its thread_warp_size"
            )
        semantics = ["AcquireRelease", "WorkgroupMemory"]
        if self.memory.vulkan_model:
            semantics += ["MakeAvailable", "MakeVisible"]
        if any(root.scope == "global" and root.reads and root.writes for root in self.analysis.roots):
            semantics.append("UniformMemory")
        self.builder.barrier(threads, threads, semantics)
        self.memory.invalidate("global")
        self.memory.invalidate("shared")

    # External names ---------------------------------------------------------------------------------------------

    def _call_tirx_call_pure_extern(self, node: Any) -> Value:
        name = text(node.args[0])
        if name in _ATOMICS:
            return self.atomic(_ATOMICS[name], node.args[1], node.args[2])
        for candidate in (name, name.removesuffix("f")):
            if candidate in Mathematics.NAMES:
                return self._mathematics(candidate, node.args[1:], node)
        raise CompileError(
            f"the external function {name} does not exist on Vulkan; docs/vulkan-operators.md lists operators"
        )

    _call_tirx_call_extern = _call_tirx_call_pure_extern

    def _call_tirx_call_spirv_pure_glsl450(self, node: Any) -> Value:
        opcode = number(node.args[0])
        name = None if opcode is None else GLSL_BY_NUMBER.get(opcode)
        if name is None:
            raise CompileError(f"instruction {opcode} of GLSL.std.450 is not supported; use TIR's operators")
        return self.arith.glsl(name, self.dtype(node), *(self.expr(argument) for argument in node.args[1:]))

    # Bits -------------------------------------------------------------------------------------------------------

    def _call_tirx_reinterpret(self, node: Any) -> Value:
        return self.arith.bitcast(self.expr(node.args[0]), self.dtype(node))

    def _call_tirx_popcount(self, node: Any) -> Value:
        value = self.expr(node.args[0])
        if value.dtype.bits == 64:
            low, high = self._halves(value)
            count = self.arith.binary("add", self._count(low), self._count(high))
        else:
            count = self._count(self._unsigned32(value))
        return self.arith.cast(count, self.dtype(node))

    _call_tirx_ctpop = _call_tirx_popcount

    def _call_prim_clz(self, node: Any) -> Value:
        value = self.expr(node.args[0])
        if value.dtype.bits == 64:
            low, high = self._halves(value)
            zero = self.arith.compare("eq", high, self.arith.constant(high.dtype, 0))
            beyond = self.arith.binary("add", self._leading_zeros(low), self.arith.constant(INT32, 32))
            count = self.arith.select(zero, beyond, self._leading_zeros(high))
        else:
            spare = self.arith.constant(INT32, 32 - value.dtype.bits)
            count = self.arith.binary("sub", self._leading_zeros(self._unsigned32(value)), spare)
        return self.arith.cast(count, self.dtype(node))

    _call_tirx_clz = _call_prim_clz

    def _unsigned32(self, value: Value) -> Value:
        """An integer of up to 32 bits, extended with zeros."""
        lanes = value.dtype.lanes
        return self.arith.cast(Value(DType("uint", value.dtype.bits, lanes), value.parts), DType("uint", 32, lanes))

    def _halves(self, value: Value) -> tuple[Value, Value]:
        """Low and high 32 bits of a 64-bit integer."""
        wide = Value(DType("uint", 64, value.dtype.lanes), self.arith.wide(value).parts)
        half = DType("uint", 32, value.dtype.lanes)
        high = self.arith.binary("shr", wide, self.arith.constant(wide.dtype, 32))
        return self.arith.cast(wide, half), self.arith.cast(high, half)

    def _count(self, value: Value) -> Value:
        return self.arith.apply("BitCount", DType("int", 32, value.dtype.lanes), value)

    def _leading_zeros(self, value: Value) -> Value:
        """Leading zeros of 32 bits; FindUMsb gives -1 for 0."""
        dtype = DType("int", 32, value.dtype.lanes)
        return self.arith.binary("sub", self.arith.constant(dtype, 31), self.arith.glsl("FindUMsb", dtype, value))

    # Lanes ------------------------------------------------------------------------------------------------------

    def _call_tirx_vectorlow(self, node: Any) -> Value:
        lanes = self.arith.lanes(self.expr(node.args[0]))
        return self.arith.build(self.dtype(node), lanes[: len(lanes) // 2])

    def _call_tirx_vectorhigh(self, node: Any) -> Value:
        lanes = self.arith.lanes(self.expr(node.args[0]))
        return self.arith.build(self.dtype(node), lanes[len(lanes) // 2 :])

    def _call_tirx_vectorcombine(self, node: Any) -> Value:
        lanes = [lane for argument in node.args for lane in self.arith.lanes(self.expr(argument))]
        return self.arith.build(self.dtype(node), lanes)

    def _call_tirx_dp4a(self, node: Any) -> Value:
        """The sum of four products of 8-bit integers and a third operand, in 32 bits."""
        a, b, c = (self.expr(argument) for argument in node.args)
        total = c
        word = c.dtype
        first, second = (self.arith.lanes(self.arith.bitcast(v, DType(v.dtype.kind, 8, 4))) for v in (a, b))
        for x, y in zip(first, second, strict=True):
            left = self.arith.cast(Value(DType(a.dtype.kind, 8), [x]), word)
            right = self.arith.cast(Value(DType(b.dtype.kind, 8), [y]), word)
            total = self.arith.binary("add", total, self.arith.binary("mul", left, right))
        return total
