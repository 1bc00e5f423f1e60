"""Every kernel with its GPU schedule on a Vulkan device, over its own cases, against NumPy float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tvm
import tvm_ffi

from tvm_attn import kernels, targets
from tvm_attn.compiler.pipeline import tvm_target
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Case, DecodeAttention, Kernel, LayerNorm, Linear, PrefillAttention, QKVLinear
from tvm_attn.kernels.decode_attention import random_decode_case
from tvm_attn.kernels.matmul import random_case
from tvm_attn.kernels.prefill_attention import random_prefill_case
from tvm_attn.runtime.device import obstacle
from tvm_attn.schedule import schedule
from tvm_attn.targets import GpuTarget

pytestmark = pytest.mark.skipif(obstacle("vulkan") is not None, reason=f"Vulkan: {obstacle('vulkan')}")

GENERIC = targets.resolve("vulkan")
assert isinstance(GENERIC, GpuTarget)


def is_supported(kernel: Kernel) -> bool:
    """Whether the target's storage dtypes hold everything that the kernel reads."""
    dtypes = [getattr(kernel, name, "float32") for name in ("weights", "dtype", "cache_dtype")]
    return not any(dtype.startswith("bfloat16") for dtype in dtypes)


CASES = [case for family in kernels.FAMILIES for case in family.cases() if is_supported(case.kernel)]


def compiled(kernel: Kernel, target: GpuTarget, decisions: dict[str, int]) -> Callable[..., None]:
    module = tvm.IRModule({"main": schedule(kernel, target, decisions).with_attr("global_symbol", "main")})
    function: Callable[..., None] = tvm.tirx.build(module, target=tvm_target(target))["main"]
    return function


@cache
def with_defaults(kernel: Kernel) -> Callable[..., None]:
    return compiled(kernel, GENERIC, {})


def check(case: Case, function: Callable[..., None]) -> None:
    device = tvm.vulkan(0)
    inputs = [tvm.runtime.tensor(array, device=device) for array in case.inputs]
    outputs = [tvm.runtime.tensor(array, device=device) for array in case.outputs]
    function(*inputs, *outputs)
    results = [inputs[index] for index in case.in_place] + outputs
    assert len(results) == len(case.expected)
    for result, expected in zip(results, case.expected, strict=True):
        difference = result.numpy().astype(np.float64) - expected
        assert not np.isnan(difference).any()
        assert (difference**2).sum() <= case.nmse * (expected**2).sum()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.name}")
def test_kernel_matches_float64(case: Case) -> None:
    check(case, with_defaults(case.kernel))


def case_of(kernel: Kernel) -> Case:
    return next(case for case in type(kernel).cases() if case.kernel == kernel)


def decisions() -> Iterator[tuple[Case, dict[str, int]]]:
    """Other choices than the defaults, the largest and the smallest."""
    linear = random_case(Linear(96, 128, 8, 64, "float16", activation="relu"), 5)
    yield linear, {"few_groups": 0, "group_block": 8, "k_tile": 32, "thread_rows": 8, "thread_columns": 8}
    yield linear, {"few_groups": 0, "group_block": 1, "k_tile": 8, "thread_rows": 1, "thread_columns": 2}
    yield linear, {"few_groups": 4}
    few = random_case(Linear(96, 128, 8, 64, "float16", activation="relu"), 3)
    yield few, {"few_groups": 4, "vector": 2, "column_threads": 2, "k_unroll": 1}
    one_row = case_of(QKVLinear(128, 384, 1, 32, "float16", groups=1, heads=2, context=16, cache_dtype="float16"))
    yield one_row, {"vector": 8, "column_threads": 16, "k_unroll": 8}
    yield one_row, {"vector": 1, "column_threads": 2, "k_unroll": 1}
    yield case_of(LayerNorm(768, 1e-5, 8)), {"threads": 32}
    for tiles in (3, 4, 5, 6):
        yield random_prefill_case(PrefillAttention(2, 64, 100, 8, "float16", 0.125), 77), {"tiles": tiles}
    attention = random_decode_case(DecodeAttention(2, 48, 100, 8, "float16", 0.125), (99, 0, 31, 32, 64))
    yield attention, {"threads": 32, "key_chunk": 32, "key_threads": 16}
    yield attention, {"threads": 64, "key_chunk": 256, "key_threads": 1}


@pytest.mark.parametrize(("case", "chosen"), list(decisions()), ids=lambda value: str(getattr(value, "kernel", value)))
def test_decisions_change_no_result(case: Case, chosen: dict[str, int]) -> None:
    check(case, compiled(case.kernel, GENERIC, chosen))


def test_a_larger_device() -> None:
    """A target with more threads and shared memory gets larger tiles of queries."""
    limits = {"max_num_threads": 256, "max_threads_per_block": 256, "max_shared_memory_per_block": 32768}
    larger = replace(GENERIC, tvm=GENERIC.tvm | limits, max_threads=256, shared_bytes=32768)
    case = random_prefill_case(PrefillAttention(2, 64, 200, 8, "float32", 0.125), 150)
    assert not tvm_ffi.structural_equal(schedule(case.kernel, larger), schedule(case.kernel, GENERIC))
    check(case, compiled(case.kernel, larger, {}))
    check(linear := random_case(Linear(256, 256, 8, 64, "float32"), 9), compiled(linear.kernel, larger, {}))


def test_heads_that_do_not_fit_shared_memory() -> None:
    small = replace(GENERIC, shared_bytes=1024)
    with pytest.raises(ScheduleError, match="heads of 64 do not fit 1024 bytes of shared memory"):
        schedule(PrefillAttention(2, 64, 200, 8, "float32", 0.125), small)
    with pytest.raises(ScheduleError, match="chunks of 128 keys do not fit 1024 bytes of shared memory"):
        schedule(DecodeAttention(2, 64, 200, 8, "float32", 0.125), small)
