"""What is known about integer expressions at compile time: an interval and a divisor.

The intervals decide where 64-bit arithmetic can be done in 32 bits, the divisors which vector accesses are aligned.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

_UNBOUNDED = 1 << 63
# A larger bound for the extent of a local or shared array does not help.
_MOST_ELEMENTS = 1 << 24


class Fact(NamedTuple):
    """low <= value <= high, and `divisor` divides it (0 for the value 0)."""

    low: int = -_UNBOUNDED
    high: int = _UNBOUNDED
    divisor: int = 1

    @property
    def fits_int32(self) -> bool:
        return self.low >= -(1 << 31) and self.high < 1 << 31

    def aligned(self, lanes: int) -> int:
        """The largest power of two up to `lanes` that divides the value."""
        best = 1
        while best * 2 <= lanes and self.divisor % (best * 2) == 0:
            best *= 2
        return best


UNKNOWN = Fact()


def of_constant(value: int) -> Fact:
    return Fact(value, value, abs(value))


def _of_type(bits: int, signed: bool) -> Fact:
    return Fact(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else Fact(0, (1 << bits) - 1)


class Facts:
    """Facts about the expressions of one kernel. Variables are bound as the walk meets them; results are remembered."""

    def __init__(self) -> None:
        self._known: dict[int, Fact] = {}

    def bind(self, var: Any, fact: Fact) -> None:
        """States a fact about a variable."""
        self._known[var.__chandle__()] = fact

    def of(self, expr: Any) -> Fact:
        """The fact about an integer expression."""
        handle = expr.__chandle__()
        known = self._known.get(handle)
        if known is None:
            known = self._known[handle] = self._derive(expr)
        return known

    def most_elements(self, extent: Any) -> int | None:
        """An upper bound of an extent with no negative part: 8 for min(n, 8). None if unknown."""
        fact = self.of(extent)
        if fact.high < _MOST_ELEMENTS:
            return fact.high
        kind = type(extent).__name__
        if kind not in ("Min", "Mul", "Add"):
            return None
        a, b = self.most_elements(extent.a), self.most_elements(extent.b)
        if kind == "Min":
            return min((bound for bound in (a, b) if bound is not None), default=None)
        if a is None or b is None:
            return None
        return a * b if kind == "Mul" else a + b

    def _derive(self, expr: Any) -> Fact:
        rule = _RULES.get(type(expr).__name__)
        if rule == "constant":
            return of_constant(int(expr.value))
        dtype = expr.ty.dtype if hasattr(expr.ty, "dtype") else None
        if dtype is None or dtype.type_code not in (0, 1) or dtype.lanes != 1:
            return UNKNOWN
        limits = _of_type(dtype.bits, dtype.type_code == 0)
        if rule is None:
            return limits
        if rule == "cast":
            inner = expr.value.ty.dtype
            fact = self.of(expr.value) if inner.type_code in (0, 1) else UNKNOWN
            if inner.type_code == 6:
                fact = Fact(0, 1)
        elif rule == "select":
            a, b = self.of(expr.true_value), self.of(expr.false_value)
            fact = Fact(min(a.low, b.low), max(a.high, b.high), gcd(a.divisor, b.divisor))
        else:
            fact = _combine(rule, self.of(expr.a), self.of(expr.b))
        if fact.low < limits.low or fact.high > limits.high:  # It may wrap: only powers of two survive that.
            return Fact(limits.low, limits.high, fact.divisor & -fact.divisor)
        return fact


_RULES = {
    "IntImm": "constant",
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Min": "min",
    "Max": "max",
    "FloorDiv": "floordiv",
    "Div": "div",
    "FloorMod": "floormod",
    "Mod": "mod",
    "LShift": "shl",
    "RShift": "shr",
    "BitwiseAnd": "and",
    "Cast": "cast",
    "Select": "select",
}


def _combine(rule: str, a: Fact, b: Fact) -> Fact:
    """The fact about the result of a binary operation."""
    if rule == "add":
        return Fact(a.low + b.low, a.high + b.high, gcd(a.divisor, b.divisor))
    if rule == "sub":
        return Fact(a.low - b.high, a.high - b.low, gcd(a.divisor, b.divisor))
    if rule == "mul":
        ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
        return Fact(min(ends), max(ends), a.divisor * b.divisor)
    if rule in ("min", "max"):
        pick = min if rule == "min" else max
        return Fact(pick(a.low, b.low), pick(a.high, b.high), gcd(a.divisor, b.divisor))
    if b.low != b.high or b.low < 0:
        return UNKNOWN if rule != "and" or a.low < 0 else Fact(0, a.high)
    c = b.low
    if rule == "shl":
        return Fact(a.low << c, a.high << c, a.divisor << c) if c < 64 else UNKNOWN
    if rule == "shr":
        return Fact(a.low >> c, a.high >> c, max(a.divisor >> c, 1) if a.divisor % (1 << c) == 0 else 1)
    if rule == "and":
        return Fact(0, c if a.low < 0 else min(a.high, c))
    if c == 0:
        return UNKNOWN
    exact = a.divisor % c == 0
    if rule == "floordiv" or (rule == "div" and a.low >= 0):
        return Fact(a.low // c, a.high // c, a.divisor // c if exact else 1)
    if rule == "floormod" or (rule == "mod" and a.low >= 0):
        return Fact(0, 0 if exact else min(c - 1, a.high) if a.low >= 0 else c - 1, 0 if exact else gcd(a.divisor, c))
    return UNKNOWN
