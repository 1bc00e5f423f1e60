"""Every operator and type against NumPy: float32 and float16 against float64, float64 against extended precision."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import tirx

from tvm_attn.vulkan.codegen import calls, expressions
from tvm_attn.vulkan.codegen.mathematics import Mathematics
from tvm_attn.vulkan.codegen.statements import Statements

Array = np.ndarray[Any, Any]
Elementwise = Callable[..., Array]

_erf = np.vectorize(math.erf)
# Name -> reference, range of the arguments, bound in units in the last place for float32 and float64.
FUNCTIONS: dict[str, tuple[Callable[[Array], Array], tuple[float, float], tuple[float, float]]] = {
    "exp": (np.exp, (-85.0, 88.0), (2, 2)),
    "exp2": (np.exp2, (-124.0, 127.0), (2, 2)),
    "exp10": (lambda x: np.power(type(x.flat[0])(10), x), (-37.0, 38.0), (2.5, 3)),
    "log": (np.log, (1e-3, 1e3), (1.5, 1.5)),
    "log2": (np.log2, (1e-3, 1e3), (3, 3)),
    "log10": (np.log10, (1e-3, 1e3), (3.5, 4)),
    "log1p": (np.log1p, (-0.99, 10.0), (2, 2)),
    "sin": (np.sin, (-3000.0, 3000.0), (2, 2)),
    "cos": (np.cos, (-3000.0, 3000.0), (2, 2)),
    "tan": (np.tan, (-100.0, 100.0), (3.5, 3.5)),
    "asin": (np.arcsin, (-1.0, 1.0), (3, 3)),
    "acos": (np.arccos, (-1.0, 1.0), (2, 2)),
    "atan": (np.arctan, (-20.0, 20.0), (2.5, 2.5)),
    "sinh": (np.sinh, (-80.0, 80.0), (5, 6)),
    "cosh": (np.cosh, (-80.0, 80.0), (4, 4)),
    "tanh": (np.tanh, (-15.0, 15.0), (2, 2)),
    "asinh": (np.arcsinh, (-1e4, 1e4), (2, 2)),
    "acosh": (np.arccosh, (1.0, 1e4), (2.5, 2.5)),
    "atanh": (np.arctanh, (-0.999, 0.999), (3, 3)),
    "erf": (_erf, (-5.0, 5.0), (4, 10)),
    "sqrt": (np.sqrt, (0.0, 1e6), (1, 1)),
    "rsqrt": (lambda x: 1 / np.sqrt(x), (1e-3, 1e3), (2, 2)),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), (-80.0, 80.0), (4, 4)),
    "floor": (np.floor, (-10.0, 10.0), (0, 0)),
    "ceil": (np.ceil, (-10.0, 10.0), (0, 0)),
    "trunc": (np.trunc, (-10.0, 10.0), (0, 0)),
    "nearbyint": (np.rint, (-10.0, 10.0), (0, 0)),
    "abs": (np.abs, (-10.0, 10.0), (0, 0)),
}

# For float16, if the bound is not 1: TVM lowers these to several operations in 16 bits.
HALF_BOUNDS = {"sigmoid": 3, "rsqrt": 2}


def _units(got: Array, want: Array, dtype: str) -> float:
    """The largest error in units in the last place of `dtype`."""
    spacing = np.spacing(np.abs(want.astype(dtype))).astype(want.dtype)
    return float(np.max(np.abs(got.astype(want.dtype) - want) / spacing))


def _samples(low: float, high: float, dtype: str, count: int = 4096) -> Array:
    rng = np.random.default_rng(7)
    return np.concatenate([rng.uniform(low, high, count - 64), np.linspace(low, high, 64)]).astype(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_float32(name: str, elementwise: Elementwise) -> None:
    reference, (low, high), (bound, _) = FUNCTIONS[name]
    x = _samples(low, high, "float32")
    got = elementwise(getattr(tirx, name), [x], "float32", lanes=4)
    assert _units(got, reference(x.astype("float64")), "float32") <= bound


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_float64(name: str, elementwise: Elementwise) -> None:
    reference, (low, high), (_, bound) = FUNCTIONS[name]
    x = _samples(low, high, "float64", 1024)
    got = elementwise(getattr(tirx, name), [x], "float64")
    assert _units(got, reference(x if name == "erf" else x.astype(np.longdouble)), "float64") <= bound


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_float16(name: str, elementwise: Elementwise) -> None:
    reference, (low, high), _ = FUNCTIONS[name]
    x = _samples(max(low, -8.0), min(high, 8.0), "float16", 1024)
    if name in ("exp10", "sinh", "cosh"):
        x = x / np.float16(2)
    got = elementwise(getattr(tirx, name), [x], "float16")
    normal = np.abs(reference(x.astype("float64"))) > 2.0**-14
    assert _units(got[normal], reference(x.astype("float64"))[normal], "float16") <= HALF_BOUNDS.get(name, 1)


@pytest.mark.parametrize("lanes", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["sin", "cos", "tan"])
def test_angles_of_every_magnitude(name: str, dtype: str, lanes: int, elementwise: Elementwise) -> None:
    rng = np.random.default_rng(5)
    largest = np.finfo(dtype).max
    powers = rng.uniform(-3, np.log10(float(largest)) - 0.01, 2040)
    special = [largest, -largest, 1e4, 8192.0, -8191.9, 6e4, 33 * np.pi, np.finfo(dtype).tiny]
    x = np.concatenate([rng.choice([-1, 1], 2040) * 10.0**powers, special]).astype(dtype)
    if dtype != "float16":
        # Of all floats the one nearest to a multiple of pi / 2, where the reduction loses most (Kahan; Muller).
        x[:2] = 16367173.0 * 2.0**72 if dtype == "float32" else 6381956970095103.0 * 2.0**797
    want = getattr(np, name)(x.astype(np.longdouble if dtype == "float64" else "float64"))
    got = elementwise(getattr(tirx, name), [x], dtype, lanes=lanes)
    assert _units(got, want, dtype) <= (FUNCTIONS[name][2][1] if dtype != "float16" else 1)
    if name != "tan":
        assert np.abs(got).max() <= 1
    special = np.tile(np.array([np.inf, -np.inf, np.nan, 0.0], dtype), 8)
    assert np.isnan(elementwise(getattr(tirx, name), [special], dtype, lanes=lanes)[:3]).all()


def test_hypot_of_nan(elementwise: Elementwise) -> None:
    special = [0.0, 1.0, np.nan, np.inf, -np.inf, -3.0]
    x, y = (np.resize(np.array(v, "float32"), 64) for v in (np.repeat(special, 6), np.tile(special, 6)))
    np.testing.assert_allclose(elementwise(tirx.hypot, [x, y], "float32"), np.hypot(x, y), rtol=1e-6)


def test_acosh_below_one(elementwise: Elementwise) -> None:
    x = np.resize(np.array([0.999, 0.0, -0.0, -1.0, -1e30, -np.inf, np.nan], "float32"), 32)
    assert np.isnan(elementwise(tirx.acosh, [x], "float32")).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_takes_halves_as_on_the_cpu(dtype: str, elementwise: Elementwise) -> None:
    x = np.concatenate([np.arange(-8, 8, 0.5), np.linspace(-9, 9, 96)]).astype(dtype)
    cpu = elementwise(tirx.round, [x], dtype, target="llvm")
    np.testing.assert_array_equal(elementwise(tirx.round, [x], dtype), cpu)


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.5], "float32")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("exp", np.exp),
        ("log", np.log),
        ("log2", np.log2),
        ("log1p", np.log1p),
        ("tanh", np.tanh),
        ("erf", _erf),
        ("sqrt", np.sqrt),
        ("atan", np.arctan),
    ],
)
def test_special_values(name: str, reference: Callable[[Array], Array], elementwise: Elementwise) -> None:
    x = np.tile(SPECIAL, 4)
    with np.errstate(all="ignore"):
        want = reference(x.astype("float64")).astype("float32")
    np.testing.assert_allclose(elementwise(getattr(tirx, name), [x], "float32"), want, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_classification(dtype: str, elementwise: Elementwise) -> None:
    x = np.tile(SPECIAL, 4).astype(dtype)
    for name, reference in (("isnan", np.isnan), ("isinf", np.isinf), ("isfinite", np.isfinite)):
        np.testing.assert_array_equal(elementwise(getattr(tirx, name), [x], "bool"), reference(x))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2), ("float64", 2)])
def test_pow(dtype: str, bound: float, elementwise: Elementwise) -> None:
    rng = np.random.default_rng(3)
    x = np.exp(rng.uniform(-10, 10, 2048)).astype(dtype)
    y = rng.uniform(-8, 8, 2048).astype(dtype)
    wide = np.float64 if dtype == "float32" else np.longdouble
    got = elementwise(tirx.pow, [x, y], dtype)
    want = np.power(x.astype(wide), y.astype(wide))
    inside = (np.abs(want) > np.finfo(dtype).tiny) & (np.abs(want) < np.finfo(dtype).max)
    assert _units(got[inside], want[inside], dtype) <= bound


def test_pow_of_negative_bases_and_special_values(elementwise: Elementwise) -> None:
    values = np.array([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, -3.0, 0.5, -0.5, np.inf, -np.inf, np.nan, 3.0, -1.5], "float32")
    x, y = (grid.reshape(-1) for grid in np.meshgrid(values, values))
    x, y = np.resize(x, 224), np.resize(y, 224)
    with np.errstate(all="ignore"):
        want = np.power(x.astype("float64"), y.astype("float64")).astype("float32")
    np.testing.assert_allclose(elementwise(tirx.pow, [x, y], "float32"), want, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-3, -1, 0, 2, 3, 5])
def test_integer_powers(exponent: int, elementwise: Elementwise) -> None:
    x = _samples(-3.0, 3.0, "float32", 256)
    got = elementwise(lambda v: tirx.pow(v, tirx.const(float(exponent), "float32")), [x], "float32")
    np.testing.assert_allclose(got, x.astype("float64") ** exponent, rtol=1e-6)


def test_functions_of_two_arguments(elementwise: Elementwise) -> None:
    rng = np.random.default_rng(5)
    x, y = (rng.uniform(-50, 50, 1024).astype("float32") for _ in range(2))
    a, b = x.astype("float64"), y.astype("float64")
    for function, want, bound in (
        (tirx.atan2, np.arctan2(a, b), 4),
        (tirx.hypot, np.hypot(a, b), 3),
        (tirx.fmod, np.fmod(a, b), 0),
        (tirx.copysign, np.copysign(a, b), 0),
        (tirx.min, np.minimum(a, b), 0),
        (tirx.max, np.maximum(a, b), 0),
    ):
        assert _units(elementwise(function, [x, y], "float32"), want, "float32") <= bound
    np.testing.assert_array_equal(elementwise(tirx.nextafter, [x, y], "float32"), np.nextafter(x, y))


def test_ldexp_and_fma(elementwise: Elementwise) -> None:
    rng = np.random.default_rng(5)
    x, y, z = (rng.uniform(-50, 50, 1024).astype("float32") for _ in range(3))
    n = rng.integers(-100, 100, 1024, "int32")
    np.testing.assert_array_equal(elementwise(tirx.ldexp, [x, n], "float32"), np.ldexp(x, n))
    want = x.astype("float64") * y + z
    got = elementwise(tirx.op.fma, [x, y, z], "float32")
    assert np.max(np.abs(got - want)) <= np.spacing(np.float32(2500))  # of the largest product: one rounding or two


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def _integers(dtype: str, count: int = 256, seed: int = 1) -> Array:
    info = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    edges = np.array([info.min, info.max, 0, 1, info.max // 2], dtype)
    return np.concatenate([rng.integers(info.min, info.max, count - 5, dtype, endpoint=True), edges])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_arithmetic(dtype: str, elementwise: Elementwise) -> None:
    x, y = _integers(dtype), _integers(dtype, seed=2)
    divisor = np.where(y == 0, np.array(3, dtype), y)
    if dtype.startswith("int"):  # The smallest number has no counterpart: x / -1 overflows.
        divisor = np.where(divisor == -1, np.array(7, dtype), divisor)
    with np.errstate(over="ignore"):
        quotient = np.trunc(x.astype(np.longdouble) / divisor.astype(np.longdouble)).astype(dtype)
        cases: list[tuple[Callable[[Any, Any], Any], Array, Array]] = [
            (lambda a, b: a + b, y, x + y),
            (lambda a, b: a - b, y, x - y),
            (lambda a, b: a * b, y, x * y),
            (lambda a, b: a & b, y, x & y),
            (lambda a, b: a | b, y, x | y),
            (lambda a, b: a ^ b, y, x ^ y),
            (tirx.min, y, np.minimum(x, y)),
            (tirx.max, y, np.maximum(x, y)),
            (tirx.truncdiv, divisor, quotient),
            (tirx.truncmod, divisor, (x - quotient * divisor).astype(dtype)),
            (tirx.floordiv, divisor, np.floor_divide(x, divisor)),
            (tirx.floormod, divisor, np.mod(x, divisor)),
        ]
    for function, other, want in cases:
        np.testing.assert_array_equal(elementwise(function, [x, other], dtype), want)
    np.testing.assert_array_equal(elementwise(lambda a: ~a, [x], dtype), ~x)
    shift = np.abs(y.astype("int64") % np.iinfo(dtype).bits).astype(dtype)
    np.testing.assert_array_equal(elementwise(lambda a, b: a << b, [x, shift], dtype), np.left_shift(x, shift))
    np.testing.assert_array_equal(elementwise(lambda a, b: a >> b, [x, shift], dtype), np.right_shift(x, shift))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_counting_bits(dtype: str, elementwise: Elementwise) -> None:
    x, bits = _integers(dtype), np.iinfo(dtype).bits
    unsigned = [int(v) & ((1 << bits) - 1) for v in x]
    np.testing.assert_array_equal(elementwise(tirx.popcount, [x], dtype), [bin(v).count("1") for v in unsigned])
    if bits >= 32:
        got = elementwise(lambda a: tirx.clz(a).astype("int32"), [x], "int32")
        np.testing.assert_array_equal(got, [bits - v.bit_length() for v in unsigned])


@pytest.mark.parametrize("dtype", [*INTEGERS, "float16", "float32", "float64"])
def test_comparisons(dtype: str, elementwise: Elementwise) -> None:
    if dtype.startswith("float"):
        x, y = (np.random.default_rng(s).integers(-4, 4, 256).astype(dtype) for s in (1, 2))
        x[3] = np.nan
    else:
        x, y = _integers(dtype), _integers(dtype, seed=2)
        y[:64] = x[:64]
    for function, want in (
        (lambda a, b: a < b, x < y),
        (lambda a, b: a <= b, x <= y),
        (lambda a, b: a > b, x > y),
        (lambda a, b: a >= b, x >= y),
        (tirx.EQ, x == y),
        (tirx.NE, x != y),
    ):
        np.testing.assert_array_equal(elementwise(function, [x, y], "bool", lanes=4), want)


TYPES = [*INTEGERS, "float16", "float32", "float64", "bool"]


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("to", TYPES)
def test_casts(source: str, to: str, elementwise: Elementwise, vulkan: Any) -> None:
    if source == "uint32" and to == "float32" and "SwiftShader" in vulkan.device_name:
        pytest.xfail("this driver rounds to a neighbour of the nearest float32")
    if source == "bool":
        x = np.random.default_rng(0).integers(0, 2, 128).astype("bool")
    elif source.startswith("float"):  # Within the range of every type: other casts are undefined.
        x = np.random.default_rng(0).uniform(0 if to.startswith("u") else -100, 100, 128).astype(source)
    else:
        x = _integers(source, 128)
        if to == "float16":
            x = (x % np.array(1000 if np.iinfo(source).bits > 8 else 100, source)).astype(source)
    want = x != 0 if to == "bool" else x.astype(to)
    np.testing.assert_array_equal(elementwise(lambda a: a.astype(to), [x], to, lanes=4), want)


def test_bfloat16_is_rounded_to_the_nearest_even(elementwise: Elementwise) -> None:
    x = np.random.default_rng(0).standard_normal(512).astype("float32")
    x[:3] = [np.inf, np.nan, -0.0]
    half = x.astype(ml_dtypes.bfloat16)
    got = elementwise(lambda a: a.astype("bfloat16"), [x], "bfloat16")
    np.testing.assert_array_equal(got.view("uint16"), half.view("uint16"))
    with np.errstate(invalid="ignore"):
        want = (half.astype("float32") * half.astype("float32")).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        elementwise(lambda a: a * a, [half], "bfloat16").astype("float32"), want.astype("float32")
    )


@pytest.mark.parametrize(
    ("source", "to"), [("float32", "int32"), ("uint32", "float32"), ("float16", "uint16"), ("float64", "int64")]
)
def test_reinterpret(source: str, to: str, elementwise: Elementwise) -> None:
    x = (
        np.random.default_rng(0)
        .integers(0, 1 << 14, 64)
        .astype("uint16" if source == "float16" else source)
        .view(source)
    )
    got = elementwise(lambda a: tirx.reinterpret(to, a), [x], to)
    np.testing.assert_array_equal(got.view("uint8"), x.view("uint8"))


def test_select_and_if_then_else_of_bools(elementwise: Elementwise) -> None:
    x, y = (np.random.default_rng(s).standard_normal(256).astype("float32") for s in (1, 2))
    got = elementwise(lambda a, b: tirx.Select(tirx.all(a > 0, b > 0), a, b), [x, y], "float32", lanes=4)
    np.testing.assert_array_equal(got, np.where((x > 0) & (y > 0), x, y))
    got = elementwise(lambda a, b: tirx.if_then_else(tirx.any(a > 0, tirx.Not(b > 0)), a, b), [x, y], "float32")
    np.testing.assert_array_equal(got, np.where((x > 0) | ~(y > 0), x, y))


def test_unsupported_operator_names_operator_and_kernel(run: Callable[..., list[Array]]) -> None:
    from tvm.script import tirx as T

    from tvm_attn.errors import CompileError

    @T.prim_func(s_tir=True)
    def strange(a: T.handle):
        A = T.match_buffer(a, (32,), "float32")
        for i in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("b"):
                v = T.axis.remap("S", [i])
                A[v] = T.call_pure_extern("float32", "besselj", A[v])

    with pytest.raises(CompileError, match=r"strange.*besselj"):
        tvm.compile(tvm.IRModule({"strange": strange}), target="vulkan")


# The documentation ----------------------------------------------------------------------------------------------


def _documented() -> dict[str, dict[str, list[str]]]:
    """Section of docs/vulkan-operators.md -> name in the first column -> the other columns."""
    path = Path(__file__).parents[3] / "docs" / "vulkan-operators.md"
    sections: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = sections[line[3:]] = {}
        elif line.startswith("| `"):
            name, *columns = (column.strip() for column in line.strip("|").split(" |"))
            rows[name.strip("`")] = columns
    return sections


def test_documentation_lists_what_the_code_generator_supports() -> None:
    members = dir(Statements)
    sections = _documented()
    nodes = {name[1:] for name in members if re.fullmatch("_[A-Z][A-Za-z]+", name)}
    assert set(sections["Expressions"]) == nodes | set(expressions._BINARY) | set(expressions._COMPARE)
    assert set(sections["Mathematics"]) == Mathematics.NAMES
    methods = (re.fullmatch("_(?:call|effect)_(prim|tirx)_(.+)", name) for name in members)
    names = {f"{method[1]}.{method[2]}" for method in methods if method}
    assert set(sections["Calls"]) == names | calls._NOTHING | calls._TRANSPARENT | set(calls._ATOMICS)
    assert set(sections["Statements"]) == {name[6:] for name in members if name.startswith("_stmt_")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documented_accuracy_is_what_the_tests_hold(name: str) -> None:
    _, single, double, half, _ = _documented()["Mathematics"]["fabs" if name == "abs" else name]
    assert (float(single), float(double)) == FUNCTIONS[name][2]
    assert float(half) == HALF_BOUNDS.get(name, 1)
