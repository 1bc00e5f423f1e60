"""Powers, remainders and lengths, from sums and products with their rounding errors.

pow carries the logarithm in two floats (Dekker's product, Knuth's sum).
"""

from __future__ import annotations

import math
import struct

from tvm_attn.vulkan.codegen import coefficients as table
from tvm_attn.vulkan.codegen.elementary import LOG2E, exp_reduced, split_exponent
from tvm_attn.vulkan.codegen.real import Real

_SPLITTER = {32: 4097.0, 64: 134217729.0}


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
    k, f = split_exponent(x)
    g = f.plus(2.0)
    rest = f.minus(g.minus(2.0))
    s = f / g
    p, error = _product(s, g)
    s_low = f.minus(p).minus(error).minus(s.times(rest)) / g
    z = s * s
    head, tail = _sum(2.0 * s, 2.0 * s_low + s * z * z.polynomial(table.LOG[x.bits]))
    log2e = x.of(x.lift(LOG2E))
    high = _rounded(LOG2E, x.bits)
    p, error = _product(head, log2e)
    error = error.plus(head * (_LOG2E_TAIL if x.bits == 64 else LOG2E - high)).plus(tail * LOG2E)
    total, remainder = _sum(k, p)
    return total, remainder.plus(error)


_LOG2E_TAIL = 2.0355273740931033e-17


def _rounded(value: float, bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0]) if bits == 32 else value


def pow(x: Real, y: Real) -> Real:
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
    finite = exp_reduced(r * math.log(2.0), k)
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
    """x^n by repeated squaring."""
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


def fmod(x: Real, y: Real) -> Real:
    """x - y * trunc(x / y), the quotient corrected by one; exact while it is below 2^24 (2^53)."""
    a, b = abs(x), abs(y)
    quotient = (a / b).glsl("Trunc")
    p, error = _product(quotient, b)
    r = a.minus(p).minus(error)
    r = (r < 0.0).where(r + b, r)
    r = (r >= b).where(r - b, r)
    return (b > a).where(a, r).with_sign_of(x)


def hypot(x: Real, y: Real) -> Real:
    a, b = abs(x), abs(y)
    big, small = a.glsl("NMax", b), a.glsl("NMin", b)
    ratio = big.equals(0.0).where(0.0, small / big)
    result = big * (1.0 + ratio * ratio).glsl("Sqrt")
    result = (x.differs(x) | y.differs(y)).where(math.nan, result)
    return big.equals(math.inf).where(math.inf, result)
