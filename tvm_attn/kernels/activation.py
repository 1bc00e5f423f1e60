"""exp, tanh, erf as polynomials, and GPT-2's activation functions over them.

LLVM leaves exp, tanh and erf as one library call per element, even in vectorised loops (2.5-10 ns each). These are
branch-free expressions of adds, multiplies and selects, so they run in vector registers and look the same on every
target. The coefficients are minimax fits (Lawson's algorithm on Chebyshev nodes); in float32, exp2, tanh and
erf are within 3e-7 (relative); exp and sigmoid within 1.3e-7 * max(1, |x|), from rounding x * log2(e).

The functions take and return float32 expressions, for the epilogue of a kernel. The expression repeats its argument;
the code generator computes it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

# 2^f - 1 = f * P(f) on [-0.5, 0.5], relative error 2e-9.
_EXP2 = (
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398875016719103,
    0.00015353361959569156,
)
# tanh(x) = x + x * y * P(y), y = x^2, |x| <= 0.65, relative error 7e-9.
_TANH = (-0.3333325982093811, 0.1333083063364029, -0.05368802323937416, 0.02046941965818405, -0.005515164230018854)
# erf(x) = x * P(x^2), |x| <= 1.02, relative error 2e-9.
_ERF = (
    1.1283791065216064,
    -0.376126229763031,
    0.11283542960882187,
    -0.02685188315808773,
    0.005184340290725231,
    -0.0007972478633746505,
    7.720870053162798e-05,
)
# erfc(x) = exp(-x^2) * t * P(t), t = 1 / (1 + 0.47 x), x in [0.98, 4], absolute error 2e-10.
_ERFC = (
    0.26324430108070374,
    0.28115636110305786,
    0.18889014422893524,
    0.21913927793502808,
    0.157203808426857,
    -0.11000006645917892,
)


def _f32(value: float) -> tirx.Expr:
    return T.float32(value)


def _horner(x: tirx.Expr, coefficients: Sequence[float]) -> tirx.Expr:
    result = _f32(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _f32(coefficient)
    return result


def exp2(x: tirx.Expr) -> tirx.Expr:
    """2**x for float32; x is clamped to [-126, 126], so the result is finite, positive and a normal number.

    The range is reduced to ``x = n + f`` with n an integer and ``|f| <= 0.5``; 2**n is built from its exponent bits.
    """
    x = T.max(T.min(x, _f32(126.0)), _f32(-126.0))
    # floor(x + 0.5) instead of round: every backend has floor as one instruction, and ties do not matter here.
    n = T.floor(x + _f32(0.5))
    f = x - n
    power = T.reinterpret("float32", (T.Cast("int32", n) + T.int32(127)) << T.int32(23))
    return power + power * f * _horner(f, _EXP2)


def exp(x: tirx.Expr) -> tirx.Expr:
    """e**x for float32, |x| clamped near 87; relative error 3e-7 near 1 and 1e-7 * |x| at large |x|."""
    return exp2(x * _f32(math.log2(math.e)))


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """1 / (1 + e**-x) for float32."""
    return _f32(1.0) / (_f32(1.0) + exp(-x))


def tanh(x: tirx.Expr) -> tirx.Expr:
    """tanh (float32): an odd polynomial near zero, where the formula with exp would cancel; that formula elsewhere."""
    square = x * x
    small = x + x * square * _horner(square, _TANH)
    large = _f32(1.0) - _f32(2.0) / (exp(x + x) + _f32(1.0))
    return T.Select(T.abs(x) < _f32(0.625), small, large)


def erf(x: tirx.Expr) -> tirx.Expr:
    """The error function for float32: an odd polynomial for |x| < 1, otherwise 1 - erfc(|x|) with the sign of x."""
    small = x * _horner(x * x, _ERF)
    a = T.min(T.abs(x), _f32(4.0))
    t = _f32(1.0) / (_f32(1.0) + _f32(0.47) * a)
    large = _f32(1.0) - exp(-(a * a)) * t * _horner(t, _ERFC)
    return T.Select(T.abs(x) < _f32(1.0), small, T.Select(x < _f32(0.0), -large, large))


def _gelu_new(x: tirx.Expr) -> tirx.Expr:
    # 0.5 x (1 + tanh(u)) = x * sigmoid(2 u): one exp and no cancellation.
    u = _f32(math.sqrt(2.0 / math.pi)) * x * (_f32(1.0) + _f32(0.044715) * x * x)
    return x * sigmoid(u + u)


def _gelu(x: tirx.Expr) -> tirx.Expr:
    return _f32(0.5) * x * (_f32(1.0) + erf(x * _f32(math.sqrt(0.5))))


def _relu(x: tirx.Expr) -> tirx.Expr:
    return T.max(x, _f32(0.0))


def _silu(x: tirx.Expr) -> tirx.Expr:
    return x * sigmoid(x)


EXPRESSIONS: dict[str, Callable[[tirx.Expr], tirx.Expr]] = {
    "gelu_new": _gelu_new,
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
    "tanh": tanh,
}
"""TensorIR expression of each activation, by the name that GPT2Config.activation_function gives it."""


def _erf_float64(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_new": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf_float64(x * math.sqrt(0.5))),
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "tanh": np.tanh,
}
"""The same in NumPy float64, straight from the definitions."""
