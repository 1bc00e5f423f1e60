"""The loops and templates of NVIDIA GPUs with tensor cores (sm_80 and later), in TIRx and PTX; one file per family.

They take float16 and bfloat16 activations. Everything else uses the loops of `tvm_attn.kernels.gpu`.
"""

from tvm_attn.kernels import gpu
from tvm_attn.kernels.cuda import decode_attention, linear, norm, prefill_attention, sampling

TEMPLATES = (
    linear.TEMPLATE,
    norm.TEMPLATE,
    prefill_attention.TEMPLATE,
    decode_attention.TEMPLATE,
    sampling.TEMPLATE,
    gpu.attention_weights.CUDA_TEMPLATE,
    *gpu.TEMPLATES,
)
"""The templates of this device class."""
