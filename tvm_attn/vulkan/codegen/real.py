"""Floating-point values with Python's operators, in which `elementary` and `powers` write their formulas."""

from __future__ import annotations

from collections.abc import Sequence

from tvm_attn.vulkan.codegen.arithmetic import Arithmetic
from tvm_attn.vulkan.codegen.values import BOOL, DType, Value

# Width -> bits of the fraction, bias of the exponent, smallest normal number.
FRACTION = {16: 10, 32: 23, 64: 52}
BIAS = {16: 15, 32: 127, 64: 1023}
SMALLEST_NORMAL = {32: 2.0**-126, 64: 2.0**-1022}

Operand = "Real | float"


class Real:
    """A float of 16, 32 or 64 bits (any lanes), an integer or a bool derived from one."""

    __slots__ = ("arith", "value")

    def __init__(self, arith: Arithmetic, value: Value) -> None:
        self.arith = arith
        self.value = value

    @property
    def dtype(self) -> DType:
        return self.value.dtype

    @property
    def bits(self) -> int:
        """Width of the type."""
        return self.value.dtype.bits

    def of(self, value: Value) -> Real:
        return Real(self.arith, value)

    def lift(self, other: Real | float) -> Value:
        """A number as a constant of this type."""
        return other.value if isinstance(other, Real) else self.arith.constant(self.dtype, other)

    def _binary(self, name: str, a: Value, b: Value) -> Real:
        return self.of(self.arith.binary(name, a, b))

    def __add__(self, other: Real | float) -> Real:
        return self._binary("add", self.value, self.lift(other))

    def __radd__(self, other: float) -> Real:
        return self._binary("add", self.lift(other), self.value)

    def __sub__(self, other: Real | float) -> Real:
        return self._binary("sub", self.value, self.lift(other))

    def __rsub__(self, other: float) -> Real:
        return self._binary("sub", self.lift(other), self.value)

    def __mul__(self, other: Real | float) -> Real:
        return self._binary("mul", self.value, self.lift(other))

    def __rmul__(self, other: float) -> Real:
        return self._binary("mul", self.lift(other), self.value)

    def __truediv__(self, other: Real | float) -> Real:
        return self._binary("div", self.value, self.lift(other))

    def __rtruediv__(self, other: float) -> Real:
        return self._binary("div", self.lift(other), self.value)

    def __and__(self, other: Real | int) -> Real:
        return self._binary("and", self.value, self.lift(other))

    def __or__(self, other: Real | int) -> Real:
        return self._binary("or", self.value, self.lift(other))

    def __lshift__(self, other: Real | int) -> Real:
        return self._binary("shl", self.value, self.lift(other))

    def __rshift__(self, other: Real | int) -> Real:
        return self._binary("shr", self.value, self.lift(other))

    def __neg__(self) -> Real:
        return self.of(self.arith.negate(self.value))

    def __invert__(self) -> Real:
        return self.of(self.arith.invert(self.value))

    def __abs__(self) -> Real:
        return self.glsl("FAbs")

    def __lt__(self, other: Real | float) -> Real:
        return self._compare("lt", other)

    def __le__(self, other: Real | float) -> Real:
        return self._compare("le", other)

    def __gt__(self, other: Real | float) -> Real:
        return self._compare("gt", other)

    def __ge__(self, other: Real | float) -> Real:
        return self._compare("ge", other)

    def equals(self, other: Real | float) -> Real:
        return self._compare("eq", other)

    def differs(self, other: Real | float) -> Real:
        """Whether the values differ; also true if one side is NaN."""
        return self._compare("ne", other)

    def _compare(self, name: str, other: Real | float) -> Real:
        return self.of(self.arith.compare(name, self.value, self.lift(other)))

    def where(self, yes: Real | float, no: Real | float) -> Real:
        """`yes` where this condition holds, else `no`; one of them is a Real."""
        like = yes if isinstance(yes, Real) else no
        assert isinstance(like, Real)
        return self.of(self.arith.select(self.value, like.lift(yes), like.lift(no)))

    def glsl(self, name: str, *others: Real | float) -> Real:
        """The GLSL.std.450 instruction `name`."""
        return self.of(self.arith.glsl(name, self.dtype, self.value, *(self.lift(other) for other in others)))

    def clamp(self, low: float, high: float) -> Real:
        return self.glsl("NMax", low).glsl("NMin", high)

    def exactly(self, name: str, other: Real | float) -> Real:
        """FAdd, FSub or FMul that the driver must round as written."""
        value = self.arith.map(
            self.dtype,
            lambda type_id, a, b: self.arith.builder.exact(name, type_id, a, b),
            self.value,
            self.lift(other),
        )
        return self.of(value)

    def plus(self, other: Real | float) -> Real:
        return self.exactly("FAdd", other)

    def minus(self, other: Real | float) -> Real:
        return self.exactly("FSub", other)

    def times(self, other: Real | float) -> Real:
        return self.exactly("FMul", other)

    def polynomial(self, coefficients: Sequence[float]) -> Real:
        """sum of coefficients[i] * x^i, by Horner's rule."""
        result = self.of(self.lift(coefficients[-1]))
        for coefficient in coefficients[-2::-1]:
            result = result * self + coefficient
        return result

    # Bits -------------------------------------------------------------------------------------------------------

    def to_bits(self) -> Real:
        """The representation as an unsigned integer."""
        return self.of(self.arith.bitcast(self.value, DType("uint", self.bits, self.dtype.lanes)))

    def as_float(self) -> Real:
        """The float that an integer of the same width represents."""
        return self.of(self.arith.bitcast(self.value, DType("float", self.bits, self.dtype.lanes)))

    def cast(self, kind: str, bits: int | None = None) -> Real:
        """The value as another type."""
        return self.of(self.arith.cast(self.value, DType(kind, bits or self.bits, self.dtype.lanes)))

    def is_nan(self) -> Real:
        """Tested by the bits: drivers may optimize away comparisons with NaN."""
        return self._magnitude() > (self._infinity())

    def is_infinite(self) -> Real:
        return self._magnitude().equals(self._infinity())

    def is_finite(self) -> Real:
        return self._magnitude() < self._infinity()

    def _magnitude(self) -> Real:
        return self.to_bits() & ((1 << (self.bits - 1)) - 1)

    def _infinity(self) -> int:
        return ((1 << (self.bits - 1 - FRACTION[self.bits])) - 1) << FRACTION[self.bits]

    def with_sign_of(self, other: Real) -> Real:
        """This magnitude with the sign of `other`."""
        sign = 1 << (self.bits - 1)
        return (self._magnitude() | (other.to_bits() & sign)).as_float()

    def scaled(self, exponent: Real) -> Real:
        """self * 2^exponent for an integer `exponent`; in two steps, so that neither factor leaves the range."""
        half = exponent >> 1
        return self.times(_power_of_two(half)).times(_power_of_two(exponent - half))

    def all_false(self) -> Value:
        return self.arith.constant(BOOL.with_lanes(self.dtype.lanes), False)


def _power_of_two(exponent: Real) -> Real:
    """2^exponent for an integer within the normal range."""
    return ((exponent + BIAS[exponent.bits]) << FRACTION[exponent.bits]).as_float()
