"""Arithmetic on TIR values: operators, comparisons, casts, lanes. Everything is done element by element, on parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.builder import Builder
from tvm_attn.vulkan.codegen.values import BOOL, DType, Value, split

# Operator -> instruction for int, uint, float (None: computed below).
_BINARY = {
    "add": ("IAdd", "IAdd", "FAdd"),
    "sub": ("ISub", "ISub", "FSub"),
    "mul": ("IMul", "IMul", "FMul"),
    "div": ("SDiv", "UDiv", "FDiv"),
    "and": ("BitwiseAnd", "BitwiseAnd", None),
    "or": ("BitwiseOr", "BitwiseOr", None),
    "xor": ("BitwiseXor", "BitwiseXor", None),
    "shl": ("ShiftLeftLogical", "ShiftLeftLogical", None),
    "shr": ("ShiftRightArithmetic", "ShiftRightLogical", None),
}
_COMPARE = {
    "eq": ("IEqual", "IEqual", "FOrdEqual", "LogicalEqual"),
    "ne": ("INotEqual", "INotEqual", "FUnordNotEqual", "LogicalNotEqual"),
    "lt": ("SLessThan", "ULessThan", "FOrdLessThan", None),
    "le": ("SLessThanEqual", "ULessThanEqual", "FOrdLessThanEqual", None),
    "gt": ("SGreaterThan", "UGreaterThan", "FOrdGreaterThan", None),
    "ge": ("SGreaterThanEqual", "UGreaterThanEqual", "FOrdGreaterThanEqual", None),
}
_BOOLEAN = {"and": "LogicalAnd", "or": "LogicalOr", "xor": "LogicalNotEqual"}
# NMin and NMax return the operand that is a number; FMin and FMax leave NaN undefined.
_EXTREME = {"min": ("SMin", "UMin", "NMin"), "max": ("SMax", "UMax", "NMax")}
_COLUMN = {"int": 0, "uint": 1, "float": 2, "bool": 3}


class Arithmetic:
    """Element-wise operations that a `Builder` emits for TIR values."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self._types: dict[tuple[DType, int], int] = {}
        self._sums: dict[int, tuple[Value, int]] = {}

    # Types and constants ----------------------------------------------------------------------------------------

    def type(self, dtype: DType, lanes: int = 1) -> int:
        """The SPIR-V type of one part. bfloat16 is held as its 16 bits."""
        key = (dtype.scalar, lanes)
        known = self._types.get(key)
        if known is None:
            b = self.builder
            if dtype.kind == "bool":
                element = b.bool_()
            elif dtype.kind == "float" and dtype.bits in (16, 32, 64):
                element = b.float_(dtype.bits)
            elif (dtype.is_integer and dtype.bits in (8, 16, 32, 64)) or dtype == DType("bfloat", 16, dtype.lanes):
                element = b.int_(dtype.bits)
            else:
                raise CompileError(
                    f"the type {dtype} has no counterpart in SPIR-V; cast it to one of 8, 16, 32 or 64 bits"
                )
            known = self._types[key] = b.vector(element, lanes)
        return known

    def constant(self, dtype: DType, value: int | float | bool) -> Value:
        """A value with all lanes equal to `value`."""
        return Value(dtype, [self.builder.constant(self.type(dtype, n), value) for n in split(dtype.lanes)])

    def literal(self, value: Value) -> int | float | bool | None:
        """The number that all lanes equal, if known at compile time. Integers as the bits of their type, unsigned."""
        numbers = {self.builder.constants.get(part) for part in value.parts}
        number = numbers.pop() if len(numbers) == 1 else None
        if number is not None and value.narrow:
            number = _signed(int(number), 32) & ((1 << value.dtype.bits) - 1)
        return number

    # Lanes ------------------------------------------------------------------------------------------------------

    def map(self, dtype: DType, function: Callable[..., int], *values: Value) -> Value:
        """`function(type id, part ids...)` for each part; `dtype` is the type of the result."""
        widths = split(dtype.lanes)
        return Value(
            dtype,
            [
                function(self.type(dtype, n), *(value.parts[index] for value in values))
                for index, n in enumerate(widths)
            ],
        )

    def apply(self, name: str, dtype: DType, *values: Value) -> Value:
        """The instruction `name` for each part."""
        return self.map(dtype, lambda type_id, *ids: self.builder.op(name, type_id, *ids), *map(self.wide, values))

    def glsl(self, name: str, dtype: DType, *values: Value) -> Value:
        """The GLSL.std.450 instruction `name` for each part."""
        return self.map(dtype, lambda type_id, *ids: self.builder.glsl(name, type_id, *ids), *map(self.wide, values))

    def lane(self, value: Value, index: int) -> int:
        """The id of one lane."""
        value = self.wide(value)
        part, offset = divmod(index, 4)
        ident = value.parts[part]
        if split(value.dtype.lanes)[part] == 1:
            return ident
        return self.builder.op("CompositeExtract", self.type(value.dtype), ident, offset)

    def build(self, dtype: DType, lanes: Sequence[int]) -> Value:
        """A value from the ids of its lanes."""
        parts, start = [], 0
        for width in split(dtype.lanes):
            ids = lanes[start : start + width]
            parts.append(ids[0] if width == 1 else self.builder.composite(self.type(dtype, width), ids))
            start += width
        return Value(dtype, parts)

    def broadcast(self, value: Value, lanes: int) -> Value:
        """A scalar copied to all lanes; a value that already has them is unchanged."""
        if value.dtype.lanes == lanes:
            return value
        if value.dtype.lanes != 1:
            return self.build(value.dtype.with_lanes(lanes), self.lanes(value) * (lanes // value.dtype.lanes))
        ident = self.wide(value).id
        return self.build(value.dtype.with_lanes(lanes), [ident] * lanes)

    def lanes(self, value: Value) -> list[int]:
        """The ids of all lanes."""
        return [self.lane(value, index) for index in range(value.dtype.lanes)]

    def wide(self, value: Value) -> Value:
        """A 64-bit integer with 64-bit ids."""
        if not value.narrow:
            return value
        literal = self.literal(value)
        if literal is not None:
            return self.constant(value.dtype, literal)
        name = "SConvert" if value.dtype.kind == "int" else "UConvert"
        return self.map(value.dtype, lambda type_id, ident: self.builder.op(name, type_id, ident), value)

    # Operators --------------------------------------------------------------------------------------------------

    def binary(self, name: str, a: Value, b: Value) -> Value:
        """`name` is one of add, sub, mul, div (truncating for integers), and, or, xor, shl, shr."""
        dtype = a.dtype
        if dtype.kind == "bool":
            return self.apply(_BOOLEAN[name], dtype, a, b)
        instruction = _BINARY[name][_COLUMN[dtype.kind]]
        if instruction is None:
            raise CompileError(f"{name} is not defined for {dtype}; cast the operands to an integer type")
        if dtype.lanes == 1 and dtype.is_integer:
            folded = self._fold(name, a, b)
            if folded is not None:
                return folded
            right = self.literal(b)
            if name == "add" and right is not None:
                return self._add_constant(self.wide(a), int(right))
        return self.apply(instruction, dtype, a, b)

    def _add_constant(self, a: Value, amount: int) -> Value:
        """Turns (x + c) + d into x + (c + d): offsets into memory pile up."""
        term, before = self._sums.get(a.id, (a, 0))
        total = self.constant(a.dtype, before + amount)
        if self.literal(total) == 0:
            return term
        result = self.apply("IAdd", a.dtype, term, total)
        self._sums[result.id] = (term, before + amount)
        return result

    def _fold(self, name: str, a: Value, b: Value) -> Value | None:
        """Integer arithmetic with constants, done at compile time."""
        left, right = self.literal(a), self.literal(b)
        if left is not None and right is not None and name in ("add", "sub", "mul"):
            left, right = int(left), int(right)
            result = {"add": left + right, "sub": left - right, "mul": left * right}[name]
            return self.constant(a.dtype, result)
        if right == 0 and name in ("add", "sub", "shl", "shr", "or", "xor"):
            return a
        if left == 0 and name in ("add", "or", "xor"):
            return b
        if name in ("mul", "div") and right == 1:
            return a
        if name == "mul" and left == 1:
            return b
        return None

    def compare(self, name: str, a: Value, b: Value) -> Value:
        """`name` is one of eq, ne, lt, le, gt, ge. Ordered, except that NaN is unequal to everything."""
        if a.dtype.kind == "bool" and name not in ("eq", "ne"):
            small = DType("uint", 32, a.dtype.lanes)
            a, b = self.cast(a, small), self.cast(b, small)
        instruction = _COMPARE[name][_COLUMN[a.dtype.kind]]
        assert instruction is not None
        return self.apply(instruction, BOOL.with_lanes(a.dtype.lanes), a, b)

    def extreme(self, name: str, a: Value, b: Value) -> Value:
        """min or max; of a number and NaN, the number. GLSL.std.450 has both for 32 bits and for floats."""
        dtype = a.dtype
        if dtype.is_integer and dtype.bits != 32:
            return self.select(self.compare("lt" if name == "min" else "gt", a, b), a, b)
        if dtype.kind == "bool":
            return self.binary("and" if name == "min" else "or", a, b)
        return self.glsl(_EXTREME[name][_COLUMN[dtype.kind]], dtype, a, b)

    def floor_div(self, a: Value, b: Value) -> Value:
        """Rounds toward minus infinity."""
        if a.dtype.kind == "float":
            return self.glsl("Floor", a.dtype, self.binary("div", a, b))
        quotient = self.binary("div", a, b)
        if a.dtype.kind == "uint":
            return quotient
        remainder = self.binary("sub", a, self.binary("mul", quotient, b))
        one, zero = self.constant(a.dtype, 1), self.constant(a.dtype, 0)
        differs = self.compare("lt", self.binary("xor", remainder, b), zero)
        inexact = self.compare("ne", remainder, zero)
        return self.select(self.binary("and", differs, inexact), self.binary("sub", quotient, one), quotient)

    def remainder(self, a: Value, b: Value, floor: bool) -> Value:
        """a - b * (a / b), the quotient rounded toward minus infinity or zero.

        OpSRem and OpSMod are undefined for negative operands in Vulkan, so they are not used.
        """
        if a.dtype.kind == "uint":
            return self.apply("UMod", a.dtype, a, b)
        quotient = self.floor_div(a, b) if floor else self.binary("div", a, b)
        if a.dtype.kind == "float" and not floor:
            quotient = self.glsl("Trunc", a.dtype, quotient)
        return self.binary("sub", a, self.binary("mul", quotient, b))

    def negate(self, a: Value) -> Value:
        return self.apply("FNegate" if a.dtype.kind == "float" else "SNegate", a.dtype, a)

    def invert(self, a: Value) -> Value:
        """Logical not of bools, bitwise not of integers."""
        return self.apply("LogicalNot" if a.dtype.kind == "bool" else "Not", a.dtype, a)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """Evaluates both sides; the condition is a scalar or has as many lanes as the sides."""
        condition = self.broadcast(condition, a.dtype.lanes)
        return self.apply("Select", a.dtype, condition, a, b)

    def any(self, value: Value) -> int:
        """The id of a bool: whether any lane is true."""
        b = self.builder
        flags = [
            part if width == 1 else b.op("Any", b.bool_(), part)
            for part, width in zip(value.parts, split(value.dtype.lanes), strict=True)
        ]
        return reduce(lambda left, right: b.op("LogicalOr", b.bool_(), left, right), flags)

    # Casts ------------------------------------------------------------------------------------------------------

    def cast(self, value: Value, to: DType) -> Value:
        """Converts values, as in C."""
        source = value.dtype
        if (source.kind, source.bits) == (to.kind, to.bits):
            return value
        if source.kind == "bfloat":
            return self.cast(self._from_bfloat(value), to)
        if to.kind == "bfloat":
            return self._to_bfloat(self.cast(value, DType("float", 32, to.lanes)))
        if to.kind == "bool":
            return self.compare("ne", value, self.constant(source, 0))
        if source.kind == "bool":
            return self.select(value, self.constant(to, 1), self.constant(to, 0))
        if source.kind == "float":
            name = "FConvert" if to.kind == "float" else ("ConvertFToS" if to.kind == "int" else "ConvertFToU")
        elif to.kind == "float":
            name = "ConvertSToF" if source.kind == "int" else "ConvertUToF"
        elif source.bits == to.bits:
            return Value(to, self.wide(value).parts)
        elif value.narrow and to.bits <= 32:
            narrow = Value(DType(source.kind, 32, source.lanes), value.parts)
            return self.cast(narrow, to)
        else:
            name = "SConvert" if source.kind == "int" and to.bits > source.bits else "UConvert"
            literal = self.literal(value)
            if literal is not None:
                return self.constant(to, _signed(int(literal), source.bits) if source.kind == "int" else literal)
        return self.apply(name, to, value)

    def bitcast(self, value: Value, to: DType) -> Value:
        """The same bits as another type of the same total size."""
        if value.dtype.bits * value.dtype.lanes != to.bits * to.lanes or BOOL.kind in (value.dtype.kind, to.kind):
            raise CompileError(f"cannot reinterpret {value.dtype} as {to}; both must have the same number of bits")
        value = self.wide(value)
        if value.dtype.lanes == to.lanes:
            same = self.type(value.dtype) == self.type(to)
            return Value(to, value.parts) if same else self.apply("Bitcast", to, value)
        return self._regroup(value, to)

    def _regroup(self, value: Value, to: DType) -> Value:
        """The bits of wide lanes as narrow lanes, or the reverse, in groups of one wide lane."""
        ratio = max(to.lanes, value.dtype.lanes) // min(to.lanes, value.dtype.lanes)
        if ratio > 4:
            words = DType("uint", 32, value.dtype.bits * value.dtype.lanes // 32)
            return self.bitcast(self.bitcast(value, words), to)
        lanes = self.lanes(value)
        if to.lanes > value.dtype.lanes:
            return self.build(to, [piece for lane in lanes for piece in self._pieces(lane, to, ratio)])
        b = self.builder
        group = self.type(value.dtype, ratio)
        groups = [b.composite(group, lanes[start : start + ratio]) for start in range(0, len(lanes), ratio)]
        return self.build(to, [b.op("Bitcast", self.type(to), ident) for ident in groups])

    def _pieces(self, lane: int, to: DType, ratio: int) -> list[int]:
        b = self.builder
        vector = b.op("Bitcast", self.type(to, ratio), lane)
        return [b.op("CompositeExtract", self.type(to), vector, index) for index in range(ratio)]

    def _from_bfloat(self, value: Value) -> Value:
        """The float32 whose upper half is the bfloat16."""
        word = DType("uint", 32, value.dtype.lanes)
        bits = self.apply("UConvert", word, value)
        shifted = self.binary("shl", bits, self.constant(word, 16))
        return self.apply("Bitcast", DType("float", 32, value.dtype.lanes), shifted)

    def _to_bfloat(self, value: Value) -> Value:
        """Rounds to the nearest, ties to even; NaN stays NaN."""
        word = DType("uint", 32, value.dtype.lanes)
        bits = self.apply("Bitcast", word, value)
        sixteen, one = self.constant(word, 16), self.constant(word, 1)
        even = self.binary("and", self.binary("shr", bits, sixteen), one)
        rounded = self.binary("add", self.binary("add", bits, self.constant(word, 0x7FFF)), even)
        magnitude = self.binary("and", bits, self.constant(word, 0x7FFFFFFF))
        nan = self.compare("gt", magnitude, self.constant(word, 0x7F800000))
        quiet = self.binary("or", bits, self.constant(word, 0x400000))
        result = self.binary("shr", self.select(nan, quiet, rounded), sixteen)
        return self.apply("UConvert", DType("bfloat", 16, value.dtype.lanes), result)


def _signed(bits: int, width: int) -> int:
    """The number that `bits` represent in two's complement."""
    return bits - (1 << width) if bits >> (width - 1) else bits
