"""Kernels for NVIDIA GPUs with tensor cores (sm_80 and later), as TIRx functions.

A kernel here is, like its siblings in `tvm_attn.kernels`, a frozen dataclass of static sizes with a float64 reference
and cases. Its loops depend on its tiles, which `tvm_attn.schedule.cuda` chooses.
"""

from tvm_attn.kernels.cuda.linear import Head, Linear, QKVLinear, ResidualLinear

__all__ = ["Head", "Linear", "QKVLinear", "ResidualLinear"]
