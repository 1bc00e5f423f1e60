"""Each emulated instruction against its definition in the PTX ISA documentation, in NumPy and in exact arithmetic.

All run in one launch, each in a block of one warp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.cuda.emulation import run
from tests.cuda.emulation.raw import asm, kernel

LANES = 32
FLOATS = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Job:
    """Statements for a block of one warp, which reads `x` and writes `size` words to `y`."""

    body: str
    x: np.ndarray
    size: int


JOBS: dict[str, Job] = {}


@functools.cache
def results() -> dict[str, np.ndarray]:
    """What each job has written, uint32."""
    jobs = list(JOBS.values())
    words = [np.ascontiguousarray(job.x).reshape(-1).view(np.uint32) for job in jobs]
    x_starts = np.cumsum([0, *map(len, words)]).tolist()
    y_starts = np.cumsum([0, *(job.size for job in jobs)]).tolist()
    blocks = [
        f"case {i}: {{ x += {x_starts[i]}; y += {y_starts[i]};\n{job.body}\n}} break;" for i, job in enumerate(jobs)
    ]
    function = kernel(
        "switch (blockIdx.x) {\n" + "\n".join(blocks) + "\n}", x_starts[-1], y_starts[-1], LANES, len(jobs)
    )
    y = np.zeros(y_starts[-1], np.uint32)
    run(function, [np.concatenate(words), y])
    return dict(zip(JOBS, np.split(y, y_starts[1:-1]), strict=True))


def bits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, dtype=np.uint32)


# Integers.


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    choice = np.stack([a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)])
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = np.take_along_axis(choice, (nibble & 7)[None], axis=0)[0]
        result |= np.where(nibble & 8, (byte >> 7) * np.uint32(255), byte) << np.uint32(8 * i)
    return result


def logic(table: int) -> Callable[..., np.ndarray]:
    """lop3: the table is the result of the wanted function for 0xF0, 0xCC and 0xAA."""

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        rows = [row for row in range(8) if table >> row & 1]
        terms = [(a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c) for row in rows]
        return functools.reduce(np.bitwise_or, terms)

    return function


def shift_right(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return ((b.astype(np.uint64) << 32 | a) >> (c & 31)).astype(np.uint32)


def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    position, length = (np.minimum(v & 255, 32).astype(np.uint64) for v in (position, length))
    return (a.astype(np.uint64) >> position & (np.uint64(1) << length) - np.uint64(1)).astype(np.uint32)


def extract_signed(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The field's last bit, or bit 31 if the field extends beyond it, is repeated."""
    result = []
    for value, start, bits in zip(a.tolist(), (position & 255).tolist(), (length & 255).tolist(), strict=True):
        number = value - (1 << 32 if value >> 31 else 0) >> min(start, 31)
        keep = min(bits, 32 - start) if start < 32 else 1
        number = 0 if bits == 0 else (number & (1 << keep) - 1) - (number >> keep - 1 & 1) * (1 << keep)
        result.append(number & 0xFFFFFFFF)
    return np.array(result, np.uint32)


def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    x, y = (np.ascontiguousarray(v).view(np.int8).reshape(-1, 4).astype(np.int64) for v in (a, b))
    return (c + (x * y).sum(axis=1)).astype(np.uint32)


INTEGERS: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "prmt": ("prmt.b32 %0, %1, %2, %3", permute),
    "lop3 xor": ("lop3.b32 %0, %1, %2, %3, 0x96", logic(0x96)),
    "lop3 and or": ("lop3.b32 %0, %1, %2, %3, 0xEA", logic(0xEA)),
    "lop3 asymmetric": ("lop3.b32 %0, %1, %2, %3, 0x2C", logic(0x2C)),
    "shf": ("shf.r.wrap.b32 %0, %1, %2, %3", shift_right),
    "bfe unsigned": ("bfe.u32 %0, %1, %2, %3", extract),
    "bfe signed": ("bfe.s32 %0, %1, %2, %3", extract_signed),
    "dp4a": ("dp4a.s32.s32 %0, %1, %2, %3", dot),
    "predicates": (
        "{ .reg .pred p; setp.ne.b32 p, %3, 0; mov.b32 %0, %1; @!p mov.b32 %0, %2; }",
        lambda a, b, c: np.where(c != 0, a, b),
    ),
}
OPERANDS = bits(0, 256, 3)
OPERANDS[::4, 1:] &= 31
OPERANDS[::5, 2] = 0
for name, (text, _) in INTEGERS.items():
    statement = asm(text, ["r(y[i])"], ["r(x[3 * i])", "r(x[3 * i + 1])", "r(x[3 * i + 2])"])
    JOBS[name] = Job(f"for (int i = thread; i < 256; i += 32) {statement}", OPERANDS, 256)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    np.testing.assert_array_equal(results()[name], INTEGERS[name][1](*OPERANDS.T))


# Floats.


def shorts(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(n,) uint32 to (n, 2) numbers, the low half first."""
    return np.ascontiguousarray(words).view(dtype).reshape(-1, 2)


def some_pairs(dtype: np.dtype) -> np.ndarray:
    """a, b and c, (n, 3, 2). For a third of them, a * b + c is the rounding error of a * b."""
    rng = np.random.default_rng(1)
    numbers = (rng.standard_normal((LANES, 3, 2)) * 2.0 ** rng.integers(-13, 7, (LANES, 3, 2))).astype(dtype)
    numbers[::3, 2] = -(numbers[::3, 0] * numbers[::3, 1])
    return numbers


PAIRS: dict[str, tuple[int, Callable[..., Fraction]]] = {
    "fma.rn": (3, lambda a, b, c: a * b + c),
    "mul.rn": (2, lambda a, b, c: a * b),
    "add.rn": (2, lambda a, b, c: a + b),
}
for short, dtype in FLOATS.items():
    for name, (count, _) in PAIRS.items():
        text = f"{name}.{short}x2 %0, {', '.join(f'%{i + 1}' for i in range(count))}"
        statement = asm(text, ["r(y[thread])"], [f"r(x[3 * thread + {i}])" for i in range(count)])
        JOBS[f"{name} {short}"] = Job(statement, some_pairs(dtype), LANES)


def nearest(value: Fraction, dtype: np.dtype) -> Fraction:
    """Rounds to nearest, ties to even: the nearest of the neighbouring numbers; of two, the one with an even code."""
    code = int(np.array(abs(float(value))).astype(dtype).view(np.uint16))
    codes = [code + step for step in (-1, 0, 1) if code + step >= 0]
    sign = -1 if value < 0 else 1
    numbers = {code: sign * Fraction(float(np.uint16(code).view(dtype))) for code in codes}
    return numbers[min(codes, key=lambda code: (abs(numbers[code] - value), code & 1))]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("short", FLOATS)
def test_pairs(short: str, name: str) -> None:
    dtype = FLOATS[short]
    got = shorts(results()[f"{name} {short}"], dtype)
    for lane, numbers in enumerate(some_pairs(dtype)):
        for i in range(2):
            exact = PAIRS[name][1](*(Fraction(float(number)) for number in numbers[:, i]))
            assert Fraction(float(got[lane, i])) == nearest(exact, dtype)


EDGES = [0, -0.0, np.inf, -np.inf, 65504, 65519.996, 65520, 1e-8, 2.0**-25, 2.0**-24, 3.39e38, 2.0**-14 - 2.0**-25]
TIES = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-14 + 2.0**-25, 1.5 * 2.0**-24]
TO_ROUND = bits(2, 2048, 2)
TO_ROUND[: len(EDGES), 0] = np.array(EDGES, np.float32).view(np.uint32)
TO_ROUND[-len(TIES) :, 1] = np.array(TIES, np.float32).view(np.uint32)
for short in FLOATS:
    operands = ["f(__uint_as_float(x[2 * i]))", "f(__uint_as_float(x[2 * i + 1]))"]
    statement = asm(f"cvt.rn.{short}x2.f32 %0, %1, %2", ["r(y[i])"], operands)
    JOBS[f"cvt {short}"] = Job(f"for (int i = thread; i < 2048; i += 32) {statement}", TO_ROUND, 2048)


@pytest.mark.parametrize("short", FLOATS)
def test_conversions(short: str) -> None:
    """The first source of cvt becomes the upper half."""
    got = shorts(results()[f"cvt {short}"], FLOATS[short])[:, ::-1]
    numbers = TO_ROUND.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = numbers.astype(FLOATS[short])
    is_nan = np.isnan(numbers)
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(got[~is_nan].view(np.uint16), expected[~is_nan].view(np.uint16))


SCALARS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.approx.ftz.f32": np.reciprocal,
    "rsqrt.approx.f32": lambda x: x**-0.5,
    "sqrt.approx.f32": np.sqrt,
    "tanh.approx.f32": np.tanh,
}
ARGUMENTS = np.concatenate([np.linspace(1e-3, 80, 28), [1e-30, 1e-20, 1e20, 1e30]]).astype(np.float32)
for name in SCALARS:
    statement = asm(f"{name} %0, %1", ["f(d)"], ["f(__uint_as_float(x[thread]))"])
    JOBS[name] = Job(f"float d; {statement} y[thread] = __float_as_uint(d);", ARGUMENTS, LANES)


@pytest.mark.parametrize("name", SCALARS)
def test_special_functions(name: str) -> None:
    with np.errstate(over="ignore"):
        expected = SCALARS[name](ARGUMENTS.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(results()[name].view(np.float32), expected, rtol=2e-7)


# Matrices.


def some_matrices(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 8, 8) 16-bit numbers and the positions of their rows in shared memory."""
    rng = np.random.default_rng(count)
    return rng.integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16), rng.permutation(8 * count)


for count in (1, 2, 4):
    for trans in ("", ".trans"):
        registers = ", ".join(f"%{i}" for i in range(count))
        text = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%{count}]"
        matrices, places = some_matrices(count)
        rows = np.empty((8 * count, 8), np.uint16)
        rows[places] = matrices.reshape(-1, 8)
        JOBS[f"ldmatrix x{count}{trans}"] = Job(
            f"""
            __shared__ __align__(16) unsigned memory[{32 * count}];
            for (int i = thread; i < {32 * count}; i += 32) memory[i] = x[i];
            __syncwarp();
            unsigned row = 1;  // of lanes that name none
            if (thread < {8 * count}) row = __cvta_generic_to_shared(memory + 4 * x[{32 * count} + thread]);
            {asm(text, [f"r(y[{count} * thread + {i}])" for i in range(count)], ["r(row)"])}
            """,
            np.concatenate([rows.reshape(-1).view(np.uint32), places.astype(np.uint32)]),
            LANES * count,
        )


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, trans: str) -> None:
    """Lane 8 i + r gives the address of row r of matrix i; lane t gets row (or column) t / 4, from number 2 (t % 4)."""
    matrices, _ = some_matrices(count)
    seen = matrices.transpose(0, 2, 1) if trans else matrices
    got = results()[f"ldmatrix x{count}{trans}"].view(np.uint16).reshape(8, 4, count, 2)
    np.testing.assert_array_equal(got, seen.reshape(count, 8, 4, 2).transpose(1, 2, 0, 3))


@dataclass(frozen=True)
class Product:
    """D = A B + C in the layout of the lanes: "Matrix Fragments for mma.m16n8k8", k16 and, for int8, k32."""

    depth: int
    types: str

    @property
    def total(self) -> np.dtype:
        return np.dtype(np.int32 if self.types == "s8.s8" else np.float32)

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.depth)
        shapes = ((16, self.depth), (self.depth, 8), (16, 8))
        if self.types == "s8.s8":
            a, b, c = (rng.integers(-128, 128, shape) for shape in shapes)
            return a.astype(np.int8), b.astype(np.int8), c.astype(np.int32)
        a, b, c = (rng.standard_normal(shape) for shape in shapes)
        dtype = FLOATS[self.types.split(".")[0]]
        return a.astype(dtype), b.astype(dtype), c.astype(np.float32)

    def job(self) -> Job:
        a, b, c = self.operands()
        per_register = 4 // a.itemsize
        lanes = np.arange(LANES)[:, None]
        group, member = lanes // 4, lanes % 4 * per_register
        i = np.arange(16 * self.depth // LANES)[None]
        block, inside = i // per_register, i % per_register
        a_numbers = a[group + 8 * (block % 2), member + inside + 4 * per_register * (block // 2)]
        i = np.arange(8 * self.depth // LANES)[None]
        b_numbers = b[member + i % per_register + 4 * per_register * (i // per_register), group]
        words = [np.ascontiguousarray(v).view(np.uint32) for v in (a_numbers, b_numbers, fragment_c(c))]
        counts = [4, *(v.shape[1] for v in words)]
        starts = np.cumsum([0, *counts])
        groups = ["{" + ", ".join(f"%{s + j}" for j in range(n)) + "}" for s, n in zip(starts, counts, strict=False)]
        letter, kind = ("r", "int") if self.total == np.int32 else ("f", "float")
        result = "s32" if self.total == np.int32 else "f32"
        text = f"mma.sync.aligned.m16n8k{self.depth}.row.col.{result}.{self.types}.{result} {', '.join(groups)}"
        width, inputs = sum(counts[1:]), sum(counts[1:3])
        operands = [f"r(x[{width} * thread + {j}])" for j in range(inputs)] + [f"{letter}(c[{j}])" for j in range(4)]
        body = f"""
            {kind} c[4], d[4];
            memcpy(c, x + {width} * thread + {inputs}, sizeof c);
            {asm(text, [f"{letter}(d[{j}])" for j in range(4)], operands)}
            memcpy(y + 4 * thread, d, sizeof d);
        """
        return Job(body, np.concatenate(words, axis=1), 4 * LANES)


def fragment_c(c: np.ndarray) -> np.ndarray:
    """(16, 8) in the layout of the lanes, (32, 4)."""
    lanes, i = np.arange(LANES)[:, None], np.arange(4)[None]
    return c[lanes // 4 + 8 * (i // 2), lanes % 4 * 2 + i % 2]


PRODUCTS = [Product(k, types) for types in ("f16.f16", "bf16.bf16") for k in (8, 16)] + [Product(32, "s8.s8")]
JOBS |= {str(product): product.job() for product in PRODUCTS}


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_mma(product: Product) -> None:
    a, b, c = (v.astype(np.float64) for v in product.operands())
    got = results()[str(product)].view(product.total).reshape(LANES, 4)
    np.testing.assert_allclose(got, fragment_c(a @ b + c), rtol=6e-8)  # the sum is rounded once


# Asynchronous copies.

COPIED = bits(6, LANES, 4)


def copy(cache: str, size: int, valid: int | None, wait: str) -> Job:
    """Each lane copies 16 bytes or fewer to its place, then stores what is there."""
    operands = ["r(place)", "l(x + 4 * thread)"] + ([] if valid is None else [f"r({valid})"])
    text = f"cp.async.{cache}.shared.global [%0], [%1], {size}{'' if valid is None else ', %2'}"
    body = f"""
        __shared__ __align__(16) unsigned memory[128];
        unsigned place = __cvta_generic_to_shared(memory + 4 * thread);
        {asm(text, [], operands)}
        asm volatile("cp.async.commit_group;");
        {f'asm volatile("{wait};");' if wait else ""}
        for (int i = 0; i < 4; ++i) y[4 * thread + i] = memory[4 * thread + i];
    """
    return Job(body, COPIED, 4 * LANES)


WAIT = "cp.async.wait_group 0"
COPIES: dict[str, tuple[Job, int, int]] = {  # with the bytes that are copied and those that become zero
    "4 bytes": (copy("ca", 4, None, WAIT), 4, 0),
    "8 bytes": (copy("ca", 8, None, WAIT), 8, 0),
    "16 bytes": (copy("cg", 16, None, "cp.async.wait_all"), 16, 0),
    "none of 16": (copy("cg", 16, 0, WAIT), 0, 16),
    "5 of 8": (copy("ca", 8, 5, WAIT), 5, 3),
    "no wait": (copy("cg", 16, None, ""), 0, 0),
    "one group may be on its way": (copy("cg", 16, None, "cp.async.wait_group 1"), 0, 0),
}
JOBS |= {name: job for name, (job, _, _) in COPIES.items()}


@pytest.mark.parametrize("name", COPIES)
def test_cp_async(name: str) -> None:
    """Bytes that were not copied are poison, and so are copies that were not waited for."""
    _, copied, zeros = COPIES[name]
    expected = np.full((LANES, 16), 0xFF, np.uint8)
    expected[:, :copied] = COPIED.view(np.uint8)[:, :copied]
    expected[:, copied : copied + zeros] = 0
    np.testing.assert_array_equal(results()[name].view(np.uint8).reshape(LANES, 16), expected)


# Warps.

LANE = np.arange(LANES)
VALUES = bits(7, LANES)
SHUFFLES: dict[str, tuple[str, np.ndarray]] = {
    "idx": ("__shfl_sync(~0u, x[thread], (thread * 5 + 3) % 32)", VALUES[(LANE * 5 + 3) % 32]),
    "idx of 8": ("__shfl_sync(~0u, x[thread], 11, 8)", VALUES[LANE // 8 * 8 + 3]),
    "up": ("__shfl_up_sync(~0u, x[thread], 5)", np.where(LANE < 5, VALUES, np.roll(VALUES, 5))),
    "down of 16": ("__shfl_down_sync(~0u, x[thread], 3, 16)", VALUES[np.where(LANE % 16 < 13, LANE + 3, LANE) % 32]),
    "xor": ("__shfl_xor_sync(~0u, x[thread], 9)", VALUES[LANE ^ 9]),
    "ballot": ("__ballot_sync(~0u, thread % 3 == 0)", np.full(LANES, sum(1 << i for i in range(0, 32, 3)))),
    "any": ("__any_sync(~0u, thread == 7) + 2 * __all_sync(~0u, thread < 31)", np.full(LANES, 1)),
    "reduce": ("__reduce_add_sync(~0u, thread)", np.full(LANES, 496)),
    "half a warp": (
        "thread < 16 ? __shfl_xor_sync(0xFFFFu, x[thread], 1) : __reduce_max_sync(0xFFFF0000u, thread)",
        np.where(LANE < 16, VALUES[LANE ^ 1], 31),
    ),
    "special registers": ("0; " + asm("mov.u32 %0, %%laneid", ["r(y[thread])"], []), LANE),
}
JOBS |= {name: Job(f"y[thread] = {text};", VALUES, LANES) for name, (text, _) in SHUFFLES.items()}


@pytest.mark.parametrize("name", SHUFFLES)
def test_warps(name: str) -> None:
    np.testing.assert_array_equal(results()[name], SHUFFLES[name][1])


ATOMICS: dict[str, tuple[str, int]] = {  # on a word that is zero, by each lane
    "add": ("atomicAdd(y, thread + 1)", 528),
    "max": ("atomicMax(y, thread * 7 % 32)", 31),
    "inc": ("atomicInc(y, 9)", 2),  # 0 to 9, then 0 again
    "dec": ("atomicDec(y, 40)", 9),  # 40 to 9
    "or": ("atomicOr(y, 1u << thread)", 0xFFFFFFFF),
    "cas": ("for (unsigned old = *y, seen; (seen = atomicCAS(y, old, old + thread)) != old; old = seen) {}", 496),
}
JOBS |= {name: Job(f"{text};", VALUES, 1) for name, (text, _) in ATOMICS.items()}


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name: str) -> None:
    assert results()[name] == ATOMICS[name][1]
