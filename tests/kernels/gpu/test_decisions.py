"""GPU schedules with decisions other than the defaults, on a Vulkan device, against NumPy float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tvm
import tvm_ffi

from tests.kernels import devices
from tests.kernels.devices import case_of
from tvm_attn import targets
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import (
    Case,
    DecodeAttention,
    LayerNorm,
    Linear,
    PrefillAttention,
    QKVLinear,
    decode_attention,
    linear,
    prefill_attention,
)
from tvm_attn.runtime.devices import device_class
from tvm_attn.schedule import schedule
from tvm_attn.targets import GpuTarget

OBSTACLE = device_class("vulkan").obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Vulkan: {OBSTACLE}")

GENERIC = targets.resolve("vulkan")
assert isinstance(GENERIC, GpuTarget)


def check(case: Case, target: GpuTarget, decisions: dict[str, int]) -> None:
    function = devices.build(schedule(case.kernel, target, decisions), target)
    devices.assert_close(case, devices.run(function, case, tvm.vulkan(0)))


def decisions() -> Iterator[tuple[Case, dict[str, int]]]:
    """Decisions other than the defaults: the largest and the smallest."""
    many = linear.random_case(Linear(96, 128, 8, 64, "float16", activation="relu"), 5)
    yield many, {"few_groups": 0, "group_block": 8, "k_tile": 32, "thread_rows": 8, "thread_columns": 8}
    yield many, {"few_groups": 0, "group_block": 1, "k_tile": 8, "thread_rows": 1, "thread_columns": 2}
    yield many, {"few_groups": 4}
    few = linear.random_case(Linear(96, 128, 8, 64, "float16", activation="relu"), 3)
    yield few, {"few_groups": 4, "vector": 2, "column_threads": 2, "k_unroll": 1}
    one_row = case_of(QKVLinear(128, 384, 1, 32, "float16", groups=1, heads=2, context=16, cache_dtype="float16"))
    yield one_row, {"vector": 8, "column_threads": 16, "k_unroll": 8}
    yield one_row, {"vector": 1, "column_threads": 2, "k_unroll": 1}
    yield case_of(LayerNorm(768, 1e-5, 8)), {"threads": 32}
    for tiles in (3, 4, 5, 6):
        yield prefill_attention.random_case(PrefillAttention(2, 64, 100, 8, "float16", 0.125), 77), {"tiles": tiles}
    attention = decode_attention.random_case(DecodeAttention(2, 48, 100, 8, "float16", 0.125), (99, 0, 31, 32, 64))
    yield attention, {"threads": 32, "key_chunk": 32, "key_threads": 16}
    yield attention, {"threads": 64, "key_chunk": 256, "key_threads": 1}


@pytest.mark.parametrize(("case", "chosen"), list(decisions()), ids=lambda value: str(getattr(value, "kernel", value)))
def test_decisions_change_no_result(case: Case, chosen: dict[str, int]) -> None:
    check(case, GENERIC, chosen)


def test_a_larger_device() -> None:
    """A target with more threads and shared memory gets larger tiles of queries."""
    limits = {"max_num_threads": 256, "max_threads_per_block": 256, "max_shared_memory_per_block": 32768}
    larger = replace(GENERIC, tvm=GENERIC.tvm | limits, max_threads=256, shared_bytes=32768)
    case = prefill_attention.random_case(PrefillAttention(2, 64, 200, 8, "float32", 0.125), 150)
    assert not tvm_ffi.structural_equal(schedule(case.kernel, larger), schedule(case.kernel, GENERIC))
    check(case, larger, {})
    check(linear.random_case(Linear(256, 256, 8, 64, "float32"), 9), larger, {})


def test_heads_that_do_not_fit_shared_memory() -> None:
    small = replace(GENERIC, shared_bytes=1024)
    with pytest.raises(ScheduleError, match="heads of 64 do not fit 1024 bytes of shared memory"):
        schedule(PrefillAttention(2, 64, 200, 8, "float32", 0.125), small)
    with pytest.raises(ScheduleError, match="chunks of 128 keys do not fit 1024 bytes of shared memory"):
        schedule(DecodeAttention(2, 64, 200, 8, "float32", 0.125), small)
