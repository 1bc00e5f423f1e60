"""Angles minus the nearest multiple of pi / 2.

Small angles subtract parts of the multiple (Cody and Waite); large ones are multiplied by the bits of 2 / pi that
matter (Payne and Hanek, "Radian reduction for trigonometric functions", 1983), which works for every float.
"""

from __future__ import annotations

import math
from itertools import pairwise

from tvm_attn.vulkan.codegen.real import BIAS, FRACTION, Real
from tvm_attn.vulkan.codegen.values import DType, Value

# pi / 2 in parts whose products with the quadrant are exact.
_HALF_PI = {
    32: (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8, -1.7151244994428829e-15),
    64: (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624871116645580e-21, 8.4784276603689e-32),
}
_HALF_PI_REST = 6.123233995736766e-17  # pi / 2 minus the nearest double
# From this power of two on, those products are not exact.
_LARGE = {32: 13, 64: 20}
# The bits of 2 / pi after the point.
_TWO_OVER_PI_BITS = 1216
_TWO_OVER_PI = int(
    "a2f9836e4e441529fc2757d1f534ddc0db6295993c439041fe5163abdebbc561b7246e3a424dd2e006492eea09d1921c"
    "fe1deb1cb129a73ee88235f52ebb4484e99c7026b45f7e413991d639835339f49c845f8bbdf9283b1ff897ffde05980f"
    "ef2f118b5a0a6d1f6d367ecf27cb09b74f463f669e5fea2d7527bac7ebe5f17b3d0739f78a5292ea6bfb5fb11f8d5d08"
    "56033046fc7b6bab",
    16,
)


def reduce_angle(x: Real) -> tuple[Real, Real]:
    """x minus the nearest multiple of pi / 2, and that multiple as an integer; only its last two bits count."""
    magnitude = abs(x)
    large = (magnitude >= 2.0 ** _LARGE[x.bits]) & (magnitude < math.inf)
    integer = DType("int", x.bits, x.dtype.lanes)
    arith, parts = x.arith, len(x.value.parts)

    def near() -> tuple[int, ...]:
        r, k = _cody_waite(x)
        return (*r.value.parts, *k.value.parts)

    def far() -> tuple[int, ...]:
        a, a_quadrant = _cody_waite(x)
        b, b_quadrant = _payne_hanek(x)
        r, k = large.where(b, a), large.where(b_quadrant, a_quadrant)
        return (*r.value.parts, *k.value.parts)

    types = [arith.builder.type_of[part] for dtype in (x.dtype, integer) for part in arith.constant(dtype, 0).parts]
    ids = arith.builder.select(arith.any(large.value), types, far, near)
    return x.of(Value(x.dtype, ids[:parts])), x.of(Value(integer, ids[parts:]))


def _cody_waite(x: Real) -> tuple[Real, Real]:
    k = (x * (2.0 / math.pi)).glsl("RoundEven")
    r = x
    for part in _HALF_PI[x.bits]:
        r = r.minus(k.times(part))
    return r, k.cast("int")


def _payne_hanek(x: Real) -> tuple[Real, Real]:
    """x is m * 2^e, m an integer. Multiples of 4 in m * 2^e * 2 / pi do not count: three words of 2 / pi are enough."""
    width, fraction = x.bits, FRACTION[x.bits]
    bits = x.to_bits()
    lowest = _LARGE[width] - fraction  # the smallest e
    m = (bits & ((1 << fraction) - 1)) | (1 << fraction)
    place = ((bits >> fraction) & ((1 << (width - 1 - fraction)) - 1)) - (lowest + BIAS[width] + fraction)
    f0, f1, f2 = _bits_from(place, lowest)
    # The product modulo 2^(3 width); the first two bits are the quadrant, the rest is a fraction of it.
    p2 = m * f2
    low, carry = m * f1, _high_product(m, f2)
    p1 = low + carry
    p0 = m * f0 + _high_product(m, f1) + (p1 < low).where(x.of(m.lift(1)), 0)
    quadrant = (p0 + (1 << (width - 3))) >> (width - 2)
    words = [(a << 2) | (b >> (width - 2)) for a, b in ((p0, p1), (p1, p2))] + [p2 << 2]
    negative = (words[0] >> (width - 1)).equals(1)
    s0, s1, s2 = (negative.where(~word, word) for word in words)
    # The product of the upper bits with the first part of pi / 2 is exact.
    half = width // 2
    head = (s0 >> half).cast("float") * 2.0**-half
    middle = ((s0 << half) | (s1 >> half)).cast("float") * 2.0 ** -(half + width)
    tail = middle + ((s1 << half) | (s2 >> half)).cast("float") * 2.0 ** -(half + 2 * width)
    scale = 2.0 ** (fraction + 1 - half)
    first = math.floor(math.pi / 2 * scale) / scale
    r = head * first + (head * (math.pi / 2 - first + _HALF_PI_REST) + tail * (math.pi / 2))
    quadrant = quadrant.cast("int")
    backward = (bits >> (width - 1)).equals(1)
    return negative.differs(backward).where(-r, r), backward.where(-quadrant, quadrant)


def _bits_from(place: Real, lowest: int) -> tuple[Real, Real, Real]:
    """Three words of 2 / pi; at `place` 0 their first bit is worth 2^(1 - lowest)."""
    width = place.bits
    leading = 2 - lowest  # zeros before the point
    highest = BIAS[width] - FRACTION[width] - lowest
    count = highest // width + 4
    mask = (1 << width) - 1
    shifts = [leading + _TWO_OVER_PI_BITS - width * (index + 1) for index in range(count)]
    words = [place.of(place.lift(_TWO_OVER_PI >> shift & mask)) for shift in shifts]
    index = place >> (width.bit_length() - 1)
    step = 1 << (count - 4).bit_length()
    while step := step >> 1:
        chosen = (index & step).differs(0)
        words = [chosen.where(b, a) for a, b in zip(words, words[step:] + words[-step:], strict=True)][: 3 + step]
    shift = place & (width - 1)
    rest = (width - 1) - shift
    first, second, third = ((a << shift) | ((b >> 1) >> rest) for a, b in pairwise(words))
    return first, second, third


def _high_product(a: Real, b: Real) -> Real:
    """The upper word of the product of two unsigned words."""
    half = a.bits // 2
    mask = (1 << half) - 1
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    return a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & mask)) >> half)
