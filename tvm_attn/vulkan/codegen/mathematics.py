"""The elementary functions of TIR's operator table.

Vulkan promises little for GLSL.std.450's sin, cos, exp and log, and nothing in 64 bits. Only what Vulkan rounds
correctly is taken from there; the rest is computed with reductions that are exact and polynomials (`coefficients`), so
that results are the same on every driver that adds, multiplies and divides in IEEE arithmetic. docs/vulkan-operators.md
gives the accuracy. The reductions follow Cody and Waite; log, and the table of constants, follow fdlibm; pow carries
the logarithm in two floats (Dekker's product). 16-bit functions are computed in 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen import coefficients as table
from tvm_attn.vulkan.codegen.arithmetic import Arithmetic
from tvm_attn.vulkan.codegen.real import BIAS, FRACTION, SMALLEST_NORMAL, Real
from tvm_attn.vulkan.codegen.values import DType, Value

_LOG2E = math.log2(math.e)
# ln 2 and log10 2 as a part whose product with an exponent is exact, and the rest.
_LN2 = {32: (0.693359375, -2.12194440e-4), 64: (6.93147180369123816490e-01, 1.90821492927058770002e-10)}
_LG2 = {32: (0.30078125, 2.48745663981195e-4), 64: (3.01029995663611771306e-01, 3.69423907715893078616e-13)}
# pi / 2 in parts whose products with the quadrant are exact.
_HALF_PI = {
    32: (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8, -1.7151244994428829e-15),
    64: (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624871116645580e-21, 8.4784276603689e-32),
}
_EXP_RANGE = {32: (-104.0, 89.0), 64: (-746.0, 710.0)}
_SQRT_HALF_BITS = {32: 0x3F3504F3, 64: 0x3FE6A09E667F3BCD}
_SPLITTER = {32: 4097.0, 64: 134217729.0}


# Exponentials ---------------------------------------------------------------------------------------------------


def _exp_reduced(r: Real, exponent: Real) -> Real:
    """e^r * 2^exponent for |r| <= 0.35."""
    p = 1.0 + (r + r * r * r.polynomial(table.EXP[r.bits]))
    return p.scaled(exponent.cast("int"))


def _exp(x: Real) -> Real:
    high, low = _LN2[x.bits]
    clamped = x.clamp(*_EXP_RANGE[x.bits])
    k = (clamped * _LOG2E).glsl("RoundEven")
    r = clamped.minus(k.times(high)).minus(k.times(low))
    return x.differs(x).where(x, _exp_reduced(r, k))


def _exp2(x: Real) -> Real:
    low, high = (bound * _LOG2E for bound in _EXP_RANGE[x.bits])
    clamped = x.clamp(low, high)
    k = clamped.glsl("RoundEven")
    return x.differs(x).where(x, _exp_reduced((clamped - k) * math.log(2.0), k))


def _exp10(x: Real) -> Real:
    high, low = _LG2[x.bits]
    clamped = x.clamp(*(bound / math.log(10.0) for bound in _EXP_RANGE[x.bits]))
    k = (clamped * math.log2(10.0)).glsl("RoundEven")
    r = clamped.minus(k.times(high)).minus(k.times(low))
    return x.differs(x).where(x, _exp_reduced(r * math.log(10.0), k))


def _sigmoid(x: Real) -> Real:
    return 1.0 / (1.0 + _exp(-x))


# Logarithms -----------------------------------------------------------------------------------------------------


def _split(x: Real) -> tuple[Real, Real]:
    """x = 2^k * (1 + f) with 1 + f from sqrt(1/2) to sqrt(2); gives k as a float and f."""
    bits, fraction = x.bits, FRACTION[x.bits]
    tiny = x < SMALLEST_NORMAL[bits]
    normal = tiny.where(x * 2.0 ** (fraction + 2), x)
    shifted = normal.to_bits().cast("int") - _SQRT_HALF_BITS[bits]
    k = (shifted >> fraction).cast("float")
    mantissa = ((shifted & ((1 << fraction) - 1)) + _SQRT_HALF_BITS[bits]).as_float()
    return k - tiny.where(x.of(x.lift(fraction + 2.0)), 0.0), mantissa - 1.0


def _log_one_plus(f: Real) -> Real:
    """log(1 + f) - f for 1 + f from sqrt(1/2) to sqrt(2)."""
    s = f / (2.0 + f)
    z = s * s
    half_square = 0.5 * f * f
    return s * (half_square + z * z.polynomial(table.LOG[f.bits])) - half_square


def _log_domain(x: Real, result: Real) -> Real:
    """The logarithm's value at 0, infinity, NaN and below 0."""
    special = x.equals(0.0).where(-math.inf, (x < 0.0).where(x.of(x.lift(math.nan)), x))
    inside = (x > 0.0) & (x < math.inf)
    return inside.where(result, special)


def _log(x: Real) -> Real:
    k, f = _split(x)
    high, low = _LN2[x.bits]
    return _log_domain(x, k * high + (f + (_log_one_plus(f) + k * low)))


def _log2(x: Real) -> Real:
    k, f = _split(x)
    return _log_domain(x, k + (f + _log_one_plus(f)) * _LOG2E)


def _log10(x: Real) -> Real:
    k, f = _split(x)
    high, low = _LG2[x.bits]
    return _log_domain(x, k * high + ((f + _log_one_plus(f)) * (1.0 / math.log(10.0)) + k * low))


def _log1p(x: Real) -> Real:
    u = x.plus(1.0)
    correction = x.minus(u.minus(1.0)) / u
    plain = _log(u)
    ends = (u > 0.0) & (u < math.inf)
    return u.equals(1.0).where(x, ends.where(plain + correction, plain))


# Trigonometric functions ----------------------------------------------------------------------------------------


def _sin_cos(x: Real) -> tuple[Real, Real, Real]:
    """Sine and cosine of x minus the nearest multiple of pi / 2, and that multiple as an integer."""
    k = (x * (2.0 / math.pi)).glsl("RoundEven")
    r = x
    for part in _HALF_PI[x.bits]:
        r = r.minus(k.times(part))
    z = r * r
    sine = r + r * z * z.polynomial(table.SIN[x.bits])
    cosine = 1.0 - (0.5 * z - z * z * z.polynomial(table.COS[x.bits]))
    return sine, cosine, k.cast("int")


def _by_quadrant(quadrant: Real, even: Real, odd: Real) -> Real:
    value = (quadrant & 1).equals(0).where(even, odd)
    return (quadrant & 2).equals(0).where(value, -value)


def _sin(x: Real) -> Real:
    sine, cosine, quadrant = _sin_cos(x)
    return _by_quadrant(quadrant, sine, cosine)


def _cos(x: Real) -> Real:
    sine, cosine, quadrant = _sin_cos(x)
    return _by_quadrant(quadrant + 1, sine, cosine)


def _tan(x: Real) -> Real:
    sine, cosine, quadrant = _sin_cos(x)
    even = (quadrant & 1).equals(0)
    return even.where(sine, -cosine) / even.where(cosine, sine)


def _atan_unit(t: Real) -> Real:
    """atan for 0 <= t <= 1."""
    upper = t > math.tan(math.pi / 8)
    u = upper.where((t - 1.0) / (t + 1.0), t)
    z = u * u
    return upper.where(math.pi / 4, t * 0.0) + (u + u * z * z.polynomial(table.ATAN[t.bits]))


def _atan(x: Real) -> Real:
    a = abs(x)
    large = a > 1.0
    r = _atan_unit(large.where(1.0 / a, a))
    return large.where(math.pi / 2 - r, r).with_sign_of(x)


def _atan2(y: Real, x: Real) -> Real:
    ay, ax = abs(y), abs(x)
    steep = ay > ax
    small, big = steep.where(ax, ay), steep.where(ay, ax)
    ratio = small.equals(big).where(big.equals(0.0).where(0.0, big * 0.0 + 1.0), small / big)
    both_infinite = small.equals(math.inf)
    r = _atan_unit(both_infinite.where(1.0, ratio))
    r = steep.where(math.pi / 2 - r, r)
    negative = (x.to_bits() >> (x.bits - 1)).differs(0)
    nan = x.differs(x).where(x, y)
    result = negative.where(math.pi - r, r).with_sign_of(y)
    return (x.differs(x) | y.differs(y)).where(nan, result)


def _asin_reduced(a: Real) -> tuple[Real, Real, Real]:
    """For a = |x|: whether it is above 1/2, the reduced argument u and asin(u)."""
    upper = a > 0.5
    z = upper.where(0.5 * (1.0 - a), a * a)
    u = upper.where(z.glsl("Sqrt"), a)
    return upper, u, u + u * z * z.polynomial(table.ASIN[a.bits])


def _asin(x: Real) -> Real:
    upper, _, r = _asin_reduced(abs(x))
    return upper.where(math.pi / 2 - 2.0 * r, r).with_sign_of(x)


def _acos(x: Real) -> Real:
    upper, _, r = _asin_reduced(abs(x))
    signed = r.with_sign_of(x)
    near = (x > 0.0).where(2.0 * r, math.pi - 2.0 * r)
    return upper.where(near, math.pi / 2 - signed)


# Hyperbolic functions -------------------------------------------------------------------------------------------


def _tanh(x: Real) -> Real:
    a = abs(x)
    z = x * x
    limit = 10.0 if x.bits == 32 else 22.0
    big = 1.0 - 2.0 / (_exp(2.0 * a.glsl("NMin", limit)) + 1.0)
    result = (a < 0.625).where(x + x * z * z.polynomial(table.TANH[x.bits]), big.with_sign_of(x))
    return x.differs(x).where(x, result)


def _sinh(x: Real) -> Real:
    a, z = abs(x), x * x
    root = _exp(0.5 * a)
    big = (0.5 * root) * root - 0.5 / (root * root)
    return (a < 1.0).where(x + x * z * z.polynomial(table.SINH[x.bits]), big.with_sign_of(x))


def _cosh(x: Real) -> Real:
    root = _exp(0.5 * abs(x))
    return (0.5 * root) * root + 0.5 / (root * root)


def _asinh(x: Real) -> Real:
    a = abs(x)
    huge = a > 2.0 ** (FRACTION[x.bits] // 2 + 3)
    safe = huge.where(1.0, a)
    square = safe * safe
    near = _log1p(safe + square / (1.0 + (1.0 + square).glsl("Sqrt")))
    return huge.where(_log(a) + math.log(2.0), near).with_sign_of(x)


def _acosh(x: Real) -> Real:
    huge = x > 2.0 ** (FRACTION[x.bits] // 2 + 3)
    t = huge.where(1.0, x) - 1.0
    return huge.where(_log(x) + math.log(2.0), _log1p(t + (2.0 * t + t * t).glsl("Sqrt")))


def _atanh(x: Real) -> Real:
    a = abs(x)
    return (0.5 * _log1p(2.0 * a / (1.0 - a))).with_sign_of(x)


def _erf(x: Real) -> Real:
    a, z = abs(x), x * x
    near = x * z.polynomial(table.ERF[x.bits])
    t = a.glsl("NMin", table.ERFC_END[x.bits]) - table.ERFC_CENTRE[x.bits]
    far = (1.0 - _exp(-t.polynomial(table.ERFC[x.bits]))).with_sign_of(x)
    return x.differs(x).where(x, (a < 0.921875).where(near, far))


# Powers ---------------------------------------------------------------------------------------------------------


def _product(a: Real, b: Real) -> tuple[Real, Real]:
    """a * b as the rounded product and its error (Dekker)."""

    def halves(v: Real) -> tuple[Real, Real]:
        c = v.times(_SPLITTER[v.bits])
        high = c.minus(c.minus(v))
        return high, v.minus(high)

    p = a.times(b)
    (ah, al), (bh, bl) = halves(a), halves(b)
    error = ah.times(bh).minus(p).plus(ah.times(bl)).plus(al.times(bh)).plus(al.times(bl))
    return p, error


def _sum(a: Real, b: Real) -> tuple[Real, Real]:
    """a + b as the rounded sum and its error (Knuth)."""
    s = a.plus(b)
    t = s.minus(a)
    return s, a.minus(s.minus(t)).plus(b.minus(t))


def _log2_pair(x: Real) -> tuple[Real, Real]:
    """log2 of a positive x as the sum of two floats."""
    k, f = _split(x)
    g = f.plus(2.0)
    rest = f.minus(g.minus(2.0))
    s = f / g
    p, error = _product(s, g)
    s_low = f.minus(p).minus(error).minus(s.times(rest)) / g
    z = s * s
    head, tail = _sum(2.0 * s, 2.0 * s_low + s * z * z.polynomial(table.LOG[x.bits]))
    log2e = x.of(x.lift(_LOG2E))
    high = _rounded(_LOG2E, x.bits)
    p, error = _product(head, log2e)
    error = error.plus(head * (_LOG2E_TAIL if x.bits == 64 else _LOG2E - high)).plus(tail * _LOG2E)
    total, remainder = _sum(k, p)
    return total, remainder.plus(error)


_LOG2E_TAIL = 2.0355273740931033e-17


def _rounded(value: float, bits: int) -> float:
    import struct

    return float(struct.unpack("<f", struct.pack("<f", value))[0]) if bits == 32 else value


def _pow(x: Real, y: Real) -> Real:
    exponent = x.arith.literal(y.value)
    if exponent is not None and float(exponent).is_integer() and abs(exponent) <= 64:
        return _integer_power(x, int(exponent))
    if exponent == 0.5:
        return x.glsl("Sqrt")
    a = abs(x)
    high, low = _log2_pair(a)
    bounded = y.clamp(-(2.0**40), 2.0**40)
    p, error = _product(bounded, high)
    error = error.plus(bounded.times(low))
    limit = 160.0 if x.bits == 32 else 1100.0
    outside = abs(p) > limit
    p = p.clamp(-limit, limit)
    k = p.glsl("RoundEven")
    r = p.minus(k).plus(outside.where(0.0, error))
    finite = _exp_reduced(r * math.log(2.0), k)
    return _pow_domain(x, y, a, finite)


def _pow_domain(x: Real, y: Real, a: Real, finite: Real) -> Real:
    """C's special cases around |x|^y = `finite`."""
    to_zero = a.equals(0.0).where((y < 0.0).where(x.of(x.lift(math.inf)), 0.0), finite)
    result = a.equals(math.inf).where((y < 0.0).where(x.of(x.lift(0.0)), math.inf), to_zero)
    whole = y.glsl("Trunc").equals(y)
    odd = whole & (y * 0.5).glsl("Trunc").differs(y * 0.5)
    negative = (x.to_bits() >> (x.bits - 1)).differs(0)
    signed = (negative & odd).where(-result, result)
    result = ((x < 0.0) & ~whole & (a < math.inf)).where(math.nan, signed)
    result = (x.differs(x) | y.differs(y)).where(x + y, result)
    return (y.equals(0.0) | x.equals(1.0)).where(1.0, result)


def _integer_power(x: Real, n: int) -> Real:
    """By repeated squaring."""
    result: Real | None = None
    square, rest = x, abs(n)
    while rest:
        if rest & 1:
            result = square if result is None else result * square
        rest >>= 1
        if rest:
            square = square * square
    if result is None:
        return x.of(x.lift(1.0))
    return 1.0 / result if n < 0 else result


# Rounding, signs and bits ---------------------------------------------------------------------------------------


def _round_half_away(x: Real) -> Real:
    whole = x.glsl("Trunc")
    step = x.of(x.lift(1.0)).with_sign_of(x)
    return (abs(x - whole) >= 0.5).where(whole + step, whole)


def _fmod(x: Real, y: Real) -> Real:
    """x - y * trunc(x / y), the quotient corrected by one; exact while it is below 2^24 (2^53)."""
    a, b = abs(x), abs(y)
    quotient = (a / b).glsl("Trunc")
    p, error = _product(quotient, b)
    r = a.minus(p).minus(error)
    r = (r < 0.0).where(r + b, r)
    r = (r >= b).where(r - b, r)
    return (b > a).where(a, r).with_sign_of(x)


def _hypot(x: Real, y: Real) -> Real:
    a, b = abs(x), abs(y)
    big, small = a.glsl("NMax", b), a.glsl("NMin", b)
    ratio = big.equals(0.0).where(0.0, small / big)
    result = big * (1.0 + ratio * ratio).glsl("Sqrt")
    return big.equals(math.inf).where(math.inf, result)


def _nextafter(x: Real, y: Real) -> Real:
    bits = x.to_bits()
    one = bits.of(bits.lift(1))
    away = ((y > x) & (x > 0.0)) | ((y < x) & (x < 0.0))
    stepped = away.where(bits + one, bits - one).as_float()
    smallest = one.as_float().with_sign_of(y)
    result = x.equals(0.0).where(smallest, stepped)
    return (x.differs(x) | y.differs(y)).where(x + y, x.equals(y).where(y, result))


def _sqrt(x: Real) -> Real:
    """Vulkan gives sqrt the error of a reciprocal square root: one step of Newton's iteration mends it."""
    root = x.glsl("Sqrt")
    p, error = _product(root, root)
    corrected = root + 0.5 * (x.minus(p).minus(error)) / root
    plain = x.equals(0.0) | (x >= math.inf) | x.differs(x)
    return plain.where(root, corrected)


_ONE: dict[str, Callable[[Real], Real]] = {
    "exp": _exp,
    "exp2": _exp2,
    "exp10": _exp10,
    "sigmoid": _sigmoid,
    "log": _log,
    "log2": _log2,
    "log10": _log10,
    "log1p": _log1p,
    "sin": _sin,
    "cos": _cos,
    "tan": _tan,
    "asin": _asin,
    "acos": _acos,
    "atan": _atan,
    "sinh": _sinh,
    "cosh": _cosh,
    "tanh": _tanh,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "erf": _erf,
}
_TWO: dict[str, Callable[[Real, Real], Real]] = {"pow": _pow, "atan2": _atan2, "fmod": _fmod, "hypot": _hypot}
# What GLSL.std.450 computes exactly, for any width.
_EXACT = {"floor": "Floor", "ceil": "Ceil", "trunc": "Trunc", "nearbyint": "RoundEven", "fabs": "FAbs"}
_DIRECT: dict[str, Callable[..., Real]] = {
    "sqrt": lambda x: x.glsl("Sqrt"),
    "rsqrt": lambda x: x.glsl("InverseSqrt"),
    "round": _round_half_away,
    "fma": lambda x, y, z: x.glsl("Fma", y, z),
    "copysign": lambda x, y: x.with_sign_of(y),
    "nextafter": _nextafter,
    "isnan": lambda x: x.is_nan(),
    "isinf": lambda x: x.is_infinite(),
    "isfinite": lambda x: x.is_finite(),
    "ldexp": lambda x, n: x.scaled(n.cast("int", x.bits)),
}


# Of `_DIRECT`, those that are computed in 32 bits for 16-bit floats.
_WIDENED = frozenset(("sqrt", "rsqrt", "ldexp"))


class Mathematics:
    """Functions by the names of TIR and C."""

    def __init__(self, arith: Arithmetic) -> None:
        self.arith = arith

    @staticmethod
    def has(name: str) -> bool:
        return name in _ONE or name in _TWO or name in _EXACT or name in _DIRECT or name in ("min", "max")

    def call(self, name: str, arguments: Sequence[Value], dtype: DType) -> Value:
        """The value of a function, of type `dtype`."""
        first = arguments[0].dtype
        if first.is_integer or first.kind == "bool":
            return self._of_integer(name, arguments)
        if name in ("min", "max"):
            return self.arith.extreme(name, arguments[0], arguments[1])
        if name in _EXACT:
            return self.arith.glsl(_EXACT[name], dtype, *arguments)
        formula: Callable[..., Any] | None = _ONE.get(name) or _TWO.get(name)
        widen = first.kind == "bfloat" or (first.bits == 16 and (formula is not None or name in _WIDENED))
        reals = [
            Real(
                self.arith,
                self.arith.cast(value, DType("float", 32, value.dtype.lanes)) if widen and _is_float(value) else value,
            )
            for value in arguments
        ]
        result = (formula or _DIRECT[name])(*reals).value
        return result if result.dtype.kind == "bool" else self.arith.cast(result, dtype)

    def _of_integer(self, name: str, arguments: Sequence[Value]) -> Value:
        value = arguments[0]
        if name in ("min", "max"):
            return self.arith.extreme(name, value, arguments[1])
        if name in ("floor", "ceil", "trunc", "round", "nearbyint"):
            return value
        if name in ("isnan", "isinf", "isfinite"):
            return self.arith.constant(DType("bool", 8, value.dtype.lanes), name == "isfinite")
        if name == "fabs":
            zero = self.arith.constant(value.dtype, 0)
            negative = self.arith.compare("lt", value, zero)
            return self.arith.select(negative, self.arith.negate(value), value)
        raise CompileError(f"{name} is not defined for {value.dtype}; cast the operand to a float")


def _is_float(value: Value) -> bool:
    return value.dtype.kind in ("float", "bfloat")


__all__ = ["BIAS", "Mathematics"]
