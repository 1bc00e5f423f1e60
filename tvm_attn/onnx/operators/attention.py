"""The operator Attention, on our kernels, and the writing of a cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from tvm_attn.kernels.attention_operator import BOOLEAN, STAGES, AttentionOperator, AttentionScores
from tvm_attn.onnx.converter import Node, Operator, array_constant, cast, equal_sizes, shape_of

_op = relax.op
_DTYPES = ("float32", "float16", "bfloat16")
_PAST_KEY, _PAST_VALUE, _NONPAD, _MASK = 4, 5, 6, 3  # inputs of the operator


def _attention(node: Node) -> list[Any]:
    """Scaled dot-product attention: Y, present_key, present_value, qk_matmul_output.

    https://onnx.ai/onnx/operators/onnx__Attention.html; `is_causal` means there, since onnx 1.22, that query i of a
    call is at position i plus the number of keys before the call. The softmax is computed in float32, whatever
    `softmax_precision` says.
    """
    dtype = node.dtype(0)
    if dtype not in _DTYPES:
        raise node.error(f"dtype {dtype} is not supported, only {', '.join(_DTYPES)}")
    flat = len(node.shape(0)) == 3
    q = _split_heads(node, node.tensor(0), "q_num_heads")
    k, v = (cast(node, _split_heads(node, node.tensor(i), "kv_num_heads"), dtype) for i in (1, 2))
    past: Any = 0
    if node.has(_PAST_KEY) != node.has(_PAST_VALUE) or (node.has(_PAST_KEY) and node.has(_NONPAD)):
        raise node.error("past_key and past_value come together, and without nonpad_kv_seqlen")
    if node.has(_PAST_KEY):
        past = node.shape(_PAST_KEY)[2]
        k, v = (
            node.emit(_op.concat([cast(node, node.tensor(i), dtype), new], axis=2))
            for i, new in ((_PAST_KEY, k), (_PAST_VALUE, v))
        )
    kernel, mask = _kernel(node, q, k, v, dtype)
    batch, _, queries, _ = shape_of(q)
    bounds = _bounds(node, batch, queries, past, shape_of(k)[2])
    y = node.call_kernel(kernel, [q, k, v, bounds, *mask], [batch, kernel.heads, queries, kernel.value_dim], dtype)
    if flat:
        rows = node.emit(_op.permute_dims(y, [0, 2, 1, 3]))
        y = node.emit(_op.reshape(rows, relax.ShapeExpr([batch, queries, kernel.heads * kernel.value_dim])))
    scores: Any = y
    if node.wants(3):
        mode = node.attributes.get("qk_matmul_output_mode", 0)
        if not 0 <= mode < len(STAGES):
            raise node.error(f"qk_matmul_output_mode {mode} does not exist")
        shown = AttentionScores(**asdict(kernel), stage=STAGES[mode])
        shape = [batch, kernel.heads, queries, shape_of(k)[2]]
        scores = cast(node, node.call_kernel(shown, [q, k, bounds, *mask], shape, "float32"), dtype)
    return [y, k, v, scores]


def _kernel(
    node: Node, q: relax.Expr, k: relax.Expr, v: relax.Expr, dtype: str
) -> tuple[AttentionOperator, list[relax.Expr]]:
    """The kernel, and its mask (1 or b, 1 or H, 1 or l, m) if there is one."""
    heads, key_heads = shape_of(q)[1], shape_of(k)[1]
    sizes = [heads, key_heads, shape_of(q)[3], shape_of(k)[3], shape_of(v)[3]]
    if not all(isinstance(size, int) for size in sizes):
        raise node.needs_shapes("the numbers and sizes of heads must be constant")
    if sizes[2] != sizes[3] or shape_of(v)[1] != key_heads or not key_heads or heads % key_heads:
        raise node.error(f"queries {shape_of(q)}, keys {shape_of(k)} and values {shape_of(v)} do not fit")
    for a, b in ((shape_of(k)[2], shape_of(v)[2]), (shape_of(q)[0], shape_of(k)[0]), (shape_of(q)[0], shape_of(v)[0])):
        if not equal_sizes(a, b):
            raise node.needs_shapes(f"sizes {a} and {b} must be the same")
    masks: list[relax.Expr] = []
    if node.has(_MASK):
        mask = node.tensor(_MASK)
        kind = str(mask.ty.dtype)
        mask = cast(node, mask, BOOLEAN if kind == "bool" else kind if kind in _DTYPES else "float32")
        shape = shape_of(mask)
        if not 1 <= len(shape) <= 4:
            raise node.error(f"a mask of {len(shape)} dimensions is not supported")
        shape = [1] * (4 - len(shape)) + shape
        for size, whole in zip(shape, [shape_of(q)[0], heads, shape_of(q)[2]], strict=False):
            if not (equal_sizes(size, 1) or equal_sizes(size, whole)):
                raise node.needs_shapes(f"the mask's size {size} does not fit {whole}")
        masks.append(node.emit(_op.reshape(mask, relax.ShapeExpr(shape))))
    windows = [node.attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if min(windows) < -1:
        raise node.error(f"window sizes {windows} must be -1 or more")
    kernel = AttentionOperator(
        heads,
        key_heads,
        head_dim=sizes[2],
        value_dim=sizes[4],
        dtype=dtype,
        scale=float(node.attributes.get("scale", sizes[2] ** -0.5)),
        softcap=float(node.attributes.get("softcap", 0.0)),
        mask=str(masks[0].ty.dtype) if masks else None,
        causal=bool(node.attributes.get("is_causal", 0)),
        left=windows[0],
        right=windows[1],
    )
    return kernel, masks


def _split_heads(node: Node, x: relax.Expr, attribute: str) -> relax.Expr:
    """(batch, heads, length, size), from that or from (batch, length, heads * size)."""
    shape = shape_of(x)
    if len(shape) == 4:
        return x
    heads = node.attributes.get(attribute, 0)
    if len(shape) != 3 or heads < 1:
        raise node.error(f"inputs need 4 dimensions, or 3 and the attribute {attribute}")
    if not isinstance(shape[2], int) or shape[2] % heads:
        raise node.needs_shapes(f"size {shape[2]} is not a multiple of the {heads} heads")
    split = node.emit(_op.reshape(x, relax.ShapeExpr([*shape[:2], heads, shape[2] // heads])))
    return node.emit(_op.permute_dims(split, [0, 2, 1, 3]))


def _bounds(node: Node, batch: Any, queries: Any, past: Any, keys: Any) -> relax.Expr:
    """The position of the first query and the number of keys of each sequence, (batch, 2) int32."""
    counts = [node.tensor(_NONPAD)] if node.has(_NONPAD) else []
    if not counts and all(isinstance(size, int) for size in (batch, past, keys)):
        return array_constant(np.tile(np.array([past, keys], np.int32), (batch, 1)))

    def bounds(batch: Any, queries: Any, past: Any, keys: Any, *counts: Any) -> Any:
        def element(i: Any, j: Any) -> Any:
            count = tirx.max(tirx.min(tirx.Cast("int64", counts[0](i)), keys), 0) if counts else keys
            first = tirx.Cast("int64", counts[0](i)) - queries if counts else past
            return tirx.Cast("int32", tirx.if_then_else(j == 0, first, count))

        return te.compute((batch, 2), element, name="bounds")

    sizes = (tirx.IntImm("int64", size) if isinstance(size, int) else size for size in (batch, queries, past, keys))
    return node.compute(bounds, *sizes, *counts)


def _tensor_scatter(node: Node) -> relax.Expr:
    """The cache with `update` written at each sequence's place."""
    cache, update = node.tensor(0), node.tensor(1)
    mode = node.attributes.get("mode", b"linear")
    if mode not in (b"linear", b"circular"):
        raise node.error("mode must be linear or circular")
    axis = node.axis(len(node.shape(0)), -2)
    if axis == 0:
        raise node.error("the axis may not be the batch")

    def scatter(past: Any, new: Any, *starts: Any) -> Any:
        length, size = new.shape[axis], past.shape[axis]

        def element(*index: Any) -> Any:
            place = tirx.Cast("int64", index[axis]) - (starts[0](index[0]) if starts else 0)
            if mode == b"circular":
                place = tirx.floormod(place, tirx.Cast("int64", size))
            inside = tirx.all(place >= 0, place < length)
            at = [place if a == axis else i for a, i in enumerate(index)]
            return tirx.if_then_else(inside, new(*at), past(*index))

        return te.compute(past.shape, element, name="tensor_scatter")

    return node.compute(scatter, cache, update, *([node.tensor(2)] if node.has(2) else []))


OPERATORS: dict[str, Operator] = {
    "Attention": _attention,
    "TensorScatter": _tensor_scatter,
}
