"""The calls that a search measures: that every kernel has some, and how much work they are."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tvm_attn import targets
from tvm_attn.compiler.devices import layout_for
from tvm_attn.config import PRESETS
from tvm_attn.errors import TuningError
from tvm_attn.kernels import (
    FAMILIES,
    DecodeAttention,
    Head,
    Kernel,
    LayerNorm,
    Linear,
    PackPairs,
    PackPlain,
    PrefillAttention,
    QKVLinear,
    QuantizeRows,
    ResidualLinear,
)
from tvm_attn.kernels.base import label
from tvm_attn.model.gpt2 import build_program
from tvm_attn.targets import Peak
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.space import Space


@pytest.mark.parametrize(
    ("target", "dtype", "quant", "kv"),
    [
        ("cpu-x86-64", "float32", "none", None),
        ("cpu-znver4", "float32", "none", None),
        ("cpu-znver4", "bfloat16", "none", None),
        ("cpu-znver4", "float32", "int4", None),
        ("vulkan-generic", "float16", "int8", None),
        ("cuda-sm90", "float32", "none", None),
        ("cuda-sm90", "float16", "none", None),
        ("cuda-sm90", "bfloat16", "int4", None),
        ("cpu-znver4", "bfloat16", "none", "int8"),
        ("vulkan-generic", "float32", "none", "int8"),
    ],
)
def test_every_kernel_with_choices_has_calls(target: str, dtype: str, quant: str, kv: str | None) -> None:
    resolved = targets.read(target)
    config = replace(PRESETS["gpt2"], n_layer=1)
    program = build_program(config, layout_for(config, resolved, dtype, quant, kv))
    one_of_each = {(kernel.family, getattr(kernel, "groups", None)): kernel for kernel in program.kernels.values()}
    tuned = [kernel for kernel in one_of_each.values() if Space.of(kernel, resolved).size > 1]
    assert {kernel.family for kernel in tuned} >= {
        "linear",
        "head",
        "prefill_attention",
        "cache_write" if kv and "cpu" not in target else "linear",
    }
    assert kv or any(kernel.family == "qkv_linear" for kernel in tuned)
    for kernel in tuned:
        assert calls_of(kernel), label(kernel)


def test_a_family_without_sizes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerNorm, "family", "unknown")
    with pytest.raises(TuningError, match="unknown"):
        calls_of(LayerNorm(64, 1e-5, 8))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
def test_calls_make_cases_of_their_kernel(family: type[Kernel]) -> None:
    """Of every class of kernels, for float32 activations and for tensor cores."""
    kernels = {getattr(case.kernel, "activations", ""): case.kernel for case in islice(family.cases(), 200)}
    for kernel in kernels.values():
        for call in calls_of(kernel):
            case = call.case()
            assert case.kernel == kernel
            assert call.bytes > 0 and (call.flops is None or call.flops >= 0)


@pytest.mark.parametrize(
    "kernel",
    [
        Linear(64, 96, 8, 32, "float32"),
        Linear(64, 96, 1, 32, "bfloat16", groups=1),
        Linear(64, 96, 8, 32, "int4"),
        Head(64, 101, 8, 32, "float16"),
        PackPlain(48, 101, 32, "float32", transposed=True),
        Linear(64, 96, 8, 1, "float16", activations="float16"),
        ResidualLinear(64, 96, 8, 1, "int8", activations="bfloat16", max_groups=2),
        Head(64, 101, 1, 1, "int4", groups=1, activations="float16", epsilon=1e-5),
        PackPairs(96, 8),
        QuantizeRows(96, 8, "int4", groups=1),
    ],
    ids=label,
)
def test_bytes_are_those_of_the_tensors(kernel) -> None:
    for call in calls_of(kernel):
        case = call.case()
        stored = sum(array.nbytes for array in (*case.inputs, *case.outputs))
        if isinstance(kernel, PackPlain):
            # The columns past the vocabulary are written as well.
            assert stored == 4 * 48 * (101 + 128)
        assert call.bytes == stored


def test_work_of_the_projection_counts_what_it_writes_into_the_cache() -> None:
    kernel = QKVLinear(64, 192, 1, 32, "float32", groups=1, heads=2, context=16)
    (call,) = calls_of(kernel)
    assert call.flops == 2 * 64 * 192
    assert call.bytes == 4 * (64 + 64 * 192 + 192 + 1 + 1 + 64 + 2 * 64)


def test_work_of_attention_is_that_of_the_visible_pairs() -> None:
    calls = calls_of(PrefillAttention(2, 16, 200, 8, "float16", 0.25))
    assert [call.name for call in calls] == ["128 rows", "199 rows"]
    for call, length in zip(calls, (128, 199), strict=True):
        pairs = int(np.tri(length).sum())
        assert call.flops == 2 * pairs * (2 * 16 * 2)
        assert call.bytes == length * 32 * (4 + 4 + 2 + 2)
    calls = calls_of(DecodeAttention(2, 16, 200, 8, "float32", 0.25))
    assert [call.flops for call in calls] == [4 * 8 * 32 * length for length in (128, 199)]
    assert calls[1].case().inputs[3].tolist() == [[198] * 8]


def test_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    (call,) = calls_of(Linear(64, 96, 1, 32, "float32", groups=1))
    assert call.limit_seconds(Peak(float32_gflops=1e-9, memory_gbytes=1e9)) == pytest.approx(2 * 64 * 96)
    assert call.limit_seconds(Peak(float32_gflops=1e9, memory_gbytes=1e-9)) == pytest.approx(call.bytes)
    assert call.limit_seconds(None) is None
    # Prompts with 4-bit weights run on instructions whose peak the target file does not give.
    assert calls_of(Linear(64, 96, 8, 32, "int4"))[0].limit_seconds(Peak(1.0, 1.0)) is None
