"""No index of a kernel overflows at the largest legal sizes: GPT-2 1.5B with 64 full slots."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cuda.overflow import overflows
from tvm_attn import targets
from tvm_attn.kernels import Advance, DecodeAttention, Head, Kernel, LayerNorm, PrefillAttention, QKVLinear
from tvm_attn.schedule import schedule

SLOTS, CONTEXT, HEADS, WIDTH, VOCABULARY = 64, 1024, 25, 1600, 50257
LARGEST = {"g": CONTEXT // 8, "b": SLOTS, "cache_slots": SLOTS}
_SLOT, _POSITION, _ROWS = (0, SLOTS - 1), (-1, CONTEXT - 1), (0, CONTEXT)
# Includes local buffers that hold copies: `place` is a slot and a position, `found` a sequence and two counts.
ELEMENTS = {
    "positions": [_POSITION],
    "row_positions": [_POSITION],
    "row_slots": [_SLOT],
    "sequences": [_SLOT, _ROWS, _ROWS, _POSITION],
    "found": [_SLOT, _ROWS, _ROWS],
    "place": [_SLOT, _POSITION],
}

ATTENTION = (HEADS, 64, CONTEXT)
ONE_GROUP: dict[str, Any] = {
    "rows": 8,
    "columns": 1,
    "weights": "int8",
    "groups": 1,
    "activations": "float16",
    "epsilon": 1e-5,
}
KERNELS: list[Kernel] = [
    PrefillAttention(*ATTENTION, 8, "float16", 0.125, "float16"),
    DecodeAttention(*ATTENTION, 8, "float16", 0.125, None, "float16"),
    DecodeAttention(*ATTENTION, 1, "float16", 0.125, 1, "float16"),
    DecodeAttention(*ATTENTION, 8, "float16", 0.125, 1, "float16"),
    LayerNorm(WIDTH, 1e-5, 8, activations="float16"),
    QKVLinear(WIDTH, 3 * WIDTH, heads=HEADS, context=CONTEXT, cache_dtype="float16", **ONE_GROUP),
    Head(WIDTH, VOCABULARY, **ONE_GROUP),
    Advance(VOCABULARY, VOCABULARY, 8),
]


@pytest.mark.parametrize(
    "kernel", KERNELS, ids=lambda kernel: f"{kernel.family}-{kernel.rows}-{getattr(kernel, 'groups', None) or 'g'}"
)
def test_no_index_overflows(kernel: Kernel) -> None:
    assert overflows(schedule(kernel, targets.read("cuda")), LARGEST, ELEMENTS) == []
