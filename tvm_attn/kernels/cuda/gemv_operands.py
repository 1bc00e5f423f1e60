"""The operands of `tvm_attn.kernels.cuda.gemv`: x in shared memory, quantized weights in registers.

32 inputs of a row of x take 64 bytes of shared memory, 16 for each pair of columns of the operand; a lane reads its
pair's 16 bytes at once, the right operands of two products. They hold the inputs that meet the weights which `ldmatrix`
gives this lane: of plain weights inputs 2 pair and 2 pair + 1 of each 8; of quantized ones, in whose words
`tvm_attn.kernels.weights` puts inputs that lie 8 apart, p, p + 16, p + 8 and p + 24 for p = pair and p = pair + 4.

The functions emit statements of the TIRx function that is being built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.cuda.lanes import add_lanes, only_if, registers, sum_of
from tvm_attn.kernels.cuda.ptx import load_global, load_shared, mma, pack, permute_bytes, store_shared, uint32
from tvm_attn.storage import GROUP

GROUP_BYTES = 2 * GROUP
"""Of a group of 32 inputs of a row of x, and of the constants of a group of quantized weights."""


@dataclass(frozen=True)
class Product:
    """One `mma.sync` of quantized weights: which it takes of a word, and how they become numbers.

    Attributes:
        shifts: what brings the weights of registers 0 and 2 of the operand to the low bits of 16-bit lanes.
        exponent: bits that are set beside them.
        right: the first of the registers of x that they meet.
    """

    shifts: tuple[int, int]
    exponent: int
    right: int


@dataclass(frozen=True)
class Format:
    """How weights of one format become operands of one dtype.

    Attributes:
        per_unit: weights of 16 bytes.
        words: registers of a group of 32 inputs of an output that a lane holds, each with its products.
        mask: the bits of the weights in their lanes.
        constant: what is added to each weight, in the unit of the operand.
        unit: what a weight of 1 is in the operand.
    """

    per_unit: int
    words: tuple[tuple[Product, ...], ...]
    mask: int
    constant: int
    unit: float


def weight_format(weights: str, dtype: str) -> Format:
    """The format of weights that are multiplied with x of a dtype.

    In float16, bits u of a lane are the denormal u * 2**-24. In bfloat16, whose smallest numbers are too small to add
    in float32, they become 128 + u, or 2048 + 16 u, where u has 4 bits; a byte is two of those, in two products.
    """
    if weights == dtype:
        return Format(8, ((), (), (), ()), 0, 0, 1.0)
    if weights == "int4":
        exponent, constant, unit = (0, 8, 2.0**-24) if dtype == "float16" else (0x43004300, 136, 1.0)
        return Format(32, ((Product((0, 8), exponent, 0), Product((4, 12), exponent, 2)),), 0x000F000F, constant, unit)
    if dtype == "float16":
        return Format(16, ((Product((0, 8), 0, 0),), (Product((0, 8), 0, 2),)), 0x00FF00FF, 128, 2.0**-24)
    low, high = (0, 8), (4, 12)
    words = tuple((Product(low, 0x43004300, right), Product(high, 0x45004500, right)) for right in (0, 2))
    return Format(16, words, 0x000F000F, 128 + 128 + 2048, 1.0)


def multiply_group(total: tirx.Buffer, words: Sequence[Sequence[tirx.Expr]], right: tirx.Buffer, dtype: str) -> None:
    """total += the products of 32 inputs; `words` are of 8 each, of outputs `group` and, if any, `group` + 8."""
    for i in (0, 2):
        left = [word for pair in words[i : i + 2] for word in (*pair, T.uint32(0))[:2]]
        mma(registers(total), left, (right[i], right[i + 1]), dtype)


def multiply_quantized_group(
    partial: tirx.Buffer,
    words: Sequence[Sequence[tirx.Expr]],
    left: tirx.Buffer,
    right: tirx.Buffer,
    form: Format,
    dtype: str,
) -> None:
    """partial += the products of 32 inputs, without their scales; `words` of outputs `group` and, if any, + 8."""
    for outputs, products in zip(words, form.words, strict=True):
        for product in products:
            for half in range(2):
                for place, shift in enumerate(product.shifts):
                    bits = T.uint32(0)
                    if half < len(outputs):
                        shifted = outputs[half] >> T.uint32(shift) if shift else outputs[half]
                        bits = shifted & T.uint32(form.mask) | T.uint32(product.exponent)
                    T.buffer_store(left, bits, [2 * place + half])
            mma(registers(partial), registers(left), (right[product.right], right[product.right + 1]), dtype)


@dataclass(frozen=True)
class Rows:
    """Rows of x in shared memory: where, how many threads put them there, and in which order.

    Attributes:
        base: address in shared memory, uint32.
        pitch: bytes of a row.
        rows: how many.
        features: K.
        groups: groups of 32 inputs of a row that are there at a time; zeros past K.
        dtype: of x.
        quantized: whether the weights are.
        threads: of the block.
    """

    base: tirx.Expr
    pitch: int
    rows: int
    features: int
    groups: int
    dtype: str
    quantized: bool
    threads: int

    def load(self, x: tirx.Buffer, thread: tirx.Expr, first_group: tirx.Expr | int) -> None:
        """Puts x (1, R, K) of `dtype` there, from a group on; a thread takes inputs i .. i + 3 and i + 16 .. i + 19."""
        total, batch = self.rows * self.groups * 4, 4
        count = -(-total // self.threads)
        raw = T.alloc_local((4 * min(batch, count),), "uint32")
        for start in range(0, count, batch):
            # All loads of a batch are on their way before the first is used.
            some = range(start, min(start + batch, count))
            for load in (True, False):
                for i in some:
                    index = T.Bind(i * self.threads + thread)
                    row, group, member = index // (4 * self.groups), index // 4 % self.groups, index % 4
                    data = registers(raw, 4 * (i - start))
                    with only_if(index < total, total % self.threads != 0):
                        if load:
                            self._load_item(x, row, (first_group + group) * GROUP + member * 4, raw, 4 * (i - start))
                        else:
                            self._store(row, group, member, self._pairs(data))

    def _load_item(self, x: tirx.Buffer, row: tirx.Expr, first: tirx.Expr, raw: tirx.Buffer, place: int) -> None:
        for half in range(2):
            for i in range(2):
                T.buffer_store(raw, T.uint32(0), [place + 2 * half + i])
            with T.If(first + 16 * half < self.features), T.Then():
                load_global(registers(raw, place + 2 * half, 2), x.ptr_to([0, row, first + 16 * half]))

    def _pairs(self, data: list[tirx.Expr]) -> list[tirx.Expr]:
        """Words of two inputs, in the order of `_store`, from i, i + 1; i + 2, i + 3; i + 16, ...; i + 18, ..."""
        if not self.quantized:
            return data
        pairs = T.alloc_local((4,), "uint32")
        for i in range(4):
            permute_bytes(pairs[i], data[i // 2], data[2 + i // 2], 0x7632 if i % 2 else 0x5410)
        return registers(pairs)

    def _store(self, row: tirx.Expr, group: tirx.Expr, member: tirx.Expr, pairs: list[tirx.Expr]) -> None:
        """Four words of inputs 4 member .. + 3 and 16 more of a group; pairs are neighbours, or 16 apart."""
        for i, word in enumerate(pairs):
            if self.quantized:
                place = 4 * i + 2 * (member % 2) + member // 2
            else:
                place = 4 * (2 * (member % 2) + i % 2) + member // 2 + 2 * (i // 2)
            address = self.base + uint32(row * self.pitch + group * GROUP_BYTES + 4 * place)
            store_shared(address, [word])

    def normalize(
        self,
        x: tirx.Buffer,
        norm: tirx.Buffer,
        epsilon: float,
        warp: tirx.Expr,
        lane: tirx.Expr,
        ready: Callable[[], None],
    ) -> None:
        """Puts LayerNorm of x (1, R, K) float32, rounded to `dtype`, there.

        A row is one warp's, which has it in registers, so that the squares are of distances from the mean. Where there
        are more warps than rows, several do the same and store shares of the row.

        Args:
            x: the rows in global memory.
            norm: gamma and beta in shared memory.
            epsilon: what is added to the variance.
            warp: of the block.
            lane: of the warp.
            ready: emits what must happen before gamma and beta are read; called once, while x is on its way.
        """
        warps, count = self.threads // 32, -(-self.groups * 4 // 32)
        share = max(1, warps // self.rows)
        teams = warps // share
        numbers = T.alloc_local((8 * count,), "float32")
        moments = T.alloc_local((2,), "float32")
        words = T.alloc_local((4,), "uint32")
        member = lane % 4
        # A lane's numbers are runs of four; whether a run lies in the row, where that is not known.
        firsts = [i // 2 * 256 + lane // 4 * GROUP + member * 4 + i % 2 * 16 for i in range(2 * count)]
        inside = {
            i: T.Bind(first < self.features) for i, first in enumerate(firsts) if (i // 2 + 1) * 256 > self.features
        }

        def kept(i: int, number: tirx.Expr) -> tirx.Expr:
            """Number i of a lane, or zero past the row."""
            return T.Select(inside[i // 4], number, T.float32(0.0)) if i // 4 in inside else number

        for first_row in range(0, self.rows, teams):
            team_row = T.Bind(first_row + warp // share)
            # Warps past the last row compute it again, and store nothing.
            row = T.Bind(T.min(team_row, self.rows - 1))
            for i, first in enumerate(firsts):
                # What lies past the row is its end again.
                at = T.min(first, self.features - 4) if i in inside else first
                load_global(registers(numbers, 4 * i), x.ptr_to([0, row, at]))
            for i in range(8 * count):
                T.buffer_store(numbers, kept(i, numbers[i]), [i])
            T.buffer_store(moments, sum_of([numbers[i] for i in range(8 * count)]), [0])
            add_lanes(moments, 0)
            T.buffer_store(moments, moments[0] * T.float32(1.0 / self.features), [0])
            for i in range(8 * count):
                T.buffer_store(numbers, kept(i, numbers[i] - moments[0]), [i])
            T.buffer_store(moments, sum_of([numbers[i] * numbers[i] for i in range(8 * count)]), [1])
            add_lanes(moments, 1)
            variance = moments[1] * T.float32(1.0 / self.features)
            T.buffer_store(moments, T.float32(1.0) / T.sqrt(variance + T.float32(epsilon)), [1])
            if first_row == 0:
                ready()
            for i in range(count):
                group = i * 8 + lane // 4
                mine = tirx.all(team_row < self.rows, group < self.groups, i % share == warp % share)
                with T.If(mine), T.Then():
                    for j in range(8 * i, 8 * i + 8):
                        feature = firsts[j // 4] + j % 4
                        at = T.min(feature, self.features - 1) if j // 4 in inside else feature
                        normal = numbers[j] * moments[1] * norm[at] + norm[self.features + at]
                        T.buffer_store(numbers, kept(j, normal), [j])
                    for j in range(4):
                        low, high = (j, 4 + j) if self.quantized else (2 * j, 2 * j + 1)
                        pack(words[j], numbers[8 * i + low], numbers[8 * i + high], self.dtype)
                    self._store(row, group, member, registers(words))

    def constants(self, constants: tirx.Buffer, form: Format, thread: tirx.Expr) -> None:
        """What the sums of quantized products start with: for each group, 16 bytes for each pair of columns, twice."""
        total = self.rows * self.groups * 4
        data = T.alloc_local((4,), "uint32")
        value = T.alloc_local((1,), "float32")
        for i in range(-(-total // self.threads)):
            index = T.Bind(i * self.threads + thread)
            # Lanes past the end do what others do, since all take part in the sum.
            item = T.Bind(T.Select(index < total, index, index % 4))
            group, row, quarter = item // (4 * self.rows), item // 4 % self.rows, item % 4
            load_shared(registers(data), self.base + uint32(row * self.pitch + group * GROUP_BYTES + quarter * 16))
            numbers = [number for word in registers(data) for number in _numbers(word, self.dtype)]
            T.buffer_store(value, sum_of(numbers), [0])
            add_lanes(value, 0, 4)
            with T.If(tirx.all(index < total, quarter == 0)), T.Then():
                for copy in range(2):
                    place = group * 16 + row // 2 * 4 + row % 2 + 2 * copy
                    T.buffer_store(constants, value[0] * T.float32(-form.constant * form.unit), [place])


def _numbers(word: tirx.Expr, dtype: str) -> list[tirx.Expr]:
    """The two numbers of a word, float32."""
    if dtype == "bfloat16":
        return [T.reinterpret("float32", bits) for bits in (word << T.uint32(16), word & T.uint32(0xFFFF0000))]
    halves = (word & T.uint32(0xFFFF), word >> T.uint32(16))
    return [T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", half))) for half in halves]
