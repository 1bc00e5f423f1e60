"""The loops and templates of GPUs: Vulkan devices, and CUDA where it has no better ones; one file a family.

What a device can do comes from its target: threads of a block, shared memory, width of a load, subgroups.
"""

from tvm_attn.kernels.gpu import (
    decode_attention,
    embedding,
    linear,
    norm,
    prefill_attention,
    quant,
    sampling,
    weights,
)

TEMPLATES = (
    linear.TEMPLATE,
    weights.TEMPLATE,
    *quant.TEMPLATES,
    embedding.TEMPLATE,
    norm.TEMPLATE,
    prefill_attention.TEMPLATE,
    decode_attention.TEMPLATE,
    sampling.TEMPLATE,
)
"""The templates of this device class."""
