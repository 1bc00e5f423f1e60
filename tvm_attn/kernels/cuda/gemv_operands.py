"""The operands of `tvm_attn.kernels.cuda.gemv`: x in shared memory, quantized weights in registers.

32 inputs of a row of x take 64 bytes of shared memory, 16 for each `pair` of a lane (lane % 4). A lane reads its pair's
16 bytes at once, the right operands of two products. They are the inputs for the weights that `ldmatrix` gives the
lane: for plain weights, inputs 2 pair and 2 pair + 1 of each 8; for quantized weights, whose words hold inputs that are
8 apart (`tvm_attn.kernels.weights`), inputs p, p + 16, p + 8 and p + 24 for p = pair and p = pair + 4.

Quantized weights are float16 operands, for either dtype of x: the bits u of a weight, in 16 bits of their own, are the
denormal u * 2**-24, which `mma.sync` multiplies exactly. So every weight needs a mask, and every second one a shift.
Nibbles that are masked without a shift count 16-fold, and their x is stored divided by 16. bfloat16 x becomes float16
through a power of two per group of 32 that scales the largest to near 2**14; the rounding error is 2**-38 of the
largest.

The functions emit statements of the TIRx function that is being built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.cuda.lanes import add_lanes, only_if, registers, shuffle_xor, sum_of
from tvm_attn.kernels.cuda.ptx import load_global, load_shared, mma, pack, shared_address, store_shared, uint32
from tvm_attn.kernels.weights import OFFSETS
from tvm_attn.storage import GROUP

GROUP_BYTES = 2 * GROUP
"""Bytes of 32 inputs of a row of x, and of the constants of a group of quantized weights."""


QUANTIZED_UNIT = 2.0**-24
"""The value of a quantized weight of 1 as an operand."""


@dataclass(frozen=True)
class Product:
    """One `mma.sync` of quantized weights: the bits of a word that it takes, and the first register of their x."""

    mask: int
    right: int


@dataclass(frozen=True)
class Format:
    """How weights become operands.

    Attributes:
        per_unit: weights per 16 bytes.
        words: the registers with which a lane holds a group of 32 inputs of an output, each with its products; empty
            for plain weights.
        offset: added to a weight to make it unsigned.
    """

    per_unit: int
    words: tuple[tuple[Product, ...], ...]
    offset: int = 0


def weight_format(weights: str) -> Format:
    """The format of int8, int4 or 16-bit weights."""
    if weights == "int4":
        return Format(32, ((Product(0x000F000F, 0), Product(0x00F000F0, 2)),), OFFSETS[weights])
    if weights == "int8":
        return Format(16, ((Product(0x00FF00FF, 0),), (Product(0x00FF00FF, 2),)), OFFSETS[weights])
    return Format(8, ((), (), (), ()))


def multiply_group(total: tirx.Buffer, words: Sequence[Sequence[tirx.Expr]], right: tirx.Buffer, dtype: str) -> None:
    """total += the products of 32 inputs; `words` hold 8 each, for output `group` and, if present, `group` + 8."""
    for i in (0, 2):
        left = [word for pair in words[i : i + 2] for word in (*pair, T.uint32(0))[:2]]
        mma(registers(total), left, (right[i], right[i + 1]), dtype)


def multiply_quantized_group(
    partial: tirx.Buffer, words: Sequence[Sequence[tirx.Expr]], left: tirx.Buffer, right: tirx.Buffer, form: Format
) -> None:
    """partial += the products of 32 inputs, without scales; `words` for output `group` and, if present, `group` + 8."""
    for outputs, products in zip(words, form.words, strict=True):
        for product in products:
            for half in range(2):
                for place, shift in ((half, 0), (2 + half, 8)):
                    bits = outputs[half] >> T.uint32(shift) & T.uint32(product.mask) if half < len(outputs) else None
                    T.buffer_store(left, T.uint32(0) if bits is None else bits, [place])
            mma(registers(partial), registers(left), (right[product.right], right[product.right + 1]), "float16")


def load_scales(
    values: tirx.Buffer, start: tirx.Expr, count: int, scales: tirx.Buffer, index: tirx.Expr, groups: int
) -> None:
    """values[start ..] = `count` scales from `index` on, which is a multiple of `groups` plus one of `count`."""
    wide = math.gcd(groups, count)
    if wide == 1:
        for i in range(count):
            T.buffer_store(values, T.Cast("float32", scales[index + i]), [start + i])
        return
    words = T.alloc_local((wide // 2,), "uint32")
    for i in range(0, count, wide):
        load_shared(registers(words, 0, wide // 2), shared_address(scales) + uint32(2 * (index + i)))
        for j, number in enumerate(number for word in registers(words, 0, wide // 2) for number in halves(word)):
            T.buffer_store(values, number, [start + i + j])


@dataclass(frozen=True)
class Rows:
    """Rows of x in shared memory: where they are, in which order, and how threads write them.

    Attributes:
        base: address in shared memory, uint32.
        pitch: bytes from one row to the next.
        rows: number of rows.
        features: K.
        groups: groups of 32 inputs per row that are in shared memory at a time; zeros past K.
        dtype: dtype of x.
        threads: threads per block.
        constants: for quantized weights, constants in shared memory: 16 bytes per group and pair of rows, with the
            start values of their sums and the factors of their x (the former again if x is float16). Otherwise None.
        weights: format of the weights.
    """

    base: tirx.Expr
    pitch: int
    rows: int
    features: int
    groups: int
    dtype: str
    threads: int
    constants: tirx.Buffer | None
    weights: str

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized."""
        return self.constants is not None

    def load(self, x: tirx.Buffer, thread: tirx.Expr, first_group: tirx.Expr | int) -> None:
        """Writes x (1, R, K) of `dtype`, from a group on; a thread takes inputs i .. i + 3 and i + 16 .. i + 19."""
        total, batch = self.rows * self.groups * 4, 4
        count = -(-total // self.threads)
        raw = T.alloc_local((4 * min(batch, count),), "uint32")
        numbers = T.alloc_local((8,), "float32")
        for start in range(0, count, batch):
            # All loads of a batch are started before the first result is used.
            indices = [T.Bind(i * self.threads + thread) for i in range(start, min(start + batch, count))]
            rows = [index // (4 * self.groups) for index in indices]
            groups = [index // 4 % self.groups for index in indices]
            for i, index in enumerate(indices):
                first = (first_group + groups[i]) * GROUP + index % 4 * 4
                for half in range(2):
                    place = 4 * i + 2 * half
                    for j in range(2):
                        T.buffer_store(raw, T.uint32(0), [place + j])
                    with T.If(tirx.all(index < total, first + 16 * half < self.features)), T.Then():
                        load_global(registers(raw, place, 2), x.ptr_to([0, rows[i], first + 16 * half]))
            for i, index in enumerate(indices):
                words = registers(raw, 4 * i)
                if self.quantized:
                    for j, number in enumerate(number for word in words for number in halves(word, self.dtype)):
                        T.buffer_store(numbers, number, [j])
                    words = self._operands(numbers, 0, rows[i], groups[i], index % 4, index < total)
                with only_if(index < total, total % self.threads != 0):
                    self._store(words, rows[i], groups[i], index % 4)

    def _operands(
        self,
        numbers: tirx.Buffer,
        start: int,
        row: tirx.Expr,
        group: tirx.Expr,
        member: tirx.Expr,
        inside: tirx.Expr,
    ) -> list[tirx.Expr]:
        """Float16 operands for quantized weights, from a group: eight numbers of each of four neighbouring lanes.

        Also stores the factor of the group, if `inside`.
        """
        assert self.constants is not None
        peak, words = T.alloc_local((1,), "float32"), T.alloc_local((4,), "uint32")
        scale = T.Select(member % 2 == 0, T.float32(1.0), T.float32(1 / 16)) if self.weights == "int4" else None
        if self.dtype == "bfloat16":
            largest = T.abs(numbers[start])
            for i in range(1, 8):
                largest = T.max(largest, T.abs(numbers[start + i]))
            T.buffer_store(peak, largest, [0])
            for distance in (1, 2):
                T.buffer_store(peak, T.max(peak[0], shuffle_xor(peak[0], distance)), [0])
            # The exponent of the largest number, or of 2**-112 if that is larger, so that both powers are normal
            # numbers.
            exponent = T.Bind(T.max(T.reinterpret("int32", peak[0]) >> 23, 15))
            with T.If(tirx.all(inside, member == 0)), T.Then():
                factor = T.reinterpret("float32", (exponent - 14) << 23)
                T.buffer_store(self.constants, factor, [self._constant(group, row) + 2])
            power = T.reinterpret("float32", (2 * 127 + 14 - exponent) << 23)
            scale = power if scale is None else power * scale
        scale = None if scale is None else T.Bind(scale)
        for i in range(4):
            low, high = numbers[start + i], numbers[start + 4 + i]
            if scale is not None:
                low, high = low * scale, high * scale
            pack(words[i], low, high, "float16")
        return registers(words)

    @staticmethod
    def _constant(group: tirx.Expr, row: tirx.Expr) -> tirx.Expr:
        return group * 16 + row // 2 * 4 + row % 2

    def _store(self, pairs: list[tirx.Expr], row: tirx.Expr, group: tirx.Expr, member: tirx.Expr) -> None:
        """Stores inputs 4 member .. + 3 of a group and those 16 later; pairs are neighbours, or 16 apart."""
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
        sums: tirx.Buffer,
        epsilon: float,
        warp: tirx.Expr,
        lane: tirx.Expr,
        ready: Callable[[], None],
    ) -> None:
        """Writes LayerNorm of x (1, R, K) float32, rounded to `dtype`.

        A row stays in the registers of one warp, or of several if there are more warps than rows, so that the variance
        can use distances from the mean.

        Args:
            x: the rows in global memory.
            norm: gamma and beta in shared memory.
            sums: shared memory for two numbers per warp.
            epsilon: added to the variance.
            warp: number of the warp in the block.
            lane: number of the lane in the warp.
            ready: emits what must happen before gamma and beta are read; called once, while x is being loaded.
        """
        warps = self.threads // 32
        share = max(1, warps // self.rows)
        teams = warps // share
        count = -(-self.groups // (8 * share))
        numbers = T.alloc_local((8 * count,), "float32")
        moments = T.alloc_local((2,), "float32")
        words = T.alloc_local((4,), "uint32")
        # A lane's numbers are runs of four, two of them 16 apart in a group. Whether a run is inside the row; None if
        # that is known.
        groups = [T.Bind((i * share + warp % share) * 8 + lane // 4) for i in range(count)]
        firsts = [groups[i // 2] * GROUP + lane % 4 * 4 + i % 2 * 16 for i in range(2 * count)]
        inside = {
            i: T.Bind(first < self.features)
            for i, first in enumerate(firsts)
            if (i // 2 + 1) * share * 8 * GROUP > self.features
        }

        def kept(i: int, number: tirx.Expr) -> tirx.Expr:
            """Number i of a lane; zero past the row."""
            return T.Select(inside[i // 4], number, T.float32(0.0)) if i // 4 in inside else number

        def add_row(moment: int, row: tirx.Expr) -> None:
            """Replaces moments[moment] with its sum over the lanes that share a row."""
            add_lanes(moments, moment)
            if share > 1:
                first = (moment * self.rows + row) * share
                with T.If(tirx.all(lane == 0, warp // share < self.rows)), T.Then():
                    T.buffer_store(sums, moments[moment], [first + warp % share])
                T.evaluate(T.cuda.cta_sync())
                T.buffer_store(moments, sum_of([sums[first + i] for i in range(share)]), [moment])

        for first_row in range(0, self.rows, teams):
            team_row = T.Bind(first_row + warp // share)
            # Warps past the last row compute it again and store nothing.
            row = T.Bind(T.min(team_row, self.rows - 1))
            for i, first in enumerate(firsts):
                # Past the row, its end is read again.
                at = T.min(first, self.features - 4) if i in inside else first
                load_global(registers(numbers, 4 * i), x.ptr_to([0, row, at]))
            for i in range(8 * count):
                T.buffer_store(numbers, kept(i, numbers[i]), [i])
            T.buffer_store(moments, sum_of([numbers[i] for i in range(8 * count)]), [0])
            add_row(0, row)
            T.buffer_store(moments, moments[0] * T.float32(1.0 / self.features), [0])
            for i in range(8 * count):
                T.buffer_store(numbers, kept(i, numbers[i] - moments[0]), [i])
            T.buffer_store(moments, sum_of([numbers[i] * numbers[i] for i in range(8 * count)]), [1])
            add_row(1, row)
            variance = moments[1] * T.float32(1.0 / self.features)
            T.buffer_store(moments, T.float32(1.0) / T.sqrt(variance + T.float32(epsilon)), [1])
            if first_row == 0:
                ready()
            for i, group in enumerate(groups):
                for j in range(8 * i, 8 * i + 8):
                    feature = firsts[j // 4] + j % 4
                    at = T.min(feature, self.features - 1) if j // 4 in inside else feature
                    normal = numbers[j] * moments[1] * norm[at] + norm[self.features + at]
                    T.buffer_store(numbers, kept(j, normal), [j])
                for j in range(4):
                    pack(words[j], numbers[8 * i + 2 * j], numbers[8 * i + 2 * j + 1], self.dtype)
                operands, stored = registers(words), tirx.all(team_row < self.rows, group < self.groups)
                if self.quantized:
                    for j, number in enumerate(number for word in operands for number in halves(word, self.dtype)):
                        T.buffer_store(numbers, number, [8 * i + j])
                    operands = self._operands(numbers, 8 * i, row, group, lane % 4, stored)
                with T.If(stored), T.Then():
                    self._store(operands, row, group, lane % 4)

    def sum_groups(self, form: Format, thread: tirx.Expr) -> None:
        """Writes the start values of the sums of quantized products: minus what the weights' offset adds."""
        assert self.constants is not None
        total = self.rows * self.groups * 4
        words = T.alloc_local((4,), "uint32")
        value = T.alloc_local((1,), "float32")
        for i in range(-(-total // self.threads)):
            index = T.Bind(i * self.threads + thread)
            # Lanes past the end do the same work, since all take part in the sum.
            item = T.Bind(T.Select(index < total, index, index % 4))
            group, row, quarter = item // (4 * self.rows), item // 4 % self.rows, item % 4
            load_shared(registers(words), self.base + uint32(row * self.pitch + group * GROUP_BYTES + quarter * 16))
            low, high = (sum_of([number for j in range(2) for number in halves(words[first + j])]) for first in (0, 2))
            T.buffer_store(value, low + high * T.float32(16.0 if self.weights == "int4" else 1.0), [0])
            add_lanes(value, 0, 4)
            with T.If(tirx.all(index < total, quarter == 0)), T.Then():
                for place in (0, 2) if self.dtype == "float16" else (0,):
                    constant = value[0] * T.float32(-form.offset * QUANTIZED_UNIT)
                    T.buffer_store(self.constants, constant, [self._constant(group, row) + place])


def halves(word: tirx.Expr, dtype: str = "float16") -> tuple[tirx.Expr, tirx.Expr]:
    """The two numbers of a word, as float32."""
    if dtype == "bfloat16":
        low, high = word << T.uint32(16), word & T.uint32(0xFFFF0000)
        return T.reinterpret("float32", low), T.reinterpret("float32", high)
    low, high = (T.Cast("uint16", half) for half in (word & T.uint32(0xFFFF), word >> T.uint32(16)))
    return T.Cast("float32", T.reinterpret("float16", low)), T.Cast("float32", T.reinterpret("float16", high))
