"""Rules for operators that stand for several: ONNX's Attention, ONNX Runtime's fusions, quantized products."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_attn.onnx.constants import Unsupported, dequantized
from tvm_attn.onnx.reader import Node
from tvm_attn.onnx.rules import add, embed, layer_norm
from tvm_attn.onnx.terms import Array, Const, Table, Term
from tvm_attn.onnx.trace import Trace, Value, array, rule, term

Inputs = list[Value | None]


def _get(inputs: Inputs, index: int) -> Value | None:
    return inputs[index] if index < len(inputs) else None


def _additive(mask: Array) -> Array:
    return np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == bool else mask.astype(np.float32)


def _with_past(trace: Trace, past: Value | None, new: Term) -> Term:
    """Past keys or values (B, H, P, D) followed by the new ones."""
    if past is None or not np.prod(past.shape):
        return new
    return trace.space.joined([past, new], lambda arrays: np.concatenate(arrays, 2))


def _require_zero(node: Node, *names: str) -> None:
    for name in names:
        if node.attributes.get(name, 0) not in (0, -1):
            raise Unsupported(f"its attribute {name} is set, which GPT-2 does not have")


@rule("Attention")
def _attention(trace: Trace, node: Node, inputs: Inputs) -> Any:
    q, k, v = (term(value) for value in inputs[:3])
    get = node.attributes.get
    if flat := len(q.shape) == 3:
        q = trace.heads(q, get("q_num_heads", 0))
        k, v = (trace.heads(x, get("kv_num_heads", 0)) for x in (k, v))
    if get("softcap", 0.0):
        raise Unsupported("its attribute softcap is set, which GPT-2 does not have")
    if _get(inputs, 6) is not None:
        raise Unsupported("it has nonpad_kv_seqlen, which is not supported")
    k, v = _with_past(trace, _get(inputs, 4), k), _with_past(trace, _get(inputs, 5), v)
    mask = _get(inputs, 3)
    masks = [] if mask is None else [_additive(array(mask))]
    if masks and masks[0].shape[-1] < k.shape[2]:
        absent = k.shape[2] - masks[0].shape[-1]
        masks[0] = np.pad(masks[0], [(0, 0)] * (masks[0].ndim - 1) + [(0, absent)], constant_values=-np.inf)
    y = trace.attend(q, k, v, str(node), get("scale"), masks, bool(get("is_causal", 0)))
    if flat:
        y = _merge(trace, y)
    return [y, k, v]


def _merge(trace: Trace, y: Term) -> Term:
    """(B, H, T, D) to (B, T, H * D)."""
    return trace.space.view(y, lambda i: np.swapaxes(i, 1, 2).reshape(i.shape[0], i.shape[2], -1))


def _split(trace: Trace, joined: Term, heads: int) -> list[Term]:
    pieces = np.split(np.arange(joined.shape[-1]), 3)
    return [trace.heads(_columns(trace, joined, piece), heads) for piece in pieces]


def _columns(trace: Trace, x: Term, columns: Array) -> Term:
    """Some of the features of a term."""
    return trace.space.view(x, lambda i: i[..., columns])


@rule("com.microsoft::Attention", "com.microsoft::QAttention")
def _ort_attention(trace: Trace, node: Node, inputs: Inputs) -> Any:
    get = node.attributes.get
    heads = get("num_heads", 0)
    weight, bias = array(inputs[1]), _get(inputs, 2)
    if node.op.endswith("QAttention"):
        scale, zero = array(inputs[4]), _get(inputs, 7)
        if float(array(inputs[3]).reshape(-1)[0]) != 1.0:
            trace.notes[ROUNDED] = None
        weight = dequantized(weight, scale, None if zero is None else array(zero))
        mask, past, extra = _get(inputs, 5), _get(inputs, 8), None
    else:
        mask, past, extra = _get(inputs, 3), _get(inputs, 4), _get(inputs, 5)
    _require_zero(node, "do_rotary")
    joined = trace.linear(term(inputs[0]), weight, str(node), None if bias is None else array(bias))
    q, k, v = _split(trace, joined, heads)
    if past is not None and np.prod(past.shape):
        k = _with_past(trace, trace.space.view(term(past), lambda i: i[0]), k)
        v = _with_past(trace, trace.space.view(term(past), lambda i: i[1]), v)
    masks = _padding(trace, mask, k.shape[2]) + ([] if extra is None else [_additive(array(extra))])
    causal = bool(get("unidirectional", 0))
    y = _merge(trace, trace.attend(q, k, v, str(node), get("scale") or None, masks, causal))
    present = trace.space.joined([k, v], lambda arrays: np.stack(arrays))
    return [y, present]


def _padding(trace: Trace, mask: Value | None, keys: int) -> list[Array]:
    """The additive mask of ONNX Runtime's mask_index: lengths, or a mask of 0 and 1 of two to four dimensions."""
    if mask is None:
        return []
    numbers = array(mask)
    if numbers.ndim == 1:
        return [
            np.where(np.arange(keys) < numbers[: trace.batch, None, None, None], np.float32(0), np.float32(-np.inf))
        ]
    if numbers.ndim == 2:
        numbers = numbers[:, None, None, :]
    elif numbers.ndim == 3:
        numbers = numbers[:, None]
    return [_additive(numbers[..., :keys] != 0)]


@rule("com.microsoft::MultiHeadAttention")
def _multi_head(trace: Trace, node: Node, inputs: Inputs) -> Any:
    get = node.attributes.get
    heads, bias = get("num_heads", 0), _get(inputs, 3)
    if _get(inputs, 1) is None or _get(inputs, 2) is None:
        raise Unsupported("its queries, keys and values are packed in a way that GPT-2 is not exported with")
    parts = [term(value) for value in inputs[:3]]
    if bias is not None:
        biases = np.split(array(bias), 3)
        parts = [trace.space.plus(part, entry) for part, entry in zip(parts, biases, strict=True)]
    q, k, v = (part if len(part.shape) == 4 else trace.heads(part, heads) for part in parts)
    k, v = _with_past(trace, _get(inputs, 6), k), _with_past(trace, _get(inputs, 7), v)
    masks = _padding(trace, _get(inputs, 4), k.shape[2])
    if (extra := _get(inputs, 5)) is not None:
        masks.append(_additive(array(extra)))
    y = trace.attend(q, k, v, str(node), get("scale") or None, masks, bool(get("unidirectional", 0)))
    return [_merge(trace, y), k, v]


@rule("com.microsoft::GroupQueryAttention")
def _group_query(trace: Trace, node: Node, inputs: Inputs) -> Any:
    get = node.attributes.get
    heads, shared = get("num_heads", 0), get("kv_num_heads", 0)
    _require_zero(node, "do_rotary", "softcap", "smooth_softmax", "local_window_size", "k_quant_type", "v_quant_type")
    if _get(inputs, 1) is None:
        packed = term(inputs[0])
        width = packed.shape[-1] // (heads + 2 * shared)
        edges = [heads * width, (heads + shared) * width]
        parts = [_columns(trace, packed, piece) for piece in np.split(np.arange(packed.shape[-1]), edges)]
    else:
        parts = [term(value) for value in inputs[:3]]
    q = trace.heads(parts[0], heads)
    k, v = (trace.heads(part, shared) for part in parts[1:])
    k, v = _with_past(trace, _get(inputs, 3), k), _with_past(trace, _get(inputs, 4), v)
    bias = _get(inputs, 10)
    masks = [] if bias is None else [_additive(array(bias))]
    y = trace.attend(q, k, v, str(node), get("scale") or None, masks, True)
    return [_merge(trace, y), k, v]


@rule("com.microsoft::EmbedLayerNormalization")
def _embed_norm(trace: Trace, node: Node, inputs: Inputs) -> Any:
    ids, segments, words, positions, segment_table = (_get(inputs, index) for index in range(5))
    if segment_table is not None and array(segment_table).any() and segments is not None:
        raise Unsupported("it has token types, which GPT-2 does not have")
    places = _get(inputs, 8)
    if not isinstance(ids, Const) or not isinstance(words, Const) or not isinstance(positions, Const):
        raise Unsupported("its tables are not constants")
    if places is None:
        places = Const(np.arange(trace.length)[None])
    tokens = embed(trace, words, ids, node)
    where = embed(trace, positions, places, node) if isinstance(places, Const) else None
    if tokens is None or where is None:
        raise Unsupported("its tokens or positions are not those of the graph's inputs")
    x = trace.space.sum(tokens, where, str(node))
    y = layer_norm(trace, x, inputs[5], inputs[6], node)
    return [y, Const(np.full(trace.batch, trace.length, np.int32)), x]


@rule("com.microsoft::SkipLayerNormalization")
def _skip_norm(trace: Trace, node: Node, inputs: Inputs) -> Any:
    x, skip, bias = term(inputs[0]), term(inputs[1]), _get(inputs, 4)
    if bias is not None:  # of the newer of the two matrix products
        parts = [part for side in (x, skip) for part in side.parts]
        newest = max(parts, key=lambda part: int(part.ids.max()))
        if any(part is newest for part in x.parts):
            x = trace.space.plus(x, array(bias))
        else:
            skip = trace.space.plus(skip, array(bias))
    total = trace.space.sum(x, skip, str(node))
    return [layer_norm(trace, total, inputs[2], _get(inputs, 3), node), None, None, total]


@rule("com.microsoft::BiasAdd", "com.microsoft::BiasSplitGelu")
def _bias_add(trace: Trace, node: Node, inputs: Inputs) -> Any:
    if node.op.endswith("Gelu"):
        raise Unsupported("GPT-2 has no such activation")
    return add(trace, trace.space.plus(term(inputs[0]), array(inputs[1])), inputs[2], node)


ROUNDED = "the file rounds activations to 8 bits; here they are not rounded"


@rule("DynamicQuantizeLinear")
def _quantize_dynamic(trace: Trace, node: Node, inputs: Inputs) -> Any:
    trace.notes[ROUNDED] = None
    return [term(inputs[0]), Const(np.array(1, np.float32)), Const(np.array(0, np.uint8))]


@rule("QuantizeLinear", "com.microsoft::QuantizeLinear")
def _quantize(trace: Trace, node: Node, inputs: Inputs) -> Any:
    if isinstance(inputs[0], Term):
        trace.notes[ROUNDED] = None
    return term(inputs[0])


@rule("DequantizeLinear", "com.microsoft::DequantizeLinear")
def _dequantize(trace: Trace, node: Node, inputs: Inputs) -> Any:
    value, scale, zero = inputs[0], array(inputs[1]), _get(inputs, 2)
    zeros = None if zero is None else array(zero)
    get = node.attributes.get
    if isinstance(value, Const):
        return Const(dequantized(value.array, scale, zeros, get("axis", 1), get("block_size", 0)))
    source = term(value)
    atom = trace.space.of(source.parts[0]) if source.plain else None
    if isinstance(atom, Table) and atom.weight.dtype.kind in "iu":
        weight = dequantized(atom.weight, scale, zeros, get("axis", 1))
        new = trace.space.add(Table(atom.node, atom.shape, weight, atom.source, atom.rows))
        return trace.space.view(trace.space.whole(new), lambda i: i.reshape(-1)[source.parts[0].ids - atom.start])
    return source


@rule("com.microsoft::DynamicQuantizeMatMul")
def _dynamic_product(trace: Trace, node: Node, inputs: Inputs) -> Any:
    trace.notes[ROUNDED] = None
    zero, bias = _get(inputs, 3), _get(inputs, 4)
    weight = dequantized(array(inputs[1]), array(inputs[2]), None if zero is None else array(zero))
    return trace.linear(term(inputs[0]), weight, str(node), None if bias is None else array(bias))


@rule("com.microsoft::MatMulIntegerToFloat")
def _integer_product(trace: Trace, node: Node, inputs: Inputs) -> Any:
    zero, bias = _get(inputs, 5), _get(inputs, 6)
    weight = dequantized(array(inputs[1]), array(inputs[3]), None if zero is None else array(zero))
    return trace.linear(term(inputs[0]), weight, str(node), None if bias is None else array(bias))


@rule("com.microsoft::MatMulNBits")
def _nbits(trace: Trace, node: Node, inputs: Inputs) -> Any:
    if _get(inputs, 4) is not None:
        raise Unsupported("its groups are permuted (g_idx), which is not supported")
    get, zero = node.attributes.get, _get(inputs, 3)
    sizes = [int(get(name, 0)) for name in ("K", "N")]
    weight = nbits_weight(
        array(inputs[1]),
        array(inputs[2]),
        None if zero is None else array(zero),
        sizes[0],
        sizes[1],
        bits=int(get("bits", 4)),
        block=int(get("block_size", 0)),
    )
    bias = _get(inputs, 5)
    return trace.linear(term(inputs[0]), weight, str(node), None if bias is None else array(bias))


def nbits_weight(packed: Array, scales: Array, zeros: Array | None, k: int, n: int, bits: int, block: int) -> Array:
    """The matrix (k, n) float32 of MatMulNBits.

    Args:
        packed: uint8 (n, blocks, block * bits / 8), the first of two 4-bit numbers in the low bits.
        scales: one for each block, (n * blocks,) or (n, blocks).
        zeros: the same, packed like the weights or of the scales' type; None for the middle, 2 ** (bits - 1).
        bits: 2, 4 or 8.
        block: numbers in a block.
    """
    if bits not in (2, 4, 8) or block < 1 or packed.dtype != np.uint8:
        raise Unsupported(f"weights of {bits} bits are not supported")
    blocks = -(-k // block)

    def unpacked(data: Array, count: int) -> Array:
        parts = [data >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
        return np.stack(parts, -1).reshape(*data.shape[:-1], -1)[..., :count]

    values = unpacked(packed.reshape(n, blocks, -1), block).astype(np.float32)
    middle: Array = np.full((n, blocks), 2 ** (bits - 1), np.float32)
    if zeros is not None:
        found = unpacked(zeros.reshape(n, -1), blocks) if zeros.dtype == np.uint8 else zeros.reshape(n, blocks)
        middle = found.astype(np.float32)
    values = (values - middle[..., None]) * scales.reshape(n, blocks, 1).astype(np.float32)
    return values.reshape(n, -1)[:, :k].T
