"""Dot product instructions of processors, as functions in LLVM IR that a kernel imports."""

from __future__ import annotations

from tvm_attn.targets import CpuTarget

DOT_BFLOAT16, DOT_INT8 = "tvm_attn_dot_bfloat16", "tvm_attn_dot_int8"
"""Functions (acc, x word, w words) -> acc over a vector of columns; a name ends in the number of columns: "_16"."""

# One dot product step for 16 columns, as LLVM IR: TVM's own calls of these intrinsics fail LLVM's checks, because their
# types for bfloat16 and packed bytes are not those LLVM expects. linkonce_odr: every kernel of a module imports them.
DOT_STEPS = {
    DOT_BFLOAT16: """
define linkonce_odr <16 x float> @tvm_attn_dot_bfloat16_16(<16 x float> %acc, i32 %x, <16 x i32> %w) alwaysinline {
  %first = insertelement <16 x i32> poison, i32 %x, i64 0
  %spread = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %a = bitcast <16 x i32> %spread to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %sum
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
""",
    DOT_INT8: """
define linkonce_odr <16 x i32> @tvm_attn_dot_int8_16(<16 x i32> %acc, i32 %x, <16 x i32> %w) alwaysinline {
  %first = insertelement <16 x i32> poison, i32 %x, i64 0
  %spread = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  %a = bitcast <16 x i32> %w to <64 x i8>
  %b = bitcast <16 x i32> %spread to <64 x i8>
  %sum = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %acc, <64 x i8> %a, <64 x i8> %b)
  ret <16 x i32> %sum
}
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
""",
}
_FEATURES = {DOT_BFLOAT16: "avx512_bf16", DOT_INT8: "avx512_vnni"}
# The same for 32 columns. One step for a whole strip reads its weights in memory order.
_PAIR = """
define linkonce_odr <32 x TYPE> @NAME_32(<32 x TYPE> %acc, i32 %x, <32 x i32> %w) alwaysinline {
  %acc0 = shufflevector <32 x TYPE> %acc, <32 x TYPE> poison, <16 x i32> LOW
  %acc1 = shufflevector <32 x TYPE> %acc, <32 x TYPE> poison, <16 x i32> HIGH
  %w0 = shufflevector <32 x i32> %w, <32 x i32> poison, <16 x i32> LOW
  %w1 = shufflevector <32 x i32> %w, <32 x i32> poison, <16 x i32> HIGH
  %sum0 = call <16 x TYPE> @NAME_16(<16 x TYPE> %acc0, i32 %x, <16 x i32> %w0)
  %sum1 = call <16 x TYPE> @NAME_16(<16 x TYPE> %acc1, i32 %x, <16 x i32> %w1)
  %sum = shufflevector <16 x TYPE> %sum0, <16 x TYPE> %sum1, <32 x i32> ALL
  ret <32 x TYPE> %sum
}
"""


def dot_pair(name: str) -> str:
    """LLVM IR of the step for 32 columns, together with the step for 16 that it calls."""

    def mask(lanes: range) -> str:
        return "<" + ", ".join(f"i32 {lane}" for lane in lanes) + ">"

    text = _PAIR.replace("NAME", name).replace("TYPE", "float" if name == DOT_BFLOAT16 else "i32")
    return text.replace("LOW", mask(range(16))).replace("HIGH", mask(range(16, 32))).replace("ALL", mask(range(32)))


def has_dot(name: str, target: CpuTarget) -> bool:
    """Whether a target has the instruction."""
    return target.lanes == 16 and _FEATURES[name] in target.features
