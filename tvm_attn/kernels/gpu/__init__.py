"""The loops and templates of GPUs, one file per family: for Vulkan, and for CUDA if `cuda` has nothing better.

The target says what a device can do: threads per block, shared memory, width of a load, subgroups.
"""

from tvm_attn.kernels.gpu import (
    attention_operator,
    attention_weights,
    cache_write,
    decode_attention,
    embedding,
    linear,
    logprobs,
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
    cache_write.TEMPLATE,
    attention_weights.TEMPLATE,
    attention_operator.TEMPLATE,
    attention_operator.SCORES_TEMPLATE,
    sampling.TEMPLATE,
    *logprobs.TEMPLATES,
)
"""The templates of this device class."""
