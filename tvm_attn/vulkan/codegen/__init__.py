"""TIR to SPIR-V in Python: `build` is `target.build.vulkan`, `disassemble` gives the assembly text of a kernel."""

from tvm_attn.vulkan.codegen.build import build, emit, parse
from tvm_attn.vulkan.codegen.disassembly import disassemble

__all__ = ["build", "disassemble", "emit", "parse"]
