"""Exponentials, logarithms, trigonometric and hyperbolic functions.

Argument reduction follows Cody and Waite; log, and the constants, follow fdlibm; the polynomials are in `coefficients`.
"""

from __future__ import annotations

import math

from tvm_attn.vulkan.codegen import coefficients as table
from tvm_attn.vulkan.codegen.real import FRACTION, SMALLEST_NORMAL, Real
from tvm_attn.vulkan.codegen.reduction import reduce_angle

LOG2E = math.log2(math.e)
# ln 2 and log10 2 as a part whose product with an exponent is exact, and the rest.
_LN2 = {32: (0.693359375, -2.12194440e-4), 64: (6.93147180369123816490e-01, 1.90821492927058770002e-10)}
_LG2 = {32: (0.30078125, 2.48745663981195e-4), 64: (3.01029995663611771306e-01, 3.69423907715893078616e-13)}
_EXP_RANGE = {32: (-104.0, 89.0), 64: (-746.0, 710.0)}
_SQRT_HALF_BITS = {32: 0x3F3504F3, 64: 0x3FE6A09E667F3BCD}


# Exponentials ---------------------------------------------------------------------------------------------------


def exp_reduced(r: Real, exponent: Real) -> Real:
    """e^r * 2^exponent for |r| <= 0.35."""
    p = 1.0 + (r + r * r * r.polynomial(table.EXP[r.bits]))
    return p.scaled(exponent.cast("int"))


def exp(x: Real) -> Real:
    high, low = _LN2[x.bits]
    clamped = x.clamp(*_EXP_RANGE[x.bits])
    k = (clamped * LOG2E).glsl("RoundEven")
    r = clamped.minus(k.times(high)).minus(k.times(low))
    return x.differs(x).where(x, exp_reduced(r, k))


def exp2(x: Real) -> Real:
    low, high = (bound * LOG2E for bound in _EXP_RANGE[x.bits])
    clamped = x.clamp(low, high)
    k = clamped.glsl("RoundEven")
    return x.differs(x).where(x, exp_reduced((clamped - k) * math.log(2.0), k))


def exp10(x: Real) -> Real:
    high, low = _LG2[x.bits]
    clamped = x.clamp(*(bound / math.log(10.0) for bound in _EXP_RANGE[x.bits]))
    k = (clamped * math.log2(10.0)).glsl("RoundEven")
    r = clamped.minus(k.times(high)).minus(k.times(low))
    return x.differs(x).where(x, exp_reduced(r * math.log(10.0), k))


def sigmoid(x: Real) -> Real:
    return 1.0 / (1.0 + exp(-x))


# Logarithms -----------------------------------------------------------------------------------------------------


def split_exponent(x: Real) -> tuple[Real, Real]:
    """Splits x = 2^k * (1 + f) with 1 + f from sqrt(1/2) to sqrt(2); returns k as a float, and f."""
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
    """The logarithm's value at 0, infinity and NaN, and below 0."""
    special = x.equals(0.0).where(-math.inf, (x < 0.0).where(x.of(x.lift(math.nan)), x))
    inside = (x > 0.0) & (x < math.inf)
    return inside.where(result, special)


def log(x: Real) -> Real:
    k, f = split_exponent(x)
    high, low = _LN2[x.bits]
    return _log_domain(x, k * high + (f + (_log_one_plus(f) + k * low)))


def log2(x: Real) -> Real:
    k, f = split_exponent(x)
    return _log_domain(x, k + (f + _log_one_plus(f)) * LOG2E)


def log10(x: Real) -> Real:
    k, f = split_exponent(x)
    high, low = _LG2[x.bits]
    return _log_domain(x, k * high + ((f + _log_one_plus(f)) * (1.0 / math.log(10.0)) + k * low))


def log1p(x: Real) -> Real:
    u = x.plus(1.0)
    correction = x.minus(u.minus(1.0)) / u
    plain = log(u)
    ends = (u > 0.0) & (u < math.inf)
    return u.equals(1.0).where(x, ends.where(plain + correction, plain))


# Trigonometric functions ----------------------------------------------------------------------------------------


def _sin_cos(x: Real) -> tuple[Real, Real, Real]:
    """Sine and cosine of x minus the nearest multiple of pi / 2, and that multiple as an integer."""
    r, quadrant = reduce_angle(x)
    z = r * r
    sine = r + r * z * z.polynomial(table.SIN[x.bits])
    cosine = 1.0 - (0.5 * z - z * z * z.polynomial(table.COS[x.bits]))
    return sine, cosine, quadrant


def _by_quadrant(quadrant: Real, even: Real, odd: Real) -> Real:
    value = (quadrant & 1).equals(0).where(even, odd)
    return (quadrant & 2).equals(0).where(value, -value)


def sin(x: Real) -> Real:
    sine, cosine, quadrant = _sin_cos(x)
    return _by_quadrant(quadrant, sine, cosine)


def cos(x: Real) -> Real:
    sine, cosine, quadrant = _sin_cos(x)
    return _by_quadrant(quadrant + 1, sine, cosine)


def tan(x: Real) -> Real:
    sine, cosine, quadrant = _sin_cos(x)
    even = (quadrant & 1).equals(0)
    return even.where(sine, -cosine) / even.where(cosine, sine)


def _atan_unit(t: Real) -> Real:
    """atan for 0 <= t <= 1."""
    upper = t > math.tan(math.pi / 8)
    u = upper.where((t - 1.0) / (t + 1.0), t)
    z = u * u
    return upper.where(math.pi / 4, t * 0.0) + (u + u * z * z.polynomial(table.ATAN[t.bits]))


def atan(x: Real) -> Real:
    a = abs(x)
    large = a > 1.0
    r = _atan_unit(large.where(1.0 / a, a))
    return large.where(math.pi / 2 - r, r).with_sign_of(x)


def atan2(y: Real, x: Real) -> Real:
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


def asin(x: Real) -> Real:
    upper, _, r = _asin_reduced(abs(x))
    return upper.where(math.pi / 2 - 2.0 * r, r).with_sign_of(x)


def acos(x: Real) -> Real:
    upper, _, r = _asin_reduced(abs(x))
    signed = r.with_sign_of(x)
    near = (x > 0.0).where(2.0 * r, math.pi - 2.0 * r)
    return upper.where(near, math.pi / 2 - signed)


# Hyperbolic functions -------------------------------------------------------------------------------------------


def tanh(x: Real) -> Real:
    a = abs(x)
    z = x * x
    limit = 10.0 if x.bits == 32 else 22.0
    big = 1.0 - 2.0 / (exp(2.0 * a.glsl("NMin", limit)) + 1.0)
    result = (a < 0.625).where(x + x * z * z.polynomial(table.TANH[x.bits]), big.with_sign_of(x))
    return x.differs(x).where(x, result)


def sinh(x: Real) -> Real:
    a, z = abs(x), x * x
    root = exp(0.5 * a)
    big = (0.5 * root) * root - 0.5 / (root * root)
    return (a < 1.0).where(x + x * z * z.polynomial(table.SINH[x.bits]), big.with_sign_of(x))


def cosh(x: Real) -> Real:
    root = exp(0.5 * abs(x))
    return (0.5 * root) * root + 0.5 / (root * root)


def asinh(x: Real) -> Real:
    a = abs(x)
    huge = a > 2.0 ** (FRACTION[x.bits] // 2 + 3)
    safe = huge.where(1.0, a)
    square = safe * safe
    near = log1p(safe + square / (1.0 + (1.0 + square).glsl("Sqrt")))
    return huge.where(log(a) + math.log(2.0), near).with_sign_of(x)


def acosh(x: Real) -> Real:
    huge = x > 2.0 ** (FRACTION[x.bits] // 2 + 3)
    t = huge.where(1.0, x) - 1.0
    near = huge.where(log(x) + math.log(2.0), log1p(t + (2.0 * t + t * t).glsl("Sqrt")))
    return (x < 1.0).where(x.of(x.lift(math.nan)), near)


def atanh(x: Real) -> Real:
    a = abs(x)
    return (0.5 * log1p(2.0 * a / (1.0 - a))).with_sign_of(x)


def erf(x: Real) -> Real:
    a, z = abs(x), x * x
    near = x * z.polynomial(table.ERF[x.bits])
    t = a.glsl("NMin", table.ERFC_END[x.bits]) - table.ERFC_CENTRE[x.bits]
    far = (1.0 - exp(-t.polynomial(table.ERFC[x.bits]))).with_sign_of(x)
    return x.differs(x).where(x, (a < 0.921875).where(near, far))
