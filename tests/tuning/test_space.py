"""Decision spaces, and the way through them."""

import itertools
import random
from collections.abc import Sequence

import pytest
import tvm_ffi

from tvm_attn import targets
from tvm_attn.kernels import LayerNorm, Linear
from tvm_attn.schedule import schedule
from tvm_attn.tuning.space import Candidate, Choice, Explorer, Space

TARGET = targets.detect_cpu()
LINEAR = Linear(32, 64, 8, 32, "float32")


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.of(LINEAR, TARGET)


def explore(space: Space, seed: int = 0) -> list[Candidate]:
    """All candidates, in an order that depends on the seed."""
    explorer, generator = Explorer(space), random.Random(seed)

    def pick(_: Choice, branches: Sequence[int]) -> int:
        return generator.choice(branches)

    return list(iter(lambda: explorer.next(pick), None))


@pytest.fixture(scope="module")
def candidates(space: Space) -> list[Candidate]:
    return explore(space)


def test_candidates_are_all_distinct_functions(space: Space, candidates: list[Candidate]) -> None:
    assert [choice.name for choice in space.choices] == ["group_block", "prefetch_bytes", "k_unroll"]
    everything = itertools.product(*(range(len(choice.candidates)) for choice in space.choices))
    assert sorted(candidate.indices for candidate in candidates) == sorted(everything)
    assert len({tvm_ffi.structural_hash(candidate.function) for candidate in candidates}) == len(candidates)


def test_the_candidate_with_given_decisions(space: Space, candidates: list[Candidate]) -> None:
    default = space.at({})
    assert default is not None
    assert default.indices == space.default
    assert tvm_ffi.structural_equal(default.function, schedule(LINEAR, TARGET))
    found = space.at(candidates[-1].decisions)
    assert found is not None
    assert found.indices == candidates[-1].indices
    assert space.at({"k_unroll": 3}) is None


def test_what_was_taken_does_not_come_again(space: Space, candidates: list[Candidate]) -> None:
    explorer = Explorer(space)
    assert explorer.take(candidates[3])
    assert not explorer.take(candidates[3])
    rest = list(iter(lambda: explorer.next(lambda _, branches: branches[-1]), None))
    assert {entry.indices for entry in rest} == {entry.indices for entry in candidates} - {candidates[3].indices}


def test_decisions_without_a_difference_are_one_candidate() -> None:
    # 33 is odd: nothing but an unroll by 1 divides it.
    space = Space.of(Linear(33, 32, 1, 32, "float32", groups=1), TARGET)
    assert space.size > 1
    prefetch, unroll = space.choices
    assert (prefetch.name, unroll.name) == ("prefetch_bytes", "k_unroll")
    assert sorted(candidate.indices[0] for candidate in explore(space)) == list(range(len(prefetch.candidates)))


def test_a_kernel_without_choices() -> None:
    space = Space.of(LayerNorm(64, 1e-5, 8), TARGET)
    assert space.size == 1
    assert space.at({}) is not None
