"""The model of the decisions' effects, on spaces whose best candidate is known."""

import itertools

import numpy as np
import pytest

from tvm_attn.tuning.measurements import Measurement
from tvm_attn.tuning.space import Choice
from tvm_attn.tuning.strategy import sampled_pick

CHOICES = [Choice(name, tuple(range(4)), 0) for name in "abcdef"]


def _time(decisions: dict[str, int], best: dict[str, int], rng: np.random.Generator) -> float:
    apart = sum(abs(decisions[name] - best[name]) for name in best)
    return float(np.exp(0.15 * apart + rng.normal(0, 0.02)))


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_of_4096_candidates_in_60(seed: int) -> None:
    rng = np.random.default_rng(seed)
    best = {choice.name: int(rng.integers(4)) for choice in CHOICES}
    known: list[Measurement] = []
    for _ in range(60):
        pick = sampled_pick(known, rng)
        decisions = {choice.name: choice.candidates[pick(choice, range(4))] for choice in CHOICES}
        known.append(Measurement(decisions, (_time(decisions, best, rng),)))
    found = min(known, key=lambda entry: entry.mean)
    assert sum(abs(found.decisions[name] - best[name]) for name in best) <= 1
    # A random sample of this size comes so near in one of a thousand searches.
    apart = [sum(map(abs, entry)) for entry in itertools.product(range(-3, 4), repeat=6)]
    assert sum(value <= 1 for value in apart) < 20


def test_branches_that_failed_come_later() -> None:
    rng = np.random.default_rng(0)
    choice = Choice("a", (1, 2), 1)
    known = [Measurement({"a": 1}, None, error="crashed")] * 5 + [Measurement({"a": 2}, (1.0,))] * 5
    picks = [sampled_pick(known, rng)(choice, [0, 1]) for _ in range(50)]
    assert picks.count(1) > 45


def test_without_measurements_every_branch_is_possible() -> None:
    rng = np.random.default_rng(0)
    assert {sampled_pick([], rng)(CHOICES[0], [0, 2, 3]) for _ in range(100)} == {0, 2, 3}
