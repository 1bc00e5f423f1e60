"""Integers of every type against Python's, which are exact: operators with edge-case constants, and random expressions.

Only what TIR defines is compared: no signed overflow, no division by zero, no shift by a negative number or the width.
"""

import functools
import operator
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from tvm_attn.vulkan.codegen import pipeline

Array = np.ndarray[Any, Any]
TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


class Undefined(Exception):
    """TIR gives the expression no value for these operands."""


def bits(dtype: str) -> int:
    return int(dtype.lstrip("uint"))


def limits(dtype: str) -> tuple[int, int]:
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def wrapped(value: int, dtype: str) -> int:
    """The value wrapped as by casts and unsigned arithmetic."""
    value &= (1 << bits(dtype)) - 1
    return value - (1 << bits(dtype)) if dtype[0] == "i" and value >> (bits(dtype) - 1) else value


def checked(value: int, dtype: str) -> int:
    """The value, if the type can hold it."""
    if not limits(dtype)[0] <= value <= limits(dtype)[1]:
        raise Undefined
    return value


def _truncated(a: int, b: int) -> int:
    if b == 0:
        raise Undefined
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _floored(a: int, b: int) -> int:
    if b == 0:
        raise Undefined
    return a // b


def _shifted(a: int, b: int, dtype: str, left: bool) -> int:
    if not 0 <= b < bits(dtype):
        raise Undefined
    return a << b if left else a >> b


def _remainder(a: int, b: int, dtype: str, quotient: int) -> int:
    checked(quotient, dtype)
    return a - b * quotient


# Name -> the operator in TIR, and on Python's integers and their type.
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[[int, int, str], int]]] = {
    "add": (operator.add, lambda a, b, _: a + b),
    "sub": (operator.sub, lambda a, b, _: a - b),
    "mul": (operator.mul, lambda a, b, _: a * b),
    "truncdiv": (tirx.truncdiv, lambda a, b, _: _truncated(a, b)),
    "truncmod": (tirx.truncmod, lambda a, b, dtype: _remainder(a, b, dtype, _truncated(a, b))),
    "floordiv": (tirx.floordiv, lambda a, b, _: _floored(a, b)),
    "floormod": (tirx.floormod, lambda a, b, dtype: _remainder(a, b, dtype, _floored(a, b))),
    "shl": (operator.lshift, lambda a, b, dtype: _shifted(a, b, dtype, True)),
    "shr": (operator.rshift, lambda a, b, dtype: _shifted(a, b, dtype, False)),
    "and": (operator.and_, lambda a, b, _: a & b),
    "or": (operator.or_, lambda a, b, _: a | b),
    "xor": (operator.xor, lambda a, b, _: a ^ b),
    "min": (tirx.min, lambda a, b, _: min(a, b)),
    "max": (tirx.max, lambda a, b, _: max(a, b)),
}
COMPARISONS: dict[str, tuple[Callable[..., Any], Callable[[int, int], bool]]] = {
    "lt": (operator.lt, operator.lt),
    "le": (operator.le, operator.le),
    "gt": (operator.gt, operator.gt),
    "ge": (operator.ge, operator.ge),
    "eq": (tirx.EQ, operator.eq),
    "ne": (tirx.NE, operator.ne),
}


def telling(dtype: str) -> list[int]:
    """Numbers at which integer code tends to fail."""
    low, high = limits(dtype)
    powers = [(1 << power) + by for power in (7, 15, 16, 31, 32) for by in (-1, 0)]
    chosen = (0, 1, 2, 3, 7, 8, 100, *powers, high - 1, high, low, low + 1)
    return sorted({value for number in chosen for value in (number, -number) if low <= value <= high})


def samples(dtype: str, seed: int) -> list[int]:
    """Telling numbers and others of every magnitude."""
    rng = random.Random(seed)
    widths = [rng.randint(1, bits(dtype)) for _ in range(30)]
    return telling(dtype) + [wrapped(rng.choice((1, -1)) * rng.getrandbits(width), dtype) for width in widths]


def evaluate(
    expressions: list[tuple[str, Callable[..., Any]]],
    columns: list[Array],
    lanes: int,
    device: Any,
    passes: str = "default",
) -> list[Array]:
    """The values of expressions of the columns' elements, in vectors of `lanes`, many in one kernel."""
    size, together = columns[0].size, 16
    functions, results = {}, []
    for first in range(0, len(expressions), together):
        chosen = [expression for _, expression in expressions[first : first + together]]
        inputs = [te.placeholder((size,), str(a.dtype), name=f"a{n}") for n, a in enumerate(columns)]
        outs = te.compute((size,), functools.partial(_elements, chosen, inputs), name="out")
        outs = outs if len(chosen) > 1 else [outs]
        schedule = tvm.s_tir.Schedule(te.create_prim_func([*inputs, *outs]).with_attr("global_symbol", f"f{first}"))
        (loop,) = schedule.get_loops(schedule.get_child_blocks(schedule.get_sblock("root"))[0])
        block, thread, vector = schedule.split(loop, [None, 32, lanes])
        schedule.bind(block, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        if lanes > 1:
            schedule.vectorize(vector)
        functions[f"f{first}"] = schedule.mod["main"]
    executable = tvm.compile(tvm.IRModule(functions), target="vulkan", tir_pipeline=passes)
    held = [tvm.runtime.tensor(a, device) for a in columns]
    for first in range(0, len(expressions), together):
        outs = [tvm.runtime.tensor(np.zeros(size, dtype), device) for dtype, _ in expressions[first : first + together]]
        executable[f"f{first}"](*held, *outs)
        results += [out.numpy() for out in outs]
    return results


def _elements(expressions: list[Callable[..., Any]], inputs: list[Any], index: Any) -> Any:
    values = tuple(expression(*(tensor[index] for tensor in inputs)) for expression in expressions)
    return values if len(values) > 1 else values[0]


def check(got: Array, want: Callable[..., int], columns: list[Array], what: str) -> None:
    """Compares element by element, where `want` is defined."""
    for place, operands in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        try:
            expected = want(*operands)
        except Undefined:
            continue
        assert got[place] == expected, f"{what} of {operands}: {got[place]}, not {expected}"


def padded(values: list[int], dtype: str) -> Array:
    return np.array(values + [1] * (-len(values) % 4), dtype)


def pairs(dtype: str) -> list[Array]:
    """All pairs of telling numbers, and some of others."""
    left = [a for a in telling(dtype) for _ in telling(dtype)] + samples(dtype, 1)
    right = telling(dtype) * len(telling(dtype)) + samples(dtype, 2)
    count = min(len(left), len(right))
    return [padded(left[:count], dtype), padded(right[:count], dtype)]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("dtype", TYPES)
def test_operators(dtype: str, lanes: int, vulkan: Any) -> None:
    columns = pairs(dtype)
    plain = [(dtype, tir) for tir, _ in OPERATORS.values()]
    tests = [("bool", tir) for tir, _ in COMPARISONS.values()]
    results = evaluate(plain + tests, columns, lanes, vulkan)
    for (name, (_, exact)), got in zip(OPERATORS.items(), results[: len(plain)], strict=True):
        check(got, lambda a, b, exact=exact: checked(exact(a, b, dtype), dtype), columns, f"{name} {dtype}")
    for (name, (_, test)), got in zip(COMPARISONS.items(), results[len(plain) :], strict=True):
        check(got, test, columns, f"{name} {dtype}")


@pytest.mark.parametrize(("dtype", "lanes"), [*((dtype, 1) for dtype in TYPES), ("int64", 4), ("uint8", 4)])
def test_operators_with_constants(dtype: str, lanes: int, vulkan: Any) -> None:
    """The same with a constant on the right, about which the compiler knows more."""
    column = [padded(samples(dtype, 3), dtype)]
    cases = []
    for constant in telling(dtype):
        for name, (tir, exact) in OPERATORS.items():
            shift, divide = name in ("shl", "shr"), "div" in name or name in ("truncmod", "floormod")
            if (shift and not 0 <= constant < bits(dtype)) or (divide and constant == 0):
                continue
            if constant == limits(dtype)[0] < 0 and name == "mul":  # TVM's simplifier negates it, and fails.
                continue
            cases.append((f"{name} {constant}", tir, exact, constant))
    expressions = [(dtype, lambda a, t=tir, c=constant: t(a, tirx.const(c, dtype))) for _, tir, _, constant in cases]
    for (name, _, exact, c), got in zip(cases, evaluate(expressions, column, lanes, vulkan), strict=True):
        check(got, lambda a, exact=exact, c=c: checked(exact(a, c, dtype), dtype), column, f"{name} {dtype}")


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("source", [*TYPES, "bool"])
def test_casts(source: str, lanes: int, vulkan: Any) -> None:
    values = [0, 1] * 4 if source == "bool" else samples(source, 4)
    column = [padded(values, source)]
    results = evaluate([(to, lambda a, to=to: a.astype(to)) for to in [*TYPES, "bool"]], column, lanes, vulkan)
    for to, got in zip([*TYPES, "bool"], results, strict=True):
        check(got, lambda a, to=to: a != 0 if to == "bool" else wrapped(int(a), to), column, f"{source} as {to}")


@pytest.mark.parametrize("source", TYPES)
def test_casts_to_floats_and_back(source: str, vulkan: Any) -> None:
    column = [padded(samples(source, 5), source)]
    half = abs(column[0].astype("float64")) < 65000
    results = evaluate(
        [(to, lambda a, to=to: a.astype(to)) for to in ("float16", "float32", "float64")], column, 1, vulkan
    )
    for to, got in zip(("float16", "float32", "float64"), results, strict=True):
        keep = half if to == "float16" else np.ones_like(half)
        np.testing.assert_array_equal(got[keep], column[0].astype(to)[keep], err_msg=f"{source} as {to}")
    low, high = limits(source)
    floats = [np.array([v for v in (-1.9, -0.5, 0.5, 1.9, 100.7, float(low), low + 1.5, high / 2) if low <= v < high])]
    floats = [np.resize(floats[0], 32)]
    (got,) = evaluate([(source, lambda a: a.astype(source))], floats, 1, vulkan)
    np.testing.assert_array_equal(got, [int(v) for v in floats[0]])


@pytest.mark.parametrize("dtype", TYPES)
def test_bits(dtype: str, vulkan: Any) -> None:
    column = [padded(samples(dtype, 6), dtype)]
    width = bits(dtype)
    expressions = [(dtype, lambda a: ~a), (dtype, tirx.popcount)]
    if dtype[0] == "i":
        expressions.append((dtype, tirx.abs))
    if width >= 32:
        expressions.append(("int32", lambda a: tirx.clz(a)))
    results = dict(zip(["not", "popcount", "abs", "clz"], evaluate(expressions, column, 1, vulkan), strict=False))
    check(results["not"], lambda a: wrapped(~a, dtype), column, f"~{dtype}")
    check(results["popcount"], lambda a: bin(a & ((1 << width) - 1)).count("1"), column, f"popcount {dtype}")


def test_quotients_and_shifts_beyond_32_bits(vulkan: Any) -> None:
    """64-bit operators on an int32, where the result fits 32 bits and the operands do not."""
    columns = [padded(samples("int32", 7), "int32")]
    cases: dict[str, tuple[Callable[..., Any], Callable[..., int]]] = {
        "floordiv": (lambda a: tirx.floordiv(a, tirx.const(1 << 32, "int64")), lambda a: a // (1 << 32)),
        "floordiv -": (lambda a: tirx.floordiv(a, tirx.const(-(1 << 33), "int64")), lambda a: a // -(1 << 33)),
        "truncdiv": (lambda a: tirx.truncdiv(a, tirx.const(1 << 40, "int64")), lambda a: 0),
        "floormod": (lambda a: tirx.floormod(a, tirx.const(1 << 32, "int64")), lambda a: a % (1 << 32)),
        "truncmod": (lambda a: tirx.truncmod(a, tirx.const(-(1 << 32), "int64")), lambda a: a),
        "overflow": (lambda a: tirx.truncdiv(a, tirx.const(-1, "int64")), lambda a: -a),
        "floor overflow": (lambda a: tirx.floordiv(a, tirx.const(-1, "int64")), lambda a: -a),
    }
    expressions = [("int64", lambda a, t=tir: t(a.astype("int64"))) for tir, _ in cases.values()]
    for (name, (_, exact)), got in zip(cases.items(), evaluate(expressions, columns, 1, vulkan), strict=True):
        check(got, exact, columns, name)


@pytest.mark.parametrize("lanes", [1, 4])
def test_shifts_by_variable_amounts(lanes: int, vulkan: Any) -> None:
    """TVM narrows int64(a) >> n to 32 bits."""
    numbers = samples("int32", 8)
    columns = [padded([a for a in numbers for _ in range(64)], "int32"), padded([*range(64)] * len(numbers), "int32")]
    (right, left) = evaluate(
        [
            ("int64", lambda a, n: a.astype("int64") >> n.astype("int64")),
            ("int64", lambda a, n: a.astype("int64") << n.astype("int64")),
        ],
        columns,
        lanes,
        vulkan,
    )
    check(right, lambda a, n: a >> n, columns, "shift right")
    check(left, lambda a, n: checked(a << n, "int64"), columns, "shift left")


def test_our_pipeline_shifts_beyond_32_bits(vulkan: Any) -> None:
    """TVM's own refuses int64(a) >> 33."""
    pipeline.register()
    columns = [padded(samples("int32", 9), "int32")]
    amounts = (31, 32, 33, 62, 63)
    expressions = [("int64", lambda a, n=n: a.astype("int64") >> tirx.const(n, "int64")) for n in amounts]
    for n, got in zip(amounts, evaluate(expressions, columns, 1, vulkan, pipeline.NAME), strict=True):
        check(got, lambda a, n=n: a >> n, columns, f"shift by {n}")


class Generator:
    """Random expressions with their values: pairs of a TIR expression of the columns and a Python function."""

    def __init__(self, seed: int, sources: list[str]) -> None:
        self.rng = random.Random(seed)
        self.sources = sources

    def leaf(self, dtype: str) -> tuple[Callable[..., Any], Callable[..., int]]:
        if self.rng.random() < 0.4:
            value = self.rng.choice(telling(dtype))
            return lambda *_: tirx.const(value, dtype), lambda *_: value
        place = self.rng.randrange(len(self.sources))
        source = self.sources[place]
        if source == dtype:
            return lambda *row: row[place], lambda *row: row[place]
        return lambda *row: row[place].astype(dtype), lambda *row: wrapped(row[place], dtype)

    def expression(self, dtype: str, depth: int) -> tuple[Callable[..., Any], Callable[..., int]]:
        if depth == 0:
            return self.leaf(dtype)
        kind = self.rng.random()
        if kind < 0.2:
            other = self.rng.choice(("int32", "int64", dtype))
            tir, exact = self.expression(other, depth - 1)
            return lambda *row: tir(*row).astype(dtype), lambda *row: wrapped(exact(*row), dtype)
        (left, a), (right, b) = self.expression(dtype, depth - 1), self.expression(dtype, self.rng.randrange(depth))
        if kind < 0.3:
            compare, test = COMPARISONS[self.rng.choice(list(COMPARISONS))]
            return (
                lambda *row: tirx.Select(compare(left(*row), right(*row)), left(*row), right(*row)),
                lambda *row: a(*row) if test(a(*row), b(*row)) else b(*row),
            )
        name = self.rng.choice(list(OPERATORS))
        tir, exact = OPERATORS[name]
        if name in ("shl", "shr"):  # TVM checks constant amounts.
            by = self.rng.randrange(bits(dtype))
            right, b = lambda *_: tirx.const(by, dtype), lambda *_: by
        return (
            lambda *row: tir(left(*row), right(*row)),
            lambda *row: checked(exact(checked(a(*row), dtype), checked(b(*row), dtype), dtype), dtype),
        )


@pytest.mark.parametrize("seed", range(8))
def test_random_expressions(seed: int, vulkan: Any) -> None:
    sources = ["int64", "int32", "int16", "int64"]
    generator = Generator(seed, sources)
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(padded(samples(source, 10 * seed + n), source)) for n, source in enumerate(sources)]
    size = min(column.size for column in columns)
    columns = [column[:size] for column in columns]
    for number in range(24):
        dtype = generator.rng.choice(["int64", "int64", "int32"])
        tir, exact = generator.expression(dtype, generator.rng.randint(1, 4))
        try:
            (got,) = evaluate([(dtype, tir)], columns, 1, vulkan)
        except (ValueError, tvm.error.InternalError):
            continue  # TVM folds constants, and fails if that overflows or divides by zero.
        check(got, exact, columns, f"expression {number}")
