"""Converts numbers that users pass to Python's own.

NumPy's numbers wrap around (`-np.uint8(5)` is 251) or overflow where Python's do not, and comparing arrays or tensors
does not give a bool. So each number is converted to an `int` or a `float` as soon as it is passed.
"""

from __future__ import annotations

import operator
from typing import Any

from tvm_attn.errors import GenerationError, TvmAttnError, shorten


def integer(
    name: str, value: Any, least: int, most: int | None = None, error: type[TvmAttnError] = GenerationError
) -> int:
    """`value` as an int: any integer will do, such as NumPy's or an integer array without dimensions, but not a bool.

    Raises:
        `error`: it is not an integer, or not in `least` .. `most`.
    """
    number = None
    if not is_bool(value) and getattr(value, "ndim", 0) == 0:
        try:
            number = operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            number = None
    if number is None or number < least or (most is not None and number > most):
        end = most if most is None or most < 1 << 63 else f"2**{most.bit_length()} - 1"
        legal = f"an integer of at least {least}" if end is None else f"an integer from {least} to {end}"
        raise error(f"{name} is {shorten(value)}; it must be {legal}")
    return number


def real(name: str, value: Any, legal: str, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` as a float: any real number will do, such as NumPy's or a Fraction, but neither a bool nor text.

    `legal` describes the interval in the message.

    Raises:
        GenerationError: it is no number, or not in [low, high], or (low, high] with `open_low`. NaN is in no interval.
    """
    number = None
    if not is_bool(value) and not isinstance(value, str | bytes | bytearray) and getattr(value, "ndim", 0) == 0:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = None
    if number is None or not low <= number <= high or (open_low and number == low):
        raise GenerationError(f"{name} is {shorten(value)}; it must be {legal}")
    return number


def is_bool(value: Any) -> bool:
    """Whether it is a bool of Python, NumPy or a tensor library."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
