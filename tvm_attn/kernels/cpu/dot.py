"""Dot product instructions of processors, as functions in LLVM IR that a kernel imports.

Such a function is (acc, x word, w words) -> acc over a vector of columns: a word holds two bfloat16 values, or four bytes,
signed in x and unsigned in w. TVM's own calls of these intrinsics fail LLVM's checks, because their types for bfloat16 and
packed bytes are not those LLVM expects.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm_attn.targets import CpuTarget

BFLOAT16, INT8 = "bfloat16", "int8"
"""The kinds of dot products: of two bfloat16 values with float32 sums, of four bytes with int32 sums."""


@dataclass(frozen=True)
class Dot:
    """A dot product instruction.

    Attributes:
        kind: `BFLOAT16` or `INT8`.
        feature: the instruction set that has it, as Linux names it.
        lanes: sums in a register; `CpuTarget.lanes` of the targets that use it.
        intrinsic: LLVM's name of it.
        signed: whether the instruction takes the bytes of w as signed. Bytes up to 127 are the same either way.
    """

    kind: str
    feature: str
    lanes: int
    intrinsic: str
    signed: bool = False

    @property
    def sums(self) -> str:
        """LLVM's type of a register of sums."""
        return f"<{self.lanes} x {self._sum}>"

    @property
    def operand(self) -> str:
        """LLVM's type of a register of factors."""
        return f"<{2 * self.lanes} x bfloat>" if self.kind == BFLOAT16 else f"<{4 * self.lanes} x i8>"

    @property
    def declaration(self) -> str:
        """LLVM IR that declares the intrinsic."""
        return f"declare {self.sums} @{self.intrinsic}({self.sums}, {self.operand}, {self.operand})"

    def name(self, lanes: int) -> str:
        """The function for so many columns: `lanes` or twice as many."""
        return f"tvm_attn_dot_{self.kind}_{lanes}"

    def text(self, lanes: int) -> str:
        """LLVM IR of that function and of those that it calls."""
        return self._step() + (self._pair() if lanes == 2 * self.lanes else "")

    @property
    def _sum(self) -> str:
        return "float" if self.kind == BFLOAT16 else "i32"

    def _step(self) -> str:
        """One instruction. linkonce_odr: every kernel of a module imports it."""
        words = f"<{self.lanes} x i32>"
        # Where the signs differ, the unsigned factor comes first.
        a, b = ("%spread", "%w") if self.kind == BFLOAT16 else ("%w", "%spread")
        return f"""
define linkonce_odr {self.sums} @{self.name(self.lanes)}({self.sums} %acc, i32 %x, {words} %w) alwaysinline {{
  %first = insertelement {words} poison, i32 %x, i64 0
  %spread = shufflevector {words} %first, {words} poison, {words} zeroinitializer
  %a = bitcast {words} {a} to {self.operand}
  %b = bitcast {words} {b} to {self.operand}
  %sum = call {self.sums} @{self.intrinsic}({self.sums} %acc, {self.operand} %a, {self.operand} %b)
  ret {self.sums} %sum
}}
{self.declaration}
"""

    def _pair(self) -> str:
        """Two registers of columns. One step for a whole strip reads its weights in memory order."""

        def mask(lanes: range) -> str:
            return "<" + ", ".join(f"i32 {lane}" for lane in lanes) + ">"

        n = self.lanes
        one, two = f"<{n} x {self._sum}>", f"<{2 * n} x {self._sum}>"
        words, all_words, step = f"<{n} x i32>", f"<{2 * n} x i32>", self.name(n)
        low, high = f"{words} {mask(range(n))}", f"{words} {mask(range(n, 2 * n))}"
        return f"""
define linkonce_odr {two} @{self.name(2 * n)}({two} %acc, i32 %x, {all_words} %w) alwaysinline {{
  %acc0 = shufflevector {two} %acc, {two} poison, {low}
  %acc1 = shufflevector {two} %acc, {two} poison, {high}
  %w0 = shufflevector {all_words} %w, {all_words} poison, {low}
  %w1 = shufflevector {all_words} %w, {all_words} poison, {high}
  %sum0 = call {one} @{step}({one} %acc0, i32 %x, {words} %w0)
  %sum1 = call {one} @{step}({one} %acc1, i32 %x, {words} %w1)
  %sum = shufflevector {one} %sum0, {one} %sum1, {all_words} {mask(range(2 * n))}
  ret {two} %sum
}}
"""


# The first that a target has is used.
_DOTS = (
    Dot(BFLOAT16, "avx512_bf16", 16, "llvm.x86.avx512bf16.dpbf16ps.512"),
    Dot(INT8, "avx512_vnni", 16, "llvm.x86.avx512.vpdpbusd.512"),
    Dot(BFLOAT16, "bf16", 4, "llvm.aarch64.neon.bfdot.v4f32.v8bf16"),
    Dot(INT8, "i8mm", 4, "llvm.aarch64.neon.usdot.v4i32.v16i8"),
    Dot(INT8, "asimddp", 4, "llvm.aarch64.neon.sdot.v4i32.v16i8", signed=True),
)


def find_dot(kind: str, target: CpuTarget) -> Dot | None:
    """The dot product instruction of a kind that a target has; None if it has none."""
    fitting = (dot for dot in _DOTS if dot.kind == kind and dot.feature in target.features)
    return next((dot for dot in fitting if dot.lanes == target.lanes), None)
