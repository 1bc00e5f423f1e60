"""Choosing the next token from one row of logits.

The filters and their order are those of Hugging Face transformers' `generate`: repetition penalty, temperature, top-k,
top-p, min-p, draw. A bias for single tokens comes before all of them, and the presence and frequency penalties of
OpenAI's API after the repetition penalty, as in vLLM. Only the work is ordered differently: the candidates are cut down
before anything is exponentiated or sorted. The filters allow that because temperature keeps the order of the logits.

Arithmetic is float64 from the temperature on; bias and penalties are applied in the logits' float32, so that greedy
decoding breaks near-ties as transformers does.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import GenerationError, shorten
from tvm_attn.numbers import integer, real

FloatArray = npt.NDArray[np.floating[Any]]
IdArray = npt.NDArray[np.integer[Any]]

# Below this many candidates, sorting is cheaper than narrowing them down further.
_SORTED_AT_ONCE = 1024
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen. Every field defaults to None, which leaves its filter out.

    Numbers of other libraries, such as NumPy's, are accepted and stored as Python's.

    temperature: divides the logits, >= 0; 0 is greedy decoding. None means greedy, or 1.0 as soon as one of `top_k`,
        `top_p` and `min_p` is given.
    top_k: keep the k most likely tokens, >= 1, and any that tie with the k-th of them (Fan et al. 2018).
    top_p: keep the fewest most likely tokens whose probabilities reach p, in (0, 1] (Holtzman et al. 2020). If the cut
        falls among equally likely tokens, the higher ids stay (transformers leaves that to an unstable sort).
    min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1] (Nguyen et al. 2024).
    repetition_penalty: divides positive logits of tokens in the prompt or already generated, and multiplies negative
        ones, > 0; 1.0 does nothing (Keskar et al. 2019).
    presence_penalty: subtracted from the logit of every token that has been generated, the prompt's not counted; 0.0
        does nothing, a negative one is added (OpenAI's API reference, `completions`).
    frequency_penalty: the same, once for each time that the token has been generated.
    logit_bias: numbers that are added to the logits of single ids, {id: number}; -inf bans a token. Ids outside the
        vocabulary are refused when a sequence starts.

    Raises GenerationError for a value outside its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) is None:
                self._set(each.name, {} if each.default is MISSING else each.default)
        if self.temperature is not None:
            legal = "a number >= 0 (0 is greedy)"
            self._set("temperature", real("temperature", self.temperature, legal, 0.0, _LARGEST))
        if self.top_k is not None:
            self._set("top_k", integer("top_k", self.top_k, 1))
        if self.top_p is not None:
            self._set("top_p", real("top_p", self.top_p, "a number in (0, 1]", 0.0, 1.0, open_low=True))
        if self.min_p is not None:
            self._set("min_p", real("min_p", self.min_p, "a number in [0, 1]", 0.0, 1.0))
        legal, penalty = "a number > 0 (1 is none)", self.repetition_penalty
        self._set("repetition_penalty", real("repetition_penalty", penalty, legal, 0.0, _LARGEST, open_low=True))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, real(name, getattr(self, name), "a finite number", -_LARGEST, _LARGEST))
        self._set("logit_bias", _checked_bias(self.logit_bias))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    @property
    def effective_temperature(self) -> float:
        """The temperature with its default filled in; 0.0 means greedy."""
        if self.temperature is not None:
            return self.temperature
        filtered = any(value is not None for value in (self.top_k, self.top_p, self.min_p))
        return 1.0 if filtered else 0.0

    @property
    def is_plain_argmax(self) -> bool:
        """Whether the choice is the largest logit, which a device can find without copying the logits to the host."""
        return self.effective_temperature == 0.0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty may change which logit is the largest."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


def _checked_bias(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise GenerationError(f"logit_bias is {shorten(given)}; it must be a mapping of token ids to numbers")
    legal = "a number, or -inf to ban the token"
    return {
        integer("a token id of logit_bias", token_id, 0): real("a logit_bias", bias, legal, -np.inf, _LARGEST)
        for token_id, bias in given.items()
    }


def sequence_rng(seed: int | None, index: int) -> np.random.Generator:
    """The random generator of sequence `index` of a request.

    It depends only on `(seed, index)`: not on the other sequences, nor on the order in which a batch advances. `seed`
    None takes fresh entropy from the operating system.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))


class Random(Protocol):
    """Where `sample` takes a random number from; NumPy's generators are such."""

    def random(self) -> float:
        """The next number, in [0, 1)."""


class Numbers:
    """The random numbers of a sequence, which can be looked at before they are taken.

    Args:
        rng: the source; nobody else may use it.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._seen: deque[float] = deque()

    def random(self) -> float:
        """Takes the next number."""
        return self._seen.popleft() if self._seen else self._rng.random()

    def peek(self, ahead: int) -> Random:
        """A source of the number that comes after `ahead` others; it stays where it is."""
        while len(self._seen) <= ahead:
            self._seen.append(self._rng.random())
        return _Constant(self._seen[ahead])


@dataclass(frozen=True)
class _Constant:
    number: float

    def random(self) -> float:
        return self.number


def distribution(
    logits: FloatArray, previous_ids: Sequence[int] | IdArray, options: SamplingOptions, prompt_length: int = 0
) -> npt.NDArray[np.float64]:
    """The probabilities (V,) with which `sample` draws, float64 and summing to 1; one-hot if decoding is greedy.

    logits: (V,) float32. previous_ids: ids of the prompt, `prompt_length` of them, and of generated tokens, read only
    for penalties.
    Raises GenerationError for logits that contain NaN or +inf, or only -inf.
    """
    probabilities = np.zeros(len(logits))
    scores = _penalized(logits, previous_ids, options, prompt_length)
    peak = _finite_peak(scores)
    if options.effective_temperature == 0.0:
        probabilities[scores.argmax()] = 1.0
    else:
        ids, weights = _candidates(scores, peak, options)
        probabilities[ids] = weights / weights.sum()
    return probabilities


def sample(
    logits: FloatArray,
    previous_ids: Sequence[int] | IdArray,
    options: SamplingOptions,
    rng: Random,
    prompt_length: int = 0,
) -> int:
    """Draw one token id from `distribution(...)` of the same arguments by inverting its cumulative sum.

    Takes one number from `rng`, or none if decoding is greedy. Arguments and errors as in `distribution`.
    """
    scores = _penalized(logits, previous_ids, options, prompt_length)
    peak = _finite_peak(scores)
    if options.effective_temperature == 0.0:
        return int(scores.argmax())
    ids, weights = _candidates(scores, peak, options)
    cumulative = weights.cumsum()
    # random() < 1, so the point is below the total and the first sum above it belongs to a weight that is not 0.
    return int(ids[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def _penalized(
    logits: FloatArray, previous_ids: Sequence[int] | IdArray, options: SamplingOptions, prompt_length: int
) -> FloatArray:
    """The logits (V,) after bias and penalties, each applied once to each id however often it occurred."""
    if not options.changes_logits:
        return logits
    scores, ids = logits.copy(), np.asarray(previous_ids, np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        for token_id, bias in options.logit_bias.items():
            scores[token_id] += np.float32(bias)
        if options.repetition_penalty != 1.0:
            seen, penalty = scores[ids], options.repetition_penalty
            scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
        if options.presence_penalty or options.frequency_penalty:
            generated, counts = np.unique(ids[prompt_length:], return_counts=True)
            scores[generated] -= (options.presence_penalty + options.frequency_penalty * counts).astype(scores.dtype)
    return scores


NOT_NUMBERS = (
    "so they are not numbers: the artifact's dtype does not hold this model; verify the artifact, or build it with "
    "--dtype bfloat16 or float32"
)
"""What a message says about logits with NaN or infinity."""


def _finite_peak(scores: FloatArray) -> float:
    """The largest score, or NaN if any score is NaN."""
    peak = float(scores.max())
    if not np.isfinite(peak):
        raise GenerationError(f"the largest of the next-token logits is {peak}, {NOT_NUMBERS}")
    return peak


def _candidates(
    scores: FloatArray, peak: float, options: SamplingOptions
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The ids (K,) that survive the filters, ascending, and their weights (K,): probabilities times a constant."""
    ids = np.arange(len(scores))
    if options.top_k is not None and options.top_k < len(scores):
        floor = np.partition(scores, -options.top_k)[-options.top_k]
        ids = np.flatnonzero(scores >= floor)
        scores = scores[ids]
    # A temperature near 0 sends all but the peak to exp(-inf) = 0, which is its limit.
    with np.errstate(over="ignore"):
        weights = np.exp((scores.astype(np.float64) - peak) / options.effective_temperature)
    if options.top_p is not None and options.top_p < 1.0:
        kept = _nucleus(scores, weights, options.top_p)
        ids, weights = ids[kept], weights[kept]
    if options.min_p is not None:
        # The largest weight is exp(0) = 1, so the bound needs no normalization.
        kept = np.flatnonzero(weights >= options.min_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _nucleus(scores: FloatArray, weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """Ascending indices of the fewest largest scores whose weights hold `top_p` of the total; at least one.

    Indices are ordered by score, as different scores may round to one weight; of equal scores the later index is first.
    """
    total = weights.sum()
    target = top_p * total
    # Scores are certainly outside if their weights could not make up the other 1 - top_p even if all were like them.
    rest = np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights))
    # Halve the range that holds the last score of the nucleus, until it is short enough to sort.
    before = 0.0  # weight of the scores above the range
    while len(rest) > _SORTED_AT_ONCE:
        in_range = scores[rest]
        is_upper = in_range >= np.partition(in_range, len(rest) // 2)[len(rest) // 2]
        if is_upper.all():  # half of the range or more are ties for its lowest place
            break
        upper_weight = weights[rest[is_upper]].sum()
        if before + upper_weight < target:
            before += upper_weight
            rest = rest[~is_upper]
        else:
            rest = rest[is_upper]
    descending = rest[np.argsort(scores[rest], kind="stable")[::-1]]
    # A token stays while those before it weigh less than the target.
    count = int(np.searchsorted(before + weights[descending].cumsum(), target, side="left"))
    last = descending[min(count, len(descending) - 1)]
    kept = np.flatnonzero(scores >= scores[last])
    return kept[(scores[kept] > scores[last]) | (kept >= last)]
