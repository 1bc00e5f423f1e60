"""Sampling against transformers' logits processors, computed in float64."""

import functools
import math
from decimal import Decimal
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.sampling import SamplingOptions, distribution, sample, sequence_rng

GPT2_VOCAB = 50257


def reference(logits: np.ndarray, previous_ids: list[int], options: SamplingOptions) -> np.ndarray:
    """The distribution that transformers samples from, with the chain that its `_get_logits_processor` builds."""
    input_ids = torch.tensor([previous_ids], dtype=torch.int64)
    scores = torch.from_numpy(logits)[None]
    if options.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(input_ids, scores)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.effective_temperature)])
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1.0:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        warpers.append(MinPLogitsWarper(options.min_p))
    # torch does not define how it orders equal values, which would leave the edge of a nucleus among ties undefined
    # too.
    with mock.patch("torch.sort", functools.partial(torch.sort, stable=True)):
        return warpers(input_ids, scores.double()).softmax(-1)[0].numpy()


def assert_matches_reference(logits: np.ndarray, previous_ids: list[int], options: SamplingOptions) -> None:
    actual, expected = distribution(logits, previous_ids, options), reference(logits, previous_ids, options)
    assert actual.dtype == np.float64 and actual.shape == logits.shape
    np.testing.assert_array_equal(actual > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-300)


def nudged(options: SamplingOptions, factor: float) -> SamplingOptions:
    """The same options with the thresholds moved very slightly."""

    def move(value: float | None) -> float | None:
        return None if value is None else min(1.0, value * factor)

    return SamplingOptions(
        temperature=options.effective_temperature,
        top_k=options.top_k,
        top_p=move(options.top_p),
        min_p=move(options.min_p),
        repetition_penalty=options.repetition_penalty,
    )


def optional(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


rows = st.one_of(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),  # full of ties
).map(lambda values: np.array(values, np.float32))

sampling_options = st.builds(
    SamplingOptions,
    temperature=st.floats(0.05, 20),
    top_k=optional(st.integers(1, 50)),
    top_p=optional(st.floats(0.01, 1.0)),
    min_p=optional(st.floats(0.0, 1.0)),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 5.0]),
)


@given(logits=rows, options=sampling_options, data=st.data())
def test_distribution_matches_transformers(logits, options, data):
    previous_ids = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=8))
    # Exactly at a threshold, rounding decides, and differs between implementations.
    below, above = (reference(logits, previous_ids, nudged(options, f)) > 0 for f in (1 - 1e-9, 1 + 1e-9))
    assume((below == above).all())
    assert_matches_reference(logits, previous_ids, options)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0),
        SamplingOptions(temperature=0.7, top_k=50),
        SamplingOptions(temperature=0.8, top_k=50, top_p=0.95),
        SamplingOptions(top_p=0.3),
        SamplingOptions(top_p=0.95),
        SamplingOptions(temperature=5.0, top_p=0.9),  # a nucleus of most of the vocabulary
        SamplingOptions(temperature=1.5, min_p=0.05),
        SamplingOptions(top_k=3000, top_p=0.9, min_p=0.001, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_distribution_matches_transformers_on_a_large_vocabulary(options):
    rng = np.random.default_rng(3)
    logits = (3 * rng.standard_normal(GPT2_VOCAB)).astype(np.float32)
    assert_matches_reference(logits, rng.integers(0, GPT2_VOCAB, 1000).tolist(), options)


@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([1, 3, 40, 100_000]),
    temperature=st.sampled_from([0.3, 1.0, 10.0]),
    top_p=st.floats(0.01, 0.9999),
)
@settings(max_examples=40)
def test_large_nuclei_match_transformers(seed, levels, temperature, top_p):
    logits = np.random.default_rng(seed).integers(0, levels, 6000).astype(np.float32) * np.float32(10 / levels)
    options = SamplingOptions(temperature=temperature, top_p=top_p)
    below, above = (reference(logits, [], nudged(options, f)) > 0 for f in (1 - 1e-9, 1 + 1e-9))
    assume((below == above).all())
    assert_matches_reference(logits, [], options)


def test_ties_with_the_kth_token_stay():
    logits = np.array([1, 2, 2, 3, 2], np.float32)
    kept = np.flatnonzero(distribution(logits, [], SamplingOptions(top_k=2)))
    assert kept.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("vocab_size", [10, 5000])  # below and above the size that is sorted at once
def test_of_tied_tokens_at_the_edge_of_the_nucleus_the_higher_ids_stay(vocab_size):
    logits = np.tile(np.float32([1, 2]), vocab_size // 2)
    options = SamplingOptions(top_p=0.61)
    assert_matches_reference(logits, [], options)
    kept = np.flatnonzero(distribution(logits, [], options))
    share = 0.61 * (1 + math.e) / math.e * (vocab_size // 2)  # tokens of the larger logit that hold 0.61
    assert kept.tolist() == list(range(1, vocab_size, 2))[-math.ceil(share) :]


def test_the_nucleus_takes_the_larger_of_logits_that_have_the_same_probability():
    logits = np.float32([1e-45, 0])
    assert distribution(logits, [], SamplingOptions(top_p=0.25)).tolist() == [1, 0]


def test_nucleus_always_keeps_the_likeliest_token():
    probabilities = distribution(np.float32([0, 5, 1]), [], SamplingOptions(top_p=1e-6))
    assert probabilities.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "given_options, temperature",
    [
        ({}, 0.0),
        ({"repetition_penalty": 1.2}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"min_p": 0.1}, 1.0),
        ({"temperature": 0, "top_k": 5}, 0.0),
        ({"temperature": 0.3, "top_p": 0.9}, 0.3),
    ],
)
def test_default_temperature(given_options, temperature):
    assert SamplingOptions(**given_options).effective_temperature == temperature


def test_greedy_takes_the_largest_logit_and_no_random_number():
    logits = np.float32([1, 4, 4, -2])  # the first of equal ones, as torch.argmax
    rng = sequence_rng(0, 0)
    assert sample(logits, [1], SamplingOptions(), rng) == 1
    assert distribution(logits, [1], SamplingOptions()).tolist() == [0, 1, 0, 0]
    assert rng.random() == sequence_rng(0, 0).random()


def test_repetition_penalty_applies_to_greedy_decoding():
    logits = np.float32([-1, -3, -1.5])
    options = SamplingOptions(repetition_penalty=2.0)
    assert sample(logits, [0, 0], options, sequence_rng(0, 0)) == 2
    assert logits.tolist() == [-1, -3, -1.5], "the caller's logits must stay as they are"


def test_a_temperature_near_zero_approaches_greedy():
    probabilities = distribution(np.float32([1, 1.0001, -90]), [], SamplingOptions(temperature=1e-300))
    assert probabilities.tolist() == [0, 1, 0]


def test_masked_tokens_are_never_drawn():
    logits = np.float32([-np.inf, 0, -np.inf, 0])
    rng = sequence_rng(1, 0)
    assert {sample(logits, [], SamplingOptions(temperature=1.0), rng) for _ in range(100)} == {1, 3}


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0),
        SamplingOptions(temperature=2.0, top_k=6),
        SamplingOptions(top_p=0.8, repetition_penalty=1.5),
        SamplingOptions(temperature=1.3, min_p=0.1),
    ],
    ids=str,
)
def test_sampled_frequencies_follow_the_distribution(options):
    logits = np.random.default_rng(7).normal(size=12).astype(np.float32)
    draws, rng = 20_000, sequence_rng(11, 0)
    counts = np.bincount([sample(logits, [3, 5], options, rng) for _ in range(draws)], minlength=12)
    expected = draws * reference(logits, [3, 5], options)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # The 99.9 % quantile of chi-square (Wilson and Hilferty 1931). The seed is fixed, so luck plays no part.
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < quantile


class FixedRandom:
    """Stands in for a Generator whose next number is known."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


@given(logits=rows, value=st.sampled_from([0.0, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True))
def test_sample_inverts_the_cumulative_sum(logits, value):
    options = SamplingOptions(temperature=1.0)
    probabilities = reference(logits, [], options)
    token_id = sample(logits, [], options, FixedRandom(value))
    assert probabilities[:token_id].sum() <= value + 1e-12
    assert value - 1e-12 <= probabilities[: token_id + 1].sum()
    assert probabilities[token_id] > 0


def test_seeds():
    draws = {key: sequence_rng(*key).random(4).tolist() for key in [(0, 0), (0, 1), (1, 0)]}
    assert len({tuple(values) for values in draws.values()}) == 3
    assert sequence_rng(0, 1).random(4).tolist() == draws[0, 1]
    assert sequence_rng(None, 0).random() != sequence_rng(None, 0).random()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"top_k": 1}, {"top_p": 0.5, "repetition_penalty": 2.0}])
def test_logits_that_are_no_numbers_are_refused(bad, options):
    logits = np.zeros(100, np.float32)
    logits[17] = bad
    for function in (distribution, lambda *args: sample(*args, sequence_rng(0, 0))):
        with pytest.raises(GenerationError, match=r"largest of the next-token logits is (nan|inf)"):
            function(logits, [1], SamplingOptions(**options))


def test_logits_without_any_possible_token_are_refused():
    with pytest.raises(GenerationError, match="-inf"):
        distribution(np.full(4, -np.inf, np.float32), [], SamplingOptions())


@pytest.mark.parametrize(
    "name, value, legal",
    [
        ("temperature", -0.1, ">= 0"),
        ("temperature", math.nan, ">= 0"),
        ("temperature", math.inf, ">= 0"),
        ("temperature", "1", ">= 0"),
        ("top_k", 0, "at least 1"),
        ("top_k", 2.0, "at least 1"),
        ("top_k", True, "at least 1"),
        ("top_p", 0, r"\(0, 1\]"),
        ("top_p", 1.01, r"\(0, 1\]"),
        ("top_p", math.nan, r"\(0, 1\]"),
        ("min_p", -0.01, r"\[0, 1\]"),
        ("min_p", 1.5, r"\[0, 1\]"),
        ("repetition_penalty", 0.0, "> 0"),
        ("repetition_penalty", -1, "> 0"),
        ("repetition_penalty", np.float64("inf"), "> 0"),
        ("temperature", True, ">= 0"),
        ("temperature", 1j, ">= 0"),
        ("temperature", b"1", ">= 0"),
        ("temperature", np.array([0.5]), ">= 0"),
        ("temperature", np.True_, ">= 0"),
        ("temperature", Decimal("NaN"), ">= 0"),
        ("temperature", Fraction(-1, 3), ">= 0"),
        ("top_k", np.array([5]), "at least 1"),
        ("top_k", np.float32(5), "at least 1"),
        ("top_k", np.uint8(0), "at least 1"),
        ("top_p", np.float16(1.01), r"\(0, 1\]"),
    ],
)
def test_values_out_of_range(name, value, legal):
    with pytest.raises(GenerationError, match=rf"^{name} is .*; it must be .*{legal}") as caught:
        SamplingOptions(**{name: value})
    assert repr(value)[:30] in str(caught.value)


def test_numpy_scalars_are_numbers():
    options = SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(2), top_p=np.float64(1), min_p=0)
    assert np.count_nonzero(distribution(np.float32([1, 2, 3]), [], options)) == 2


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int64, np.uint64, np.array, torch.tensor])
def test_integers_of_other_libraries_are_integers(kind):
    """-np.uint8(5) is 251, so it kept all but a few."""
    options = SamplingOptions(top_k=kind(5))
    assert options == SamplingOptions(top_k=5) and type(options.top_k) is int
    logits = np.random.default_rng(0).standard_normal(2048).astype(np.float32)
    assert np.count_nonzero(distribution(logits, [], options)) == 5


@pytest.mark.parametrize(
    "value", [np.float16(0.5), np.float64(0.5), Fraction(1, 2), Decimal("0.5"), np.array(0.5), torch.tensor(0.5)]
)
def test_reals_of_other_libraries_are_floats(value):
    options = SamplingOptions(temperature=value, top_p=value, min_p=value, repetition_penalty=value)
    assert options == SamplingOptions(temperature=0.5, top_p=0.5, min_p=0.5, repetition_penalty=0.5)
    assert {type(getattr(options, name)) for name in ("temperature", "top_p", "min_p", "repetition_penalty")} == {float}


@pytest.mark.parametrize("huge", [2**70, pytest.param(10**5000, id="huge")])
def test_huge_integers(huge):
    assert SamplingOptions(top_k=huge).top_k == huge
    for options in ({"top_k": -huge}, {"temperature": -huge}, {"top_p": huge}):
        with pytest.raises(GenerationError, match="must be") as caught:
            SamplingOptions(**options)
        assert len(str(caught.value)) < 200


def test_none_is_the_default():
    assert SamplingOptions(**dict.fromkeys(SamplingOptions.__dataclass_fields__)) == SamplingOptions()
