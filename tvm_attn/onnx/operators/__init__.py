"""The operators of ai.onnx that a compiled graph may have, each a function from a `Node` to its results."""

from __future__ import annotations

from tvm_attn.onnx.converter import Operator
from tvm_attn.onnx.operators import algebra, attention, pointwise, reduction, shapes

OPERATORS: dict[str, Operator] = {
    **pointwise.OPERATORS,
    **shapes.OPERATORS,
    **algebra.OPERATORS,
    **reduction.OPERATORS,
    **attention.OPERATORS,
}
