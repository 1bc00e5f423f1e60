"""The weight of the tensor-core matmul: its form in shared memory, and how it becomes fragments of B.

float16 and bfloat16 weights are loaded with `ldmatrix`. int8 and int4 weights stay packed in shared memory and become
floats in registers. In the packed format (`tvm_attn.kernels.weights`), word p of a group of 32 holds rows 8 j + p. Lane
(group, pair) needs rows 8 j + 2 pair and 8 j + 2 pair + 1 for j = 0..3, in this order, because that is how `ldmatrix`
delivers x. These are bytes j of words 2 pair and 2 pair + 1, so a lane needs one 8-byte load for two steps of 16, and
no permutation. int4 has rows 8 j + p and 8 j + p + 4 in byte j of word p: a lane needs word 2 (pair % 2) and the next
one, the low nibbles for pairs 0 and 1, the high nibbles for pairs 2 and 3.

A byte u becomes a float by putting it into the low bits of a number whose unit in the last place is 1: 0x6400 | u is
1024 + u in float16. bfloat16 has 7 bits for it: 0x4300 | u is 128 + u, and bit 7 chooses between two offsets to
subtract. The subtraction is exact. The scale is applied to the weights, not to the sums: a fragment of B takes 4
multiplications of pairs per 32 rows of K, whereas its sums would take 4 per 16 rows of x. The product is rounded to
`dtype`, like weights that are stored in `dtype`; for bfloat16 the scale is rounded too. Both roundings together stay
within the bound of the cases.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.cuda import ptx
from tvm_attn.kernels.cuda.matmul_block import Block
from tvm_attn.storage import GROUP

_ONE = {"float16": 0x3C003C00, "bfloat16": 0x3F803F80}


class PlainWeight:
    """A weight (N, K, 1) of `dtype`; fragments are double-buffered across steps."""

    def __init__(self, block: Block, tensors: list[tirx.Buffer]) -> None:
        self.block, tiles, kernel = block, block.tiles, block.kernel
        self.count = tiles.column_fragments
        self.row_bytes = tiles.weight_row_bytes(kernel.weights)
        self.weight = T.decl_buffer(
            (kernel.out_features * kernel.in_features,), kernel.activations, data=tensors[0].data
        )
        self.fragments = T.alloc_local((2 * self.count * 2,), "uint32")
        # The four matrices of a load: columns 0-7 with k 0-7 and 8-15, columns 8-15 with k 0-7 and 8-15.
        lane = block.lane
        unit = ptx.swizzle(lane % 8, block.slice * (2 * tiles.steps) + lane // 8 % 2, self.row_bytes)
        column = block.warp_column + lane % 8 + lane // 16 * 8
        self.offset = ptx.variable("uint32", ptx.uint32(column * self.row_bytes + unit * 16))

    def copy(self, shared: tirx.Expr, tile: tirx.Expr | int) -> None:
        """Starts the copies of a stage."""
        block, k, depth = self.block, self.block.kernel.in_features, self.block.tiles.depth
        rows = (block.first_column, block.tiles.columns, block.column_bound)
        block.copy(self.weight, rows, (tile * depth, depth, k), shared)

    def load(self, shared: tirx.Expr, step: int) -> None:
        """Loads the fragments of a step."""
        base, address = step % 2 * self.count * 2, shared + (self.offset ^ T.uint32(step * 32))
        if self.count > 1:
            with T.unroll(self.count // 2) as pair:
                registers = [self.fragments[base + pair * 4 + i] for i in range(4)]
                ptx.ldmatrix(registers, address + ptx.uint32(pair * (16 * self.row_bytes)))
        if self.count % 2:
            registers = [self.fragments[base + self.count * 2 - 2 + i] for i in range(2)]
            ptx.ldmatrix(registers, address + T.uint32((self.count - 1) * 8 * self.row_bytes))

    def prepare(self, step: int) -> None:
        """Converts loaded weights to floats: nothing to do."""

    def fragment(self, step: int, column: tirx.Expr) -> list[tirx.Expr]:
        """The two registers of a fragment."""
        base = (step % 2 * self.count + column) * 2
        return [self.fragments[base], self.fragments[base + 1]]


class QuantizedWeight:
    """Words (N, K/4 or K/8, 1) int32 and scales (N, K/32, 1) float16.

    A stage holds the words as they are, then scales (depth / 64, columns, 2). The words of the next group are loaded
    while the floats of the current one are multiplied.
    """

    def __init__(self, block: Block, tensors: list[tirx.Buffer]) -> None:
        self.block, tiles, kernel = block, block.tiles, block.kernel
        self.int8, self.dtype, self.count = kernel.weights == "int8", kernel.activations, tiles.column_fragments
        self.group_words, self.groups = 8 if self.int8 else 4, kernel.in_features // GROUP
        self.row_bytes = tiles.weight_row_bytes(kernel.weights)
        self.scales_start = tiles.columns * self.row_bytes
        n = kernel.out_features
        self.words = T.decl_buffer((n * self.groups * self.group_words,), "int32", data=tensors[0].data)
        self.scales = T.decl_buffer((n * self.groups,), "float16", data=tensors[1].data)
        self.raw = T.alloc_local((2 * self.count,), "uint32")
        self.raw_scales = T.alloc_local((self.count,), "uint32")
        self.fragments = T.alloc_local((4 * self.count,), "uint32")
        self.scratch = T.alloc_local((4,), "uint32")

        first_group = block.slice * (tiles.steps // 2)
        column, pair = block.lane // 4, block.lane % 4
        unit = ptx.swizzle(column, first_group, self.row_bytes, 4 * self.group_words)
        words = unit * self.group_words + (pair if self.int8 else pair % 2) * 2
        row = (block.warp_column + column) * self.row_bytes
        self.offset = ptx.variable("uint32", ptx.uint32(row + words * 4))
        self.nibble = ptx.variable("uint32", ptx.uint32(pair // 2 * 4))
        scale = first_group // 2 * tiles.columns + block.warp_column + column
        self.scale_offset = ptx.variable("uint32", ptx.uint32(self.scales_start + scale * 4))
        # A warp that has one group per stage starts at the second half of a word of scales if its slice is odd.
        self.half = ptx.variable("uint32", ptx.uint32(first_group % 2))

    def copy(self, shared: tirx.Expr, tile: tirx.Expr | int) -> None:
        """Starts the copies of a stage."""
        block, length = self.block, self.groups * self.group_words
        words = block.tiles.depth // GROUP * self.group_words
        rows = (block.first_column, block.tiles.columns, block.column_bound)
        block.copy(self.words, rows, (tile * words, words, length), shared, 4 * self.group_words)
        self._copy_scales(shared + T.uint32(self.scales_start), tile)

    def _copy_scales(self, shared: tirx.Expr, tile: tirx.Expr | int) -> None:
        block, columns = self.block, self.block.tiles.columns
        pairs = self.block.tiles.depth // (2 * GROUP)
        for index in block.spread(pairs * columns):
            column, group = block.first_column + index % columns, (tile * pairs + index // columns) * 2
            inside = column < block.kernel.out_features
            address = shared + ptx.uint32(index * 4)
            first = ptx.int64(column) * self.groups + ptx.int64(group)
            if self.groups % 2 == 0:
                ptx.cp_async(address, self.scales.ptr_to([first]), 4, tirx.all(inside, group < self.groups))
                continue
            # A row with an odd number of scales is not a multiple of 4 bytes, the least that a copy takes.
            pair = ptx.variable("uint32", T.uint32(0))
            for half in range(2):
                with ptx.when(tirx.all(inside, group + half < self.groups)):
                    bits = T.Cast("uint32", T.reinterpret("uint16", self.scales[first + T.int64(half)]))
                    ptx.assign(pair, pair | (bits << T.uint32(16 * half)))
            ptx.store_shared(address, [pair])

    def load(self, shared: tirx.Expr, step: int) -> None:
        """Loads the words of the group that begins with a step, and the scales of two groups."""
        group, columns = step // 2, self.block.tiles.columns
        if step % 2:
            return
        words = shared + (self.offset ^ T.uint32(group * 4 * self.group_words))
        with T.unroll(self.count) as column:
            registers = [self.raw[2 * column], self.raw[2 * column + 1]]
            ptx.load_shared(registers, words + ptx.uint32(column * (8 * self.row_bytes)))
        if group % 2 == 0:
            scales = shared + self.scale_offset + T.uint32(group // 2 * columns * 4)
            with T.unroll(self.count) as column:
                ptx.load_shared([self.raw_scales[column]], scales + ptx.uint32(column * 32))

    def prepare(self, step: int) -> None:
        """Converts the group that begins with a step to floats."""
        if step % 2:
            return
        with T.unroll(self.count) as column:
            for half in range(2):
                # From words 2 pair and 2 pair + 1: bytes 2 half of both go to bytes 0 and 2, bytes 2 half + 1 above
                # them.
                words = self.raw[2 * column], self.raw[2 * column + 1]
                ptx.permute_bytes(self.scratch[half], *words, (0x5410, 0x7632)[half])
            self._scale_pair(self.raw_scales[column], step // 2)
            for chunk in range(4):
                target = self.fragments[4 * column + chunk]
                self._integers(target, self.scratch[chunk // 2], chunk % 2)
                ptx.fma_pairs(target, target, self.scratch[2], T.uint32(0), self.dtype)

    def _integers(self, target: tirx.Expr, source: tirx.Expr, odd: int) -> None:
        """Two quantized numbers as floats: those in bytes `odd` and 2 + `odd` of `source`."""
        one, float16 = T.uint32(_ONE[self.dtype]), self.dtype == "float16"
        if not self.int8:
            shifted = source >> (self.nibble + T.uint32(8 * odd))
            ptx.mask_or(target, shifted, 0x000F000F, 0x64006400 if float16 else 0x43004300)
            offset = T.uint32(0xE408E408 if float16 else 0xC308C308)  # -1032, -136
        elif float16:
            ptx.permute_bytes(target, source, T.uint32(0x64646464), (0x4240, 0x4341)[odd])
            offset = T.uint32(0xE480E480)  # -1152
        else:
            shifted, offset = source >> T.uint32(8 * odd), self.scratch[3]
            ptx.mask_or(target, shifted, 0x007F007F, 0x43004300)
            ptx.mask_xor(offset, shifted, 0x00800080, 0xC380C380)  # -128 where bit 7 is set, else -256
        ptx.fma_pairs(target, target, one, offset, self.dtype)

    def _scale_pair(self, word: tirx.Expr, group: int) -> None:
        """The scale of a group twice, as `dtype`."""
        half = self.half if self.block.tiles.steps == 2 else T.uint32(group % 2)
        if self.dtype == "float16":
            ptx.permute_bytes(self.scratch[2], word, word, T.uint32(0x1010) + half * T.uint32(0x2222))
            return
        scale = T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", word >> (half * T.uint32(16)))))
        ptx.pack(self.scratch[2], scale, scale, self.dtype)

    def fragment(self, step: int, column: tirx.Expr) -> list[tirx.Expr]:
        """The two registers of a fragment."""
        base = 4 * column + step % 2 * 2
        return [self.fragments[base], self.fragments[base + 1]]
