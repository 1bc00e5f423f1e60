"""The functions of TIR's operator table, by name.

Vulkan guarantees little for GLSL.std.450's sin, cos, exp and log, and nothing in 64 bits. Square roots and what Vulkan
rounds correctly use those instructions; the rest is computed with exact reductions and polynomials (`elementary`,
`powers`), so that results are the same on every driver that adds, multiplies and divides in IEEE arithmetic.
docs/vulkan-operators.md lists the accuracy. 16-bit functions are computed in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen import elementary, powers
from tvm_attn.vulkan.codegen.arithmetic import Arithmetic
from tvm_attn.vulkan.codegen.real import Real
from tvm_attn.vulkan.codegen.values import DType, Value

# Rounding, signs and bits ---------------------------------------------------------------------------------------


def _round_half_away(x: Real) -> Real:
    whole = x.glsl("Trunc")
    step = x.of(x.lift(1.0)).with_sign_of(x)
    return (abs(x - whole) >= 0.5).where(whole + step, whole)


def _nextafter(x: Real, y: Real) -> Real:
    bits = x.to_bits()
    one = bits.of(bits.lift(1))
    away = ((y > x) & (x > 0.0)) | ((y < x) & (x < 0.0))
    stepped = away.where(bits + one, bits - one).as_float()
    smallest = one.as_float().with_sign_of(y)
    result = x.equals(0.0).where(smallest, stepped)
    return (x.differs(x) | y.differs(y)).where(x + y, x.equals(y).where(y, result))


def _round_half_even(x: Real) -> Real:
    """RoundEven of 64 bits: Mesa's lavapipe truncates halves on processors without AVX-512."""
    nearest = x.glsl("RoundEven")
    even = (2.0 * (x * 0.5).glsl("RoundEven")).with_sign_of(x)
    return (x - nearest).glsl("FAbs").differs(0.5).where(nearest, even)


_ONE: dict[str, Callable[[Real], Real]] = {
    "exp": elementary.exp,
    "exp2": elementary.exp2,
    "exp10": elementary.exp10,
    "sigmoid": elementary.sigmoid,
    "log": elementary.log,
    "log2": elementary.log2,
    "log10": elementary.log10,
    "log1p": elementary.log1p,
    "sin": elementary.sin,
    "cos": elementary.cos,
    "tan": elementary.tan,
    "asin": elementary.asin,
    "acos": elementary.acos,
    "atan": elementary.atan,
    "sinh": elementary.sinh,
    "cosh": elementary.cosh,
    "tanh": elementary.tanh,
    "asinh": elementary.asinh,
    "acosh": elementary.acosh,
    "atanh": elementary.atanh,
    "erf": elementary.erf,
}
_TWO: dict[str, Callable[[Real, Real], Real]] = {
    "pow": powers.pow,
    "atan2": elementary.atan2,
    "fmod": powers.fmod,
    "hypot": powers.hypot,
}
# Functions that GLSL.std.450 computes exactly, for any width.
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


# Functions in `_DIRECT` that are computed in 32 bits for 16-bit floats.
_WIDENED = frozenset(("sqrt", "rsqrt", "ldexp"))


class Mathematics:
    """Functions by their names in TIR and C."""

    NAMES = frozenset((*_ONE, *_TWO, *_EXACT, *_DIRECT, "min", "max"))

    def __init__(self, arith: Arithmetic) -> None:
        self.arith = arith

    def call(self, name: str, arguments: Sequence[Value], dtype: DType) -> Value:
        """The value of a function, of type `dtype`."""
        first = arguments[0].dtype
        if first.is_integer or first.kind == "bool":
            return self._of_integer(name, arguments)
        if name in ("min", "max"):
            return self.arith.extreme(name, arguments[0], arguments[1])
        if name == "nearbyint" and first.kind == "float" and first.bits == 64:
            return _round_half_even(Real(self.arith, arguments[0])).value
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
