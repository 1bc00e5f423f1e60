"""Decision spaces, and how decisions travel on a trace."""

import itertools

import pytest
import tvm_ffi
from tvm.s_tir import meta_schedule as ms

from tvm_attn import targets
from tvm_attn.kernels import LayerNorm, Linear
from tvm_attn.schedule import schedule
from tvm_attn.tuning.space import Candidate, Space, indices_of, to_schedule

TARGET = targets.detect_cpu()
LINEAR = Linear(32, 64, 8, 32, "float32")


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.of(LINEAR, TARGET)


@pytest.fixture(scope="module")
def candidates(space: Space) -> list[Candidate]:
    return space.candidates(space.size)


def test_candidates_are_all_distinct_functions_and_the_defaults_come_first(
    space: Space, candidates: list[Candidate]
) -> None:
    assert [choice.name for choice in space.choices] == ["group_block", "prefetch_bytes", "k_unroll"]
    assert candidates[0].indices == space.default
    assert tvm_ffi.structural_equal(candidates[0].function, schedule(LINEAR, TARGET))
    everything = itertools.product(*(range(len(choice.candidates)) for choice in space.choices))
    assert sorted(candidate.indices for candidate in candidates) == sorted(everything)
    assert len({tvm_ffi.structural_hash(candidate.function) for candidate in candidates}) == len(candidates)


def test_decisions_without_a_difference_are_one_candidate() -> None:
    # 33 is odd: nothing but an unroll by 1 divides it.
    space = Space.of(Linear(33, 32, 1, 32, "float32", groups=1), TARGET)
    assert space.size > 1
    prefetch, unroll = space.choices
    assert (prefetch.name, unroll.name) == ("prefetch_bytes", "k_unroll")
    candidates = space.candidates(space.size)
    assert sorted(candidate.indices[0] for candidate in candidates) == list(range(len(prefetch.candidates)))


def test_a_larger_sample_adds_to_a_smaller_one(space: Space) -> None:
    small, large = space.candidates(3), space.candidates(7)
    assert len(small) == 3
    assert [candidate.indices for candidate in small] == [candidate.indices for candidate in large][:3]


def test_a_kernel_without_choices() -> None:
    assert Space.of(LayerNorm(64, 1e-5, 8), TARGET).size == 1


@pytest.mark.parametrize("position", [0, -1])
def test_a_trace_carries_the_decisions_through_the_database(
    space: Space, candidates: list[Candidate], position: int
) -> None:
    candidate = candidates[position]
    made = to_schedule(candidate)
    assert indices_of(made.trace) == candidate.indices
    workload = ms.database.Workload(made.mod)
    stored = ms.database.TuningRecord(made.trace, workload, [1.0]).as_json()
    assert indices_of(ms.database.TuningRecord.from_json(stored, workload).trace) == candidate.indices
