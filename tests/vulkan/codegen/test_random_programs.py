"""Random programs on the CPU (TVM's LLVM back end) and on Vulkan: the same seed always gives the same programs.

A program is TVMScript text, so that a failure shows what to reduce. Each expression is made together with an interval
for its values and a bound for its rounding error: integers never leave their type, only exact values are compared or
cast to integers, and inexact results may differ by the sum of both sides' errors.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import tvm

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "float32", "float64"]
STORED = [*INTEGERS, *FLOATS, "bfloat16", "bool"]
# Integers up to this magnitude are exact in a float; it is also the largest float that the programs use.
EXACT = {"float16": 1 << 11, "float32": 1 << 24, "float64": 1 << 53}
LARGEST = {"float16": 3e4, "float32": 1e30, "float64": 1e100}
# Magnitude of the inputs; those of floats are integers, so that sums and products of a few of them are exact.
SMALL = 8


class Expr(NamedTuple):
    """TVMScript text, type, interval of the values and bound of the error (0: exact; floats are then integers)."""

    text: str
    dtype: str
    low: float
    high: float
    error: float = 0.0

    @property
    def magnitude(self) -> float:
        return max(abs(self.low), abs(self.high))


def limits(dtype: str) -> tuple[float, float]:
    """The interval of exact values of a type."""
    if dtype in EXACT:
        return -EXACT[dtype], EXACT[dtype]
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def epsilon(dtype: str) -> float:
    return float(np.finfo(dtype).eps)


class Generator:
    """Makes expressions from a random state and leaves: loads that are legal anywhere."""

    def __init__(self, rng: random.Random, leaves: Sequence[Expr]) -> None:
        self.rng = rng
        self.leaves = list(leaves)

    def leaf(self, dtype: str) -> Expr:
        """A load of the type, a cast of another load, or a number."""
        same = [leaf for leaf in self.leaves if leaf.dtype == dtype]
        if same and self.rng.random() < 0.8:
            return self.rng.choice(same)
        if self.rng.random() < 0.7:
            return self.cast(self.rng.choice(self.leaves), dtype)
        value = self.rng.randint(-SMALL if not dtype.startswith("u") else 0, SMALL)
        return Expr(f"T.{dtype}({value})", dtype, value, value)

    def cast(self, value: Expr, dtype: str) -> Expr:
        """A cast that is defined: a value that may not fit is brought into range first."""
        if value.dtype == dtype:
            return value
        text = f'T.Cast("{dtype}", {value.text})'
        if value.dtype == "bool":
            return Expr(text, dtype, 0, 1)
        low, high = limits(dtype)
        if dtype in FLOATS:
            if value.magnitude > LARGEST[dtype]:
                return self.cast(self.bounded(value, SMALL), dtype)
            if value.error == 0 and value.magnitude <= EXACT[dtype]:
                return Expr(text, dtype, value.low, value.high)
            rounding = value.magnitude * epsilon(dtype)
            return Expr(text, dtype, value.low - rounding, value.high + rounding, value.error + rounding)
        if value.dtype in FLOATS:
            if value.error:
                return self.leaf(dtype)
            if value.low < low or value.high > high:
                return self.cast(self.bounded(value, SMALL, max(low, -SMALL)), dtype)
        elif dtype.startswith("u") and value.low < 0:  # TVM's simplifier rejects negative unsigned numbers.
            return self.cast(self.bounded(value, SMALL, 0), dtype)
        elif value.low < low or value.high > high:
            return Expr(text, dtype, low, high)  # Integers wrap, as in C.
        return Expr(text, dtype, value.low, value.high)

    def bounded(self, value: Expr, high: int, low: int | None = None) -> Expr:
        """The value between `low` (0 if the type is unsigned) and `high`."""
        low = (0 if value.dtype.startswith("u") else -high) if low is None else int(low)
        number = f"T.{value.dtype}"
        text = f"T.max(T.min({value.text}, {number}({high})), {number}({low}))"
        return Expr(text, value.dtype, max(min(value.low, high), low), min(max(value.high, low), high), value.error)

    def positive(self, value: Expr) -> Expr:
        if value.low >= 1:
            return value
        return self.bounded(value, int(min(max(value.high, 2), 100)), 1)

    def expr(self, dtype: str, depth: int) -> Expr:
        """An expression of type `dtype`, at most `depth` operators deep."""
        if depth <= 0:
            return self.leaf(dtype)
        choices = [self._arithmetic, self._arithmetic, self._extreme, self._choice, self._converted]
        choices += [self._function, self._quotient] if dtype in FLOATS else [self._divided, self._bits, self._shifted]
        return self.rng.choice(choices)(dtype, depth - 1)

    def _two(self, dtype: str, depth: int) -> tuple[Expr, Expr]:
        return self.expr(dtype, depth), self.expr(dtype, depth if self.rng.random() < 0.7 else 0)

    def _arithmetic(self, dtype: str, depth: int) -> Expr:
        operator = self.rng.choice("+-*")
        operands = self._two(dtype, depth)
        result = _combined(operator, *operands)
        if result is None:
            a, b = (self.bounded(operand, SMALL, 0) for operand in operands)
            result = _combined("+" if operator == "-" else operator, a, b)
        assert result is not None
        return result

    def _extreme(self, dtype: str, depth: int) -> Expr:
        pick = self.rng.choice([min, max])
        a, b = self._two(dtype, depth)
        text = f"T.{pick.__name__}({a.text}, {b.text})"
        return Expr(text, dtype, pick(a.low, b.low), pick(a.high, b.high), max(a.error, b.error))

    def _choice(self, dtype: str, depth: int) -> Expr:
        a, b = self._two(dtype, depth)
        name = self.rng.choice(["T.Select", "T.if_then_else"])
        text = f"{name}({self.condition(depth)}, {a.text}, {b.text})"
        return Expr(text, dtype, min(a.low, b.low), max(a.high, b.high), max(a.error, b.error))

    def condition(self, depth: int) -> str:
        """A bool: comparisons of exact values, joined."""
        kind = self.rng.random()
        if depth > 0 and kind < 0.3:
            operator = self.rng.choice(["And", "Or"])
            return f"T.{operator}({self.condition(depth - 1)}, {self.condition(depth - 1)})"
        if depth > 0 and kind < 0.4:
            return f"T.Not({self.condition(depth - 1)})"
        bools = [leaf.text for leaf in self.leaves if leaf.dtype == "bool"]
        if bools and kind < 0.6:
            return self.rng.choice(bools)
        dtype = self.rng.choice(INTEGERS + FLOATS)
        a, b = self.expr(dtype, depth), self.leaf(dtype)
        if dtype.startswith("u"):  # TVM's simplifier subtracts unsigned numbers from each other.
            a, b = (self.cast(self.rng.choice(self.leaves), dtype) for _ in range(2))
        if a.error or b.error:
            a, b = self.leaf("int32"), self.leaf("int32")
        return f"{a.text} {self.rng.choice(['<', '<=', '>', '>=', '==', '!='])} {b.text}"

    def _converted(self, dtype: str, depth: int) -> Expr:
        return self.cast(self.expr(self.rng.choice(INTEGERS + FLOATS), depth), dtype)

    def _divided(self, dtype: str, depth: int) -> Expr:
        a, b = self._two(dtype, depth)
        b = self.positive(b)
        name = self.rng.choice(["floordiv", "floormod", "truncdiv", "truncmod"])
        bound = a.magnitude if name.endswith("div") else b.high - 1
        low = 0 if a.low >= 0 or name == "floormod" else -bound
        return Expr(f"T.{name}({a.text}, {b.text})", dtype, low, bound)

    def _bits(self, dtype: str, depth: int) -> Expr:
        a, b = self._two(dtype, depth)
        bits = max(int(a.magnitude), int(b.magnitude)).bit_length()
        low, high = limits(dtype)
        name = self.rng.choice(["and", "or", "xor"])
        signed = a.low < 0 or b.low < 0
        interval = (max(low, -(1 << bits)) if signed else 0, min(high, (1 << bits) - 1))
        return Expr(f"T.bitwise_{name}({a.text}, {b.text})", dtype, *interval)

    def _shifted(self, dtype: str, depth: int) -> Expr:
        a, amount = self.expr(dtype, depth), self.rng.randint(0, 4)
        low, high = limits(dtype)
        number = f"T.{dtype}({amount})"
        if self.rng.random() < 0.5 and low <= int(a.low) << amount and int(a.high) << amount <= high:
            return Expr(f"T.shift_left({a.text}, {number})", dtype, int(a.low) << amount, int(a.high) << amount)
        return Expr(f"T.shift_right({a.text}, {number})", dtype, int(a.low) >> amount, int(a.high) >> amount)

    def _function(self, dtype: str, depth: int) -> Expr:
        """A function whose slope is at most 1 where it is used."""
        a = self.bounded(self.expr(dtype, depth), SMALL)
        name = self.rng.choice(["tanh", "sin", "cos", "sqrt", "sigmoid", "abs", "floor", "exp"])
        if name in ("abs", "floor"):
            if a.error and name == "floor":
                return a
            return Expr(f"T.{name}({a.text})", dtype, 0 if name == "abs" else a.low, a.magnitude, a.error)
        inner = {"exp": f"-T.abs({a.text})", "sqrt": f"T.abs({a.text}) + T.{dtype}(1)"}.get(name, a.text)
        # 16 roundings: TVM's own tanh for CPUs, and 16-bit sigmoid, are no closer.
        return Expr(f"T.{name}({inner})", dtype, -4, 4, a.error + 16 * epsilon(dtype))

    def _quotient(self, dtype: str, depth: int) -> Expr:
        a, b = self.bounded(self.expr(dtype, depth), SMALL), self.bounded(self.expr(dtype, depth), SMALL)
        below = f"(T.abs({b.text}) + T.{dtype}(1))"
        error = a.error + a.magnitude * b.error + 4 * a.magnitude * epsilon(dtype)
        return Expr(f"({a.text} / {below})", dtype, -a.magnitude, a.magnitude, error)


def _combined(operator: str, a: Expr, b: Expr) -> Expr | None:
    """a + b, a - b or a * b with its interval; None if it may leave the type."""
    ends = {
        "+": [a.low + b.low, a.high + b.high],
        "-": [a.low - b.high, a.high - b.low],
        "*": [x * y for x in (a.low, a.high) for y in (b.low, b.high)],
    }[operator]
    low, high = min(ends), max(ends)
    least, most = limits(a.dtype)
    text = f"({a.text} {operator} {b.text})"
    if a.dtype in INTEGERS:
        return Expr(text, a.dtype, low, high) if least <= low and high <= most else None
    if a.error == b.error == 0 and least <= low and high <= most:
        return Expr(text, a.dtype, low, high)
    error = a.error * b.magnitude + b.error * a.magnitude + a.error * b.error if operator == "*" else a.error + b.error
    error += max(abs(low), abs(high)) * epsilon(a.dtype)
    if max(abs(low), abs(high)) + error > LARGEST[a.dtype]:
        return None
    return Expr(text, a.dtype, low - error, high + error, error)


def samples(rng: random.Random, dtype: str, shape: tuple[int, ...]) -> Array:
    """Integers within SMALL, whatever the type."""
    generator = np.random.default_rng(rng.randrange(1 << 32))
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype("bool")
    low = 0 if dtype.startswith("u") else -SMALL
    return generator.integers(low, SMALL + 1, shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def load(text: str, dtype: str) -> Expr:
    """A leaf that reads an input."""
    if dtype == "bool":
        return Expr(text, dtype, 0, 1)
    if dtype == "bfloat16":
        return Expr(f'T.Cast("float32", {text})', "float32", -SMALL, SMALL)
    return Expr(text, dtype, 0 if dtype.startswith("u") else -SMALL, SMALL)


def parsed(lines: Sequence[str]) -> tvm.IRModule:
    """The module of a function `main` in TVMScript."""
    return tvm.IRModule({"main": tvm.script.from_source("\n".join(lines))})


def assert_close(got: Array, want: Array, error: float, program: Sequence[str]) -> None:
    """Equal, or within the errors of both sides."""
    difference = np.abs(got.astype("float64") - want.astype("float64")) if error else (got != want).astype("float64")
    if not (difference <= 2 * error).all():
        text = "\n".join(program)
        raise AssertionError(f"differ by {difference.max()}, not {2 * error}:\n{got}\n{want}\n{text}")


# Elementwise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_elementwise(seed: int, run: Run) -> None:
    """Several outputs, each an expression of inputs of mixed types; grids, vectors and lengths vary."""
    rng = random.Random(seed)
    types = [rng.choice(STORED) for _ in range(rng.randint(1, 4))]
    outputs = [rng.choice(INTEGERS + FLOATS) for _ in range(rng.randint(1, 3))]
    size, symbolic = rng.choice([1, 31, 64, 200]), rng.random() < 0.3
    extent = "n" if symbolic else str(size)
    arguments = [(f"a{k}", t) for k, t in enumerate(types)] + [(f"o{k}", t) for k, t in enumerate(outputs)]
    lines = ["@T.prim_func(s_tir=True)", f"def main({', '.join(f'p_{name}: T.handle' for name, _ in arguments)}):"]
    lines += ["    n = T.int32()"] if symbolic else []
    lines += [f'    {name} = T.match_buffer(p_{name}, ({extent},), "{dtype}")' for name, dtype in arguments]
    generator = Generator(rng, [load(f"a{k}[v]", dtype) for k, dtype in enumerate(types)])
    results = [generator.expr(dtype, rng.randint(1, 5)) for dtype in outputs]
    for k, result in enumerate(results):
        lines += [f"    for i in range({extent}):", f'        with T.sblock("b{k}"):']
        lines += [f"            v = T.axis.spatial({extent}, i)", f"            o{k}[v] = {result.text}"]
    mod = parsed(lines)
    schedule = tvm.s_tir.Schedule(mod)
    for k in range(len(results)):
        (loop,) = schedule.get_loops(schedule.get_sblock(f"b{k}"))
        lanes = rng.choice([1, 2, 3, 4, 8])
        block, thread, vector = schedule.split(loop, [None, rng.choice([1, 8, 32]), lanes])
        schedule.bind(block, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        schedule.vectorize(vector) if rng.random() < 0.8 else schedule.unroll(vector)
    arrays = [samples(rng, dtype, (size,)) for dtype in types] + [np.zeros(size, dtype) for dtype in outputs]
    want, got = run(mod, *arrays, target="llvm"), run(schedule.mod, *arrays)
    for k, result in enumerate(results):
        assert_close(got[len(types) + k], want[len(types) + k], result.error, lines)


# Reductions and tiles in shared memory --------------------------------------------------------------------------

_START = {"+": "T.{0}(0)", "T.max": 'T.min_value("{0}")', "T.min": 'T.max_value("{0}")'}


@pytest.mark.parametrize("seed", range(30))
def test_reductions_and_shared_tiles(seed: int, run: Run) -> None:
    """t = f(a, b) and r = a reduction of g(t, a) over its rows, both in shared memory, then out = h(t reversed, r)."""
    rng = random.Random(1000 + seed)
    rows, columns = rng.choice([1, 4, 6]), rng.choice([8, 40, 64, 100])
    types = [rng.choice(STORED) for _ in range(2)]
    kind, middle, summed = (
        rng.choice(FLOATS + INTEGERS),
        rng.choice(INTEGERS),
        rng.choice(["int32", "int64", "float32"]),
    )
    inputs = [load("a[vi, vj]", types[0]), load("b[vj]", types[1])]
    first = Generator(rng, inputs)
    tile = first.bounded(first.expr(middle, 3), SMALL)
    held = Expr("t[vi, vj]", middle, tile.low, tile.high)
    second = Generator(rng, [*inputs, held])
    term = second.bounded(second.expr("int32", 3), 99)
    term = second.cast(Expr(f'({term.text} + T.Cast("int32", {held.text}))', "int32", -200, 200), summed)
    operator = rng.choice(list(_START))
    step = f"r[vi] + {term.text}" if operator == "+" else f"{operator}(r[vi], {term.text})"
    bound = columns * term.magnitude
    reversed_tile = Expr(f"t[vi, {columns - 1} - vj]", middle, tile.low, tile.high)
    third = Generator(rng, [*inputs, held, reversed_tile, reversed_tile, Expr("r[vi]", summed, -bound, bound)])
    result = third.expr(kind, 4)
    lines = [
        "@T.prim_func(s_tir=True)",
        f'def main(a: T.Buffer(({rows}, {columns}), "{types[0]}"), b: T.Buffer(({columns},), "{types[1]}"), '
        f'out: T.Buffer(({rows}, {columns}), "{kind}")):',
        f'    t = T.sblock_alloc_buffer(({rows}, {columns}), "{middle}")',
        f'    r = T.sblock_alloc_buffer(({rows},), "{summed}")',
    ]
    for name, axes, body in (
        ("t", "SS", [f"t[vi, vj] = {tile.text}"]),
        ("r", "SR", ["with T.init():", f"    r[vi] = {_START[operator].format(summed)}", f"r[vi] = {step}"]),
        ("out", "SS", [f"out[vi, vj] = {result.text}"]),
    ):
        lines += [f"    for i, j in T.grid({rows}, {columns}):", f'        with T.sblock("{name}"):']
        lines += [f'            vi, vj = T.axis.remap("{axes}", [i, j])', *(f"            {line}" for line in body)]
    mod = parsed(lines)
    arrays = [
        samples(rng, types[0], (rows, columns)),
        samples(rng, types[1], (columns,)),
        np.zeros((rows, columns), kind),
    ]
    want = run(mod, *arrays, target="llvm")[-1]
    got = run(tiled(mod, rng), *arrays)[-1]
    assert_close(got, want, result.error, lines)


def tiled(mod: tvm.IRModule, rng: random.Random) -> tvm.IRModule:
    """A block takes one or two rows; t is in shared memory, r is reduced by all threads together or by each alone."""
    schedule = tvm.s_tir.Schedule(mod)
    threads, per_block = rng.choice([4, 8, 32]), rng.choice([1, 2])
    together = rng.random() < 0.7
    out, reduction, tile = (schedule.get_sblock(name) for name in ("out", "r", "t"))
    row, column = schedule.get_loops(out)
    block, inner = schedule.split(row, [None, per_block])
    outer, thread, vector = schedule.split(column, [None, threads, rng.choice([1, 2, 4])])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(inner, "threadIdx.y")
    schedule.bind(thread, "threadIdx.x")
    schedule.vectorize(vector)
    if rng.random() < 0.3:
        schedule.unroll(outer)
    for stage in (reduction, tile):
        schedule.compute_at(stage, block if per_block > 1 else inner, preserve_unit_loops=True)
        loops = schedule.get_loops(stage)
        if per_block > 1:
            schedule.bind(loops[-2], "threadIdx.y")
        if stage is tile or together:
            schedule.bind(schedule.split(loops[-1], [None, threads])[1], "threadIdx.x")
    schedule.set_scope(reduction, 0, "shared" if together else "local")
    schedule.set_scope(tile, 0, rng.choice(["shared", "shared.dyn"]))
    return schedule.mod


# Statements -----------------------------------------------------------------------------------------------------

THREADS, LENGTH = 32, 8
MODULUS = 100


class Statements:
    """Random statements of one thread over two local arrays (l, m) and its rows of two arrays in memory (g, h)."""

    def __init__(self, rng: random.Random, inputs: Sequence[Expr], arrays: dict[str, str]) -> None:
        self.rng = rng
        self.inputs = inputs
        self.arrays = arrays  # name -> type; all have LENGTH elements of at most MODULUS
        self.lines: list[str] = []
        self.variables: list[Expr] = []
        self.count = 0

    def place(self, name: str) -> str:
        """An element, at a position that is constant or not."""
        kind = self.rng.random()
        indices = [v.text for v in self.variables if v.dtype == "int32"]
        if kind < 0.4 or not indices:
            at = str(self.rng.randrange(LENGTH))
        elif kind < 0.8:
            at = f"({self.rng.choice(indices)} + {self.rng.randrange(LENGTH)}) % {LENGTH}"
        else:
            at = f"T.floormod(x[v, {self.rng.choice(indices)} % {LENGTH}], {LENGTH})"
        return f"{name}[v, {at}]" if name in ("g", "h") else f"{name}[{at}]"

    def generator(self) -> Generator:
        elements = [
            Expr(self.place(name), dtype, 0 if dtype.startswith("u") else -MODULUS, MODULUS)
            for name, dtype in self.arrays.items()
            for _ in range(2)
        ]
        return Generator(self.rng, [*self.inputs, *elements, *self.variables])

    def emit(self, indent: int, text: str) -> None:
        self.lines.append("    " * indent + text)

    def block(self, indent: int, depth: int, loops: int) -> None:
        held = list(self.variables)
        for _ in range(self.rng.randint(1, 4)):
            kinds = [self.assign, self.assign, self.vector, self.let]
            if depth > 0:
                kinds += [self.branch, self.loop, self.loop, self.repeat]
            self.rng.choice(kinds)(indent, depth, loops)
        if loops and self.rng.random() < 0.3:
            self.emit(indent, f"if {self.generator().condition(1)}:")
            self.emit(indent + 1, f"T.evaluate(T.{self.rng.choice(['break_loop', 'continue_loop'])}())")
        self.variables = held

    def assign(self, indent: int, _depth: int, _loops: int) -> None:
        name, dtype = self.rng.choice(list(self.arrays.items()))
        generator = self.generator()
        value = generator.expr(dtype, 2)
        if value.error:
            value = generator.leaf(dtype)
        low = 0 if dtype.startswith("u") else -MODULUS
        self.emit(indent, f"{self.place(name)} = {generator.bounded(value, MODULUS, low).text}")

    def vector(self, indent: int, _depth: int, _loops: int) -> None:
        """Four elements at once, from a cast of four others."""
        (to, dtype), (source, other) = (self.rng.choice(list(self.arrays.items())) for _ in range(2))
        # Unsigned numbers come only from unsigned ones; TVM narrows what is cast to int64x4, and then misses the type.
        if dtype == "int64" or (dtype.startswith("u") and not other.startswith("u")):
            source, other = to, dtype

        def four(name: str) -> str:
            ramp = f"T.Ramp({self.rng.choice([0, 1, 2, 4])}, 1, 4)"
            return f"{name}[v, {ramp}]" if name in ("g", "h") else f"{name}[{ramp}]"

        value = four(source) if dtype == other else f'T.Cast("{dtype}x4", {four(source)})'
        self.emit(indent, f"{four(to)} = {value}")

    def let(self, indent: int, _depth: int, _loops: int) -> None:
        self.count += 1
        value = self.generator().bounded(self.generator().expr("int32", 2), MODULUS, 0)
        self.emit(indent, f"w{self.count}: T.let = {value.text}")
        self.variables.append(Expr(f"w{self.count}", "int32", 0, MODULUS))

    def branch(self, indent: int, depth: int, loops: int) -> None:
        self.emit(indent, f"if {self.generator().condition(2)}:")
        self.block(indent + 1, depth - 1, loops)
        if self.rng.random() < 0.6:
            self.emit(indent, "else:")
            self.block(indent + 1, depth - 1, loops)

    def loop(self, indent: int, depth: int, loops: int) -> None:
        self.count += 1
        name = f"k{self.count}"
        kind = self.rng.random()
        extent = str(self.rng.randint(1, 5)) if kind < 0.7 else f"T.floormod(x[v, {self.rng.randrange(LENGTH)}], 4)"
        unrolled = kind < 0.2
        self.emit(indent, f"for {name} in {'T.unroll' if unrolled else 'range'}({extent}):")
        self.variables.append(Expr(name, "int32", 0, 4))
        # TVM would unroll such a loop before the code generator could leave it.
        self.block(indent + 1, depth - 1, 0 if unrolled else loops + 1)
        self.variables.pop()

    def repeat(self, indent: int, depth: int, loops: int) -> None:
        """A while loop over a counter of its own."""
        self.count += 1
        counter = f"c[{self.count % LENGTH}]"
        self.emit(indent, f"{counter} = 0")
        self.emit(indent, f"while {counter} < T.floormod(x[v, {self.rng.randrange(LENGTH)}], 4):")
        self.emit(indent + 1, f"{counter} = {counter} + 1")
        self.block(indent + 1, depth - 1, loops + 1)


@pytest.mark.parametrize("seed", range(40))
def test_statements(seed: int, run: Run) -> None:
    """Nested loops, branches, breaks, bindings, scalar and vector stores."""
    rng = random.Random(2000 + seed)
    arrays = {name: rng.choice(INTEGERS + FLOATS) for name in "ghlm"}
    inputs = [load(f"x[v, {rng.randrange(LENGTH)}]", "int32"), load(f"y[v, {rng.randrange(LENGTH)}]", "float32")]
    statements = Statements(rng, inputs, arrays)
    for _ in range(2):
        statements.block(3, 2, 0)

    def program(loop: str) -> list[str]:
        shape, whole = f"({THREADS}, {LENGTH})", f"[0:{THREADS}, 0:{LENGTH}]"
        handles = [("x", "int32"), ("y", "float32"), *(({"l": "o", "m": "p"}.get(n, n), t) for n, t in arrays.items())]
        parameters = ", ".join(f'{name}: T.Buffer({shape}, "{dtype}")' for name, dtype in handles)
        lines = ["@T.prim_func(s_tir=True)", f"def main({parameters}):", f"    for i in {loop}:"]
        lines += ['        with T.sblock("all"):', f"            v = T.axis.spatial({THREADS}, i)"]
        lines += [f"            T.reads({', '.join(name + whole for name, _ in handles)})"]
        lines += [f"            T.writes({', '.join(name + whole for name, _ in handles[2:])})"]
        for name in "lmc":
            dtype = arrays.get(name, "int32")
            lines += [f'            {name} = T.sblock_alloc_buffer(({LENGTH},), "{dtype}", scope="local")']
        copy = f"            for k in range({LENGTH}):"
        lines += [copy, "                l[k] = o[v, k]", "                m[k] = p[v, k]", *statements.lines]
        return [*lines, copy, "                o[v, k] = l[k]", "                p[v, k] = m[k]"]

    shape = (THREADS, LENGTH)
    values = [samples(rng, dtype, shape) for dtype in ("int32", "float32", *arrays.values())]
    on_device = program(f'T.thread_binding({THREADS}, "threadIdx.x")')
    want = run(parsed(program(f"range({THREADS})")), *values, target="llvm")
    for got, expected in zip(run(parsed(on_device), *values), want, strict=True):
        assert_close(got, expected, 0, on_device)
