"""Limits of this machine, and what they allow."""

import dataclasses

from tvm_attn import targets
from tvm_attn.benchmark.counts import Work
from tvm_attn.benchmark.probe import Limits, measure_limits
from tvm_attn.runtime.machine import thread_count

LIMITS = Limits(
    threads=2, float32_gflops=200.0, read_gbytes=40.0, bfloat16_gflops=400.0, int8_gops=None, buffer_bytes=1 << 30
)


def test_limits_are_positive_and_the_buffer_is_read() -> None:
    target = targets.detect_cpu()
    limits = measure_limits(target, thread_count(None), max_buffer_bytes=1 << 24)
    assert limits.float32_gflops > 0
    assert limits.read_gbytes > 0
    assert 0 < limits.buffer_bytes <= 1 << 24
    assert (limits.bfloat16_gflops is not None) == ("avx512_bf16" in target.features)
    assert (limits.int8_gops is not None) == ("avx512_vnni" in target.features)
    for value in (limits.bfloat16_gflops, limits.int8_gops):
        assert value is None or value > 0


def test_a_target_without_dot_products_has_no_such_limits() -> None:
    target = dataclasses.replace(targets.detect_cpu(), features=())
    limits = measure_limits(target, thread_count(None), max_buffer_bytes=1 << 20)
    assert limits.bfloat16_gflops is None and limits.int8_gops is None


def test_the_roofline_takes_the_longer_time() -> None:
    assert LIMITS.bound(Work(100 * 10**9, 100 * 10**9, 10**9)) == (1.0, "compute")
    assert LIMITS.bound(Work(10**9, 0, 80 * 10**9)) == (2.0, "memory")


def test_products_have_their_own_limit_and_attention_is_bfloat16_or_float32() -> None:
    work = Work(400 * 10**9, 200 * 10**9, 1)
    assert LIMITS.bound(work, "bfloat16") == (1.5, "compute")
    assert dataclasses.replace(LIMITS, int8_gops=800.0).bound(work, "int8") == (1.5, "compute")
    assert LIMITS.bound(work, "int8") == (3.0, "compute")  # not measured: float32's


def test_the_best_of_two_measurements_is_kept() -> None:
    other = dataclasses.replace(LIMITS, float32_gflops=190.0, read_gbytes=45.0, bfloat16_gflops=None, int8_gops=900.0)
    best = LIMITS.best(other)
    assert (best.float32_gflops, best.read_gbytes) == (200.0, 45.0)
    assert (best.bfloat16_gflops, best.int8_gops) == (400.0, 900.0)
