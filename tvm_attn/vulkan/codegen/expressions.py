"""TIR expressions to SPIR-V values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.analysis import Analysis, Root, View
from tvm_attn.vulkan.codegen.arithmetic import Arithmetic
from tvm_attn.vulkan.codegen.builder import Builder
from tvm_attn.vulkan.codegen.facts import UNKNOWN, Fact
from tvm_attn.vulkan.codegen.memory import Index, Memory
from tvm_attn.vulkan.codegen.values import BOOL, INT32, INT64, UINT32, DType, Value, from_tvm, number

_BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "LShift": "shl",
    "RShift": "shr",
    "BitwiseAnd": "and",
    "BitwiseOr": "or",
    "BitwiseXor": "xor",
}
_COMPARE = {"EQ": "eq", "NE": "ne", "LT": "lt", "LE": "le", "GT": "gt", "GE": "ge"}
# 64-bit operations whose low 32 bits depend only on the low 32 bits of the operands.
_MODULAR = {"Add": "add", "Sub": "sub", "Mul": "mul"}


# Condition, what it chooses if it is true, and if it is false.
Choice = tuple[Any, Any, Any]
# Nesting depth beyond which decisions are flattened.
_DEEPEST = 16


class Expressions:
    """Visits expressions; `Statements` adds the statements and `Calls` the operators."""

    def __init__(self, analysis: Analysis, arithmetic: Arithmetic, memory: Memory) -> None:
        self.analysis = analysis
        self.facts = analysis.facts
        self.arith = arithmetic
        self.builder: Builder = arithmetic.builder
        self.memory = memory
        self.variables: dict[int, Value] = {}
        self._loads: dict[int, bool] = {}
        self._fragments: dict[Root, int] = {}
        self._methods: dict[type, Callable[[Any], Value]] = {}

    def expr(self, node: Any) -> Value:
        """The value of an expression."""
        kind = type(node)
        method = self._methods.get(kind)
        if method is None:
            method = self._method(kind)
            self._methods[kind] = method
        return method(node)

    def _method(self, kind: type) -> Callable[[Any], Value]:
        name = kind.__name__
        if name in _BINARY:
            operator = _BINARY[name]
            return lambda node: self._binary(operator, node)
        if name in _COMPARE:
            operator = _COMPARE[name]
            return lambda node: self._comparison(operator, node)
        method = getattr(self, f"_{name}", None)
        if method is None:
            raise CompileError(f"expressions of kind {name} are not supported")
        return method

    @staticmethod
    def dtype(node: Any) -> DType:
        return from_tvm(node.ty.dtype)

    # Leaves -----------------------------------------------------------------------------------------------------

    def _IntImm(self, node: Any) -> Value:
        dtype, value = self.dtype(node), int(node.value)
        if dtype.bits == 64 and dtype.kind == "int" and -(1 << 31) <= value < 1 << 31:
            return Value(dtype, [self.builder.constant(self.arith.type(INT32), value)], narrow=True)
        return self.arith.constant(dtype, value)

    def _FloatImm(self, node: Any) -> Value:
        dtype = self.dtype(node)
        if dtype.kind == "bfloat":
            return self.arith.cast(self.arith.constant(DType("float", 32), float(node.value)), dtype)
        return self.arith.constant(dtype, float(node.value))

    def _Var(self, node: Any) -> Value:
        value = self.variables.get(node.__chandle__())
        if value is None:
            raise CompileError(f"the variable {node.name} is used outside of its scope")
        return value

    # Operators --------------------------------------------------------------------------------------------------

    def _both_narrow(self, a: Value, b: Value) -> bool:
        return a.narrow and b.narrow

    def _as32(self, value: Value) -> Value:
        return Value(DType(value.dtype.kind, 32, value.dtype.lanes), value.parts)

    def _binary(self, operator: str, node: Any) -> Value:
        a, b = self.expr(node.a), self.expr(node.b)
        if operator in ("shl", "shr"):
            return self._shift(operator, a, b, node)
        if a.narrow and b.narrow and self.facts.of(node).fits_int32:
            result = self.arith.binary(operator, self._as32(a), self._as32(b))
            return Value(a.dtype, result.parts, narrow=True)
        return self.arith.binary(operator, a, b)

    def _shift(self, operator: str, a: Value, b: Value, node: Any) -> Value:
        """A shift by any amount below the width of the TIR type, which may be 64 even if only 32 bits are kept.

        TVM's NarrowDataType also turns int64(x) >> n into a shift of 32 bits. Beyond 31 only the sign is left.
        """
        amount, fact = self.facts.of(node.b), self.facts.of(node)
        inside = amount.low >= 0 and amount.high < 32
        narrow = a.narrow and (operator == "shr" or (fact.fits_int32 and inside))
        if narrow:
            a, b = self._as32(a), self.arith.cast(b, INT32)
        if operator == "shr" and a.dtype == INT32.with_lanes(a.dtype.lanes) and not inside:
            unsigned = UINT32.with_lanes(a.dtype.lanes)
            most = self.arith.constant(unsigned, 31)
            b = self.arith.cast(self.arith.extreme("min", self.arith.cast(b, unsigned), most), b.dtype)
        result = self.arith.binary(operator, a, b)
        return Value(INT64, result.parts, narrow=True) if narrow else result

    def _comparison(self, operator: str, node: Any) -> Value:
        a, b = self.expr(node.a), self.expr(node.b)
        if a.narrow and b.narrow:
            a, b = self._as32(a), self._as32(b)
        return self.arith.compare(operator, a, b)

    def _divide(self, node: Any, floor: bool, remainder: bool) -> Value:
        a, b = self.expr(node.a), self.expr(node.b)
        dtype = a.dtype
        dividend, divisor = self.facts.of(node.a), self.facts.of(node.b)
        # Only -2^31 / -1 needs more than 32 bits.
        overflows = dividend.low == -(1 << 31) and divisor.low <= -1 <= divisor.high
        narrow = a.narrow and b.narrow and not overflows
        if narrow:
            a, b = self._as32(a), self._as32(b)
        if dtype.kind == "int" and dtype.lanes == 1 and dividend.low >= 0 and divisor.low > 0:
            # An unsigned quotient needs no correction.
            unsigned = DType("uint", a.dtype.bits)
            a, b = self.arith.cast(a, unsigned), self.arith.cast(b, unsigned)
            result = self.arith.remainder(a, b, floor) if remainder else self.arith.binary("div", a, b)
        elif remainder:
            result = self.arith.remainder(a, b, floor)
        else:
            result = self.arith.floor_div(a, b) if floor else self.arith.binary("div", a, b)
        return Value(dtype, result.parts, narrow)

    def _Div(self, node: Any) -> Value:
        return self._divide(node, floor=False, remainder=False)

    def _Mod(self, node: Any) -> Value:
        return self._divide(node, floor=False, remainder=True)

    def _FloorDiv(self, node: Any) -> Value:
        return self._divide(node, floor=True, remainder=False)

    def _FloorMod(self, node: Any) -> Value:
        return self._divide(node, floor=True, remainder=True)

    def _extreme(self, name: str, node: Any) -> Value:
        a, b = self.expr(node.a), self.expr(node.b)
        if a.narrow and b.narrow:
            return Value(a.dtype, self.arith.extreme(name, self._as32(a), self._as32(b)).parts, narrow=True)
        return self.arith.extreme(name, self.arith.wide(a), self.arith.wide(b))

    def _Min(self, node: Any) -> Value:
        return self._extreme("min", node)

    def _Max(self, node: Any) -> Value:
        return self._extreme("max", node)

    def _logical(self, node: Any, is_and: bool) -> Value:
        """If the right side reads memory, it is evaluated only if the left one does not decide the answer."""
        a = self.expr(node.a)
        if a.dtype.lanes > 1 or not self.reads_memory(node.b):
            return self.arith.binary("and" if is_and else "or", a, self.expr(node.b))
        known = self.arith.constant(BOOL, not is_and)
        sides = (lambda: [self.expr(node.b).id], lambda: [known.id])
        then, otherwise = sides if is_and else sides[::-1]
        return Value(BOOL, self.builder.select(a.id, [self.builder.bool_()], then, otherwise))

    def _And(self, node: Any) -> Value:
        return self._logical(node, is_and=True)

    def _Or(self, node: Any) -> Value:
        return self._logical(node, is_and=False)

    def _Not(self, node: Any) -> Value:
        return self.arith.invert(self.expr(node.a))

    def _BitwiseNot(self, node: Any) -> Value:
        return self.arith.invert(self.expr(node.a))

    def _Cast(self, node: Any) -> Value:
        value, to = self.expr(node.value), self.dtype(node)
        if (
            to == DType("int", 64)
            and value.dtype.is_integer
            and value.dtype.bits <= 32
            and value.dtype != DType("uint", 32)
        ):
            return Value(to, self.arith.cast(value, INT32).parts, narrow=True)
        return self.arith.cast(value, to)

    def _Select(self, node: Any) -> Value:
        condition, a, b = self.expr(node.condition), self.expr(node.true_value), self.expr(node.false_value)
        if a.narrow and b.narrow:
            return Value(a.dtype, self.arith.select(condition, self._as32(a), self._as32(b)).parts, narrow=True)
        return self.arith.select(condition, a, b)

    def if_then_else(self, condition: Any, yes: Any, no: Any) -> Value:
        """If a side may read memory, only the side that is taken is evaluated: addresses are not checked."""
        if self.is_deep((condition, yes, no)):
            return self._flat_choice((condition, yes, no), self.dtype(yes))
        if not (self.reads_memory(yes) or self.reads_memory(no)):
            return self.arith.select(self.expr(condition), self.expr(yes), self.expr(no))
        test = self.expr(condition)
        dtype = self.dtype(yes)
        if test.dtype.lanes > 1:
            return self.arith.select(test, self.expr(yes), self.expr(no))
        types = [self.builder.type_of[part] for part in self.arith.constant(dtype, 0).parts]
        parts = self.builder.select(
            test.id,
            types,
            partial(self._parts, yes),
            partial(self._parts, no),
        )
        return Value(dtype, parts)

    def _flat_choice(self, choice: Choice, dtype: DType) -> Value:
        """The same, one branch after the other."""
        value = self.arith.constant(dtype, 0)
        types = [self.builder.type_of[part] for part in value.parts]
        for guard, leaf in self.flattened(choice):
            if not self.reads_memory(leaf):
                value = self.arith.select(guard, self.expr(leaf), value)
                continue
            sides = (partial(self._parts, leaf), partial(tuple, value.parts))
            value = Value(dtype, self.builder.select(guard.id, types, *sides))
        return value

    def _parts(self, node: Any) -> tuple[int, ...]:
        return self.arith.wide(self.expr(node)).parts

    # Decisions: (condition, value if true, value if false) ----------------------------------------------------------

    def choice(self, node: Any) -> Choice | None:
        """The parts of an if whose condition can be evaluated anywhere; None for any other node."""
        kind = type(node).__name__
        parts: Choice | None = None
        if kind == "IfThenElse":
            parts = (node.condition, node.then_case, node.else_case)
        elif kind == "Call" and getattr(node.op, "name", "") in ("prim.if_then_else", "tirx.if_then_else"):
            parts = (node.args[0], node.args[1], node.args[2])
        if parts is None or parts[0].ty.dtype.lanes > 1 or self.reads_memory(parts[0]):
            return None
        return parts

    def is_deep(self, choice: Choice) -> bool:
        """Whether decisions are nested so deeply that they are flattened: drivers have limits, Mesa's is 79."""
        if self.reads_memory(choice[0]) or choice[0].ty.dtype.lanes > 1:
            return False
        work = [(choice, 1)]
        while work:
            (_, *sides), depth = work.pop()
            if depth > _DEEPEST:
                return True
            work += [(inner, depth + 1) for inner in map(self.choice, sides) if inner is not None]
        return False

    def flattened(self, choice: Choice) -> Iterator[tuple[Value, Any]]:
        """Each value that may be chosen, with the condition for it; conditions are emitted on the way."""
        work: list[tuple[Choice, Value | None]] = [(choice, None)]
        while work:
            (condition, *sides), guard = work.pop()
            test = self.expr(condition)
            for side, holds in zip(sides, (test, self.arith.invert(test)), strict=True):
                both = holds if guard is None else self.arith.binary("and", guard, holds)
                inner = self.choice(side)
                if inner is not None:
                    work.append((inner, both))
                elif side is not None:
                    yield both, side

    def _Let(self, node: Any) -> Value:
        self.bind(node.var, node.value)
        return self.expr(node.body)

    def bind(self, var: Any, value: Any) -> None:
        """Binds a variable to the value of an expression. The analysis has resolved pointers."""
        if not hasattr(var.ty, "element_type"):
            self.variables[var.__chandle__()] = self.expr(value)

    # Vectors ----------------------------------------------------------------------------------------------------

    def _Ramp(self, node: Any) -> Value:
        dtype = self.dtype(node)
        base, stride = self.arith.wide(self.expr(node.base)), self.arith.wide(self.expr(node.stride))
        steps = [
            self.arith.binary("mul", stride, self.arith.constant(stride.dtype, lane)) for lane in range(dtype.lanes)
        ]
        if base.dtype.lanes != 1:
            raise CompileError("a ramp of vectors is not supported; use scalar bases")
        return self.arith.build(dtype, [self.arith.binary("add", base, step).id for step in steps])

    def _Broadcast(self, node: Any) -> Value:
        return self.arith.broadcast(self.expr(node.value), self.dtype(node).lanes)

    def _Shuffle(self, node: Any) -> Value:
        lanes = [lane for vector in node.vectors for lane in self.arith.lanes(self.expr(vector))]
        dtype = self.dtype(node)
        places = [number(index) for index in node.indices]
        if any(place is None for place in places):
            raise CompileError("the lanes of a shuffle are not constant")
        return self.arith.build(dtype, [lanes[place] for place in places if place is not None])

    # Memory -----------------------------------------------------------------------------------------------------

    def view(self, buffer: Any) -> View:
        view = self.analysis.views.get(buffer.__chandle__())
        if view is None:
            raise CompileError(f"buffer {buffer.name} is used but never declared")
        return view

    def index(self, view: View, indices: Any) -> Index:
        """The place of an access, in scalars of the view."""
        if len(indices) != 1:
            raise CompileError(f"buffer {view.root.name} has {len(indices)} axes after flattening; one is supported")
        node = indices[0]
        lanes = view.dtype.lanes
        if type(node).__name__ == "Ramp":
            if number(node.stride) == 1:
                return self._scaled(self._address(view, node.base), self.facts.of(node.base), lanes)
            if view.small:
                base, stride = self.low32(node.base), self.low32(node.stride)
            else:
                base, stride = self.arith.wide(self.expr(node.base)), self.arith.wide(self.expr(node.stride))
            steps = (self.arith.constant(base.dtype, lane) for lane in range(node.ty.dtype.lanes))
            places = [self.arith.binary("add", base, self.arith.binary("mul", stride, step)) for step in steps]
        elif node.ty.dtype.lanes == 1:
            return self._scaled(self._address(view, node), self.facts.of(node), lanes)
        else:
            value = self.expr(node)
            places = [Value(value.dtype.scalar, [lane]) for lane in self.arith.lanes(value)]
        if lanes != 1:
            raise CompileError(
                f"buffer {view.root.name} of vectors is read at scattered positions; use scalar elements"
            )
        return Index(None, UNKNOWN, tuple(places))

    def _address(self, view: View, node: Any) -> Value:
        if view.small:
            return self.low32(node)
        value = self.expr(node)
        return self._as32(value) if value.narrow else value

    def _scaled(self, base: Value, fact: Fact, lanes: int) -> Index:
        if lanes == 1:
            return Index(base, fact)
        base = self.arith.binary("mul", base, self.arith.constant(base.dtype, lanes))
        return Index(base, Fact(fact.low * lanes, fact.high * lanes, fact.divisor * lanes))

    def low32(self, node: Any) -> Value:
        """The low 32 bits of an integer expression: the whole of an index into memory with fewer elements."""
        operator = _MODULAR.get(type(node).__name__)
        if operator is not None and node.ty.dtype.bits == 64:
            return self.arith.binary(operator, self.low32(node.a), self.low32(node.b))
        value = self.expr(node)
        if value.narrow:
            return self._as32(value)
        return self.arith.cast(value, INT32) if value.dtype.bits != 32 else value

    def _TensorLoad(self, node: Any) -> Value:
        view = self.view(node.source)
        return self.memory.load(view, self.index(view, node.indices), self.dtype(node))

    def reads_memory(self, node: Any) -> bool:
        """Whether evaluating the expression may access memory."""
        handle = node.__chandle__()
        known = self._loads.get(handle)
        if known is None:
            kind = type(node).__name__
            known = kind == "TensorLoad"
            if kind == "Call":
                known = getattr(node.op, "name", "") in ("tirx.atomic_add", "tirx.call_extern")
            for operand in [] if known else _operands(node, kind):
                known = known or self.reads_memory(operand)
            self._loads[handle] = known
        return known

    def _Call(self, node: Any) -> Value:
        raise NotImplementedError


def _operands(node: Any, kind: str) -> list[Any]:
    if kind in ("IntImm", "FloatImm", "StringImm", "Var"):
        return []
    if kind in ("Call", "Shuffle"):
        return list(node.args if kind == "Call" else node.vectors)
    return [getattr(node, name) for name in _OPERANDS if hasattr(node, name)]


_OPERANDS = ("a", "b", "value", "condition", "true_value", "false_value", "base", "stride", "body")
