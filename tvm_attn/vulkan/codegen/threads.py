"""What threads do together: shuffles within a subgroup and atomic operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.analysis import View
from tvm_attn.vulkan.codegen.expressions import Expressions
from tvm_attn.vulkan.codegen.facts import Fact
from tvm_attn.vulkan.codegen.memory import Index
from tvm_attn.vulkan.codegen.values import UINT32, DType, Value, number

DEVICE, WORKGROUP, SUBGROUP, QUEUE_FAMILY = 1, 2, 3, 5
_ATOMIC_INSTRUCTION = {
    "add": ("AtomicIAdd", "AtomicIAdd"),
    "min": ("AtomicSMin", "AtomicUMin"),
    "max": ("AtomicSMax", "AtomicUMax"),
    "and": ("AtomicAnd", "AtomicAnd"),
    "or": ("AtomicOr", "AtomicOr"),
    "xor": ("AtomicXor", "AtomicXor"),
    "exchange": ("AtomicExchange", "AtomicExchange"),
}


class ThreadCalls(Expressions):
    """Visits shuffles and atomics."""

    # Shuffles: (mask, value, lane or distance, width, warp size) ----------------------------------------------------

    def _lane_index(self) -> Value:
        b = self.builder
        return Value(UINT32, [b.builtin("SubgroupLocalInvocationId", b.int_(32))])

    def _shuffle(self, node: Any, source: Callable[[Value, Value, Value], Value]) -> Value:
        """The value of the lane that `source(lane, operand, width)` names, within segments of `width` lanes."""
        value, operand = self.expr(node.args[1]), self.arith.cast(self.expr(node.args[2]), UINT32)
        width = number(node.args[3])
        if width is None or number(node.args[4]) is None:
            raise CompileError("the width of a warp shuffle is not constant; Vulkan needs a constant")
        lane = source(self._lane_index(), operand, self.arith.constant(UINT32, width))
        scope = self.builder.uint(SUBGROUP)
        return self._by_words(
            value,
            lambda ident: self.builder.emit("GroupNonUniformShuffle", self.builder.int_(32), scope, ident, lane.id),
        )

    def _by_words(self, value: Value, move: Callable[[int], int]) -> Value:
        """Applies `move` to 32-bit words: devices need not shuffle other types."""
        dtype = value.dtype
        if dtype.kind == "bool":
            return self.arith.cast(self._by_words(self.arith.cast(value, UINT32.with_lanes(dtype.lanes)), move), dtype)
        if dtype.bits < 32:
            bits = self.arith.bitcast(value, DType("uint", dtype.bits, dtype.lanes))
            moved = self._by_words(self.arith.cast(bits, UINT32.with_lanes(dtype.lanes)), move)
            return self.arith.bitcast(self.arith.cast(moved, bits.dtype), dtype)
        words = self.arith.bitcast(value, UINT32.with_lanes(dtype.lanes * dtype.bits // 32))
        moved = self.arith.build(words.dtype, [move(lane) for lane in self.arith.lanes(words)])
        return self.arith.bitcast(moved, dtype)

    def _segment(self, lane: Value, width: Value) -> tuple[Value, Value]:
        """The first lane of the segment, and the position in it."""
        place = self.arith.binary("and", lane, self.arith.binary("sub", width, self.arith.constant(UINT32, 1)))
        return self.arith.binary("sub", lane, place), place

    def _call_tirx_tvm_warp_shuffle(self, node: Any) -> Value:
        def source(lane: Value, operand: Value, width: Value) -> Value:
            # Lanes count modulo the width, as in CUDA; Vulkan leaves lanes beyond the subgroup undefined.
            return self.arith.binary("add", self._segment(lane, width)[0], self._segment(operand, width)[1])

        return self._shuffle(node, source)

    def _call_tirx_tvm_warp_shuffle_up(self, node: Any) -> Value:
        def source(lane: Value, operand: Value, width: Value) -> Value:
            inside = self.arith.compare("ge", self._segment(lane, width)[1], operand)
            return self.arith.select(inside, self.arith.binary("sub", lane, operand), lane)

        return self._shuffle(node, source)

    def _call_tirx_tvm_warp_shuffle_down(self, node: Any) -> Value:
        def source(lane: Value, operand: Value, width: Value) -> Value:
            place = self.arith.binary("add", self._segment(lane, width)[1], operand)
            inside = self.arith.compare("lt", place, width)
            return self.arith.select(inside, self.arith.binary("add", lane, operand), lane)

        return self._shuffle(node, source)

    def _call_tirx_tvm_warp_shuffle_xor(self, node: Any) -> Value:
        return self._shuffle(node, lambda lane, operand, _: self.arith.binary("xor", lane, operand))

    def _call_tirx_tvm_warp_activemask(self, node: Any) -> Value:
        b = self.builder
        ballot = b.emit("GroupNonUniformBallot", b.vector(b.int_(32), 4), b.uint(SUBGROUP), b.true())
        return Value(UINT32, [b.op("CompositeExtract", b.int_(32), ballot, 0)])

    # Atomics ----------------------------------------------------------------------------------------------------

    def place(self, pointer: Any) -> tuple[View, Index]:
        """Memory and index that an address_of or tvm_access_ptr refers to."""
        name = getattr(getattr(pointer, "op", None), "name", "")
        if name == "tirx.address_of":
            load = pointer.args[0]
            view = self.view(load.source)
            return view, self.index(view, load.indices)
        if name == "tirx.tvm_access_ptr":
            root = self.analysis.root_of(pointer)
            dtype = self.dtype(pointer.args[0]).scalar
            offset = pointer.args[2]
            base = self.low32(offset) if root.scope != "global" else self._address(View(root, dtype), offset)
            return View(root, dtype), Index(base, self.facts.of(offset))
        raise CompileError("a pointer is neither address_of(buffer[index]) nor buffer.access_ptr(...)")

    def _call_tirx_atomic_add(self, node: Any) -> Value:
        return self.atomic("add", node.args[0], node.args[1])

    def atomic(self, operator: str, pointer: Any, operand: Any) -> Value:
        """An atomic operation; returns the value before it. Relaxed order, as in CUDA."""
        view, index = self.place(pointer)
        value = self.arith.wide(self.expr(operand))
        dtype = view.dtype.scalar
        value = self.arith.cast(value, dtype)
        if dtype.bits < 32 or index.base is None:
            raise CompileError(f"an atomic operation on {dtype} is not supported; use 32 or 64 bits")
        shared = view.root.scope == "shared"
        if view.root.scope == "local":
            raise CompileError(f"an atomic operation on local buffer {view.root.name}; use shared or global memory")
        native = dtype.is_integer or (operator == "add" and not shared and dtype.bits == 32)
        held = dtype if dtype.is_integer or (native and not shared) else DType("uint", dtype.bits)
        address = self.memory.pointer(view, Index(index.base, Fact(index.fact.low, index.fact.high)), held)
        device = QUEUE_FAMILY if self.memory.vulkan_model else DEVICE
        scope = self.builder.uint(WORKGROUP if shared else device)
        if not native:
            return self._compare_and_swap(operator, address, scope, value)
        name = "AtomicFAddEXT" if dtype.kind == "float" else _ATOMIC_INSTRUCTION[operator][dtype.kind == "uint"]
        relaxed = self.builder.uint(0)
        return Value(dtype, [self.builder.emit(name, self.arith.type(dtype), address, scope, relaxed, value.id)])

    def _compare_and_swap(self, operator: str, address: int, scope: int, value: Value) -> Value:
        """An atomic float operation that devices need not have, as a loop around a comparing exchange."""
        b, dtype = self.builder, value.dtype
        bits = DType("uint", dtype.bits)
        word, relaxed = self.arith.type(bits), b.uint(0)
        state: dict[str, int] = {}

        def condition(values: Any) -> int:
            state["old"] = values[0]
            return self.arith.invert(Value(DType("bool", 8), [values[1]])).id

        def body(values: Any) -> None:
            old = self.arith.bitcast(Value(bits, [values[0]]), dtype)
            if operator in ("min", "max"):
                new = self.arith.extreme(operator, old, value)
            elif operator == "exchange":
                new = value
            else:
                new = self.arith.binary(operator, old, value)
            ident = self.arith.bitcast(new, bits).id
            state["seen"] = b.emit("AtomicCompareExchange", word, address, scope, relaxed, relaxed, ident, values[0])

        def step(values: Any) -> list[int]:
            return [state["seen"], b.op("IEqual", b.bool_(), state["seen"], values[0])]

        first = b.emit("AtomicLoad", word, address, scope, relaxed)
        b.loop([first, b.constant(b.bool_(), False)], condition, body, step)
        return self.arith.bitcast(Value(bits, [state["old"]]), dtype)
