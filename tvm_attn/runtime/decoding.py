"""What to generate for a prompt, what came out, and the state of a sequence in between."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import GenerationError, shorten
from tvm_attn.numbers import integer, is_bool
from tvm_attn.runtime.logprobs import MOST_LOGPROBS, RowLogprobs, TokenLogprobs
from tvm_attn.runtime.sampling import NOT_NUMBERS, Numbers, SamplingOptions, sample, sequence_rng

if TYPE_CHECKING:
    from tvm_attn.config import GPT2Config
    from tvm_attn.runtime.speculation import Guesser
    from tvm_attn.runtime.tokenizer import Tokenizer

Int32Array = npt.NDArray[np.int32]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
Speculate: TypeAlias = Literal["auto", "draft", "prompt", "off"]
"""How tokens are guessed; see `tvm_attn.runtime.speculation`."""

_LARGEST_SEED = (1 << 1024) - 1
_MOST_COMPLETIONS = 1 << 16
_MOST_STOPS = 1 << 20


class Logits(Protocol):
    """Next-token logits on the device, one row per sequence."""

    def numpy(self) -> npt.NDArray[np.float32]:
        """The logits (B, V), float32, copied to the host."""

    def argmax(self) -> Int32Array:
        """The id of the largest logit of each row, (B,) int32, found on the device; -1 for a row with NaN."""

    def logprobs(self, token_ids: Int32Array, count: int) -> RowLogprobs:
        """Log-probabilities of a token for each row, (B,) int32, and of the `count` best, found on the device."""


class Engine(Protocol):
    """A compiled model with a KV cache of `max_batch` slots. One thread makes all its calls."""

    @property
    def config(self) -> "GPT2Config":
        """The model's configuration."""

    @property
    def max_batch(self) -> int:
        """Number of KV-cache slots, and so the most sequences in one call."""

    @property
    def max_prefill_rows(self) -> int:
        """The most tokens of one call of `prefill`, at least a context."""

    @property
    def prefill_chunk(self) -> int:
        """Tokens of prompts that are computed between two steps of running sequences."""

    @property
    def writes(self) -> int:
        """Number of calls so far that may have changed the cache."""

    @property
    def verified_rows(self) -> int:
        """How many tokens of one sequence `decode` takes, with the results of one token a call; 1 if no more."""

    @property
    def draft(self) -> "Engine | None":
        """The model with fewer bits, on the same cache, if it has been loaded."""

    def post(self, function: Callable[[], object]) -> None:
        """Have the engine's thread call a function after earlier ones, without waiting for it."""

    def prefill(self, prompts: Sequence[Int32Array], slots: Sequence[int], starts: Sequence[int]) -> Logits:
        """Run tokens, each (T_b,) int32, into positions starts[b].. of their slots; the logits of each last token."""

    def score(
        self,
        prompts: Sequence[Int32Array],
        slots: Sequence[int],
        starts: Sequence[int],
        targets: Sequence[Int32Array],
        count: int = 0,
    ) -> list[RowLogprobs]:
        """As `prefill`, but gives log-probabilities of the token after each, targets[b] (T_b,) int32."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot's cache to another slot."""

    def decode(self, token_ids: Int32Array, slots: Int32Array, positions: Int32Array, *, ahead: bool = False) -> Logits:
        """Run one token per row, each argument (B,) int32: token b is written at `positions[b]` of its slot.

        The rows are of different slots, or up to `verified_rows` of them are at consecutive positions of one slot.

        With `ahead`, only the logits' argmax is wanted, and the next call will probably be for these tokens.
        """


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """What to generate: `SamplingOptions`, and when to stop.

    max_new_tokens: most tokens to generate, >= 1. The context also ends a sequence: with n_positions P, a prompt of T
        tokens leaves P - T + 1, as the last token is never fed back.
    stop: strings that end a sequence as soon as one appears in the generated text; the text is cut before it.
    stop_token_ids: ids that end a sequence and are not part of its text; None means all of the model's `eos_token_ids`.
    seed: makes sampling repeatable, >= 0. Each sequence has its own random stream, derived from the seed and the
        sequence's index in the request. None takes fresh entropy.
    min_new_tokens: no stop token is chosen before this many tokens, >= 0; stop strings count at once, as in
        transformers.
    n: completions of each prompt, >= 1.
    logprobs: 0 .. 20: the log-probability of each generated token is returned, and those of so many of the most likely
        tokens in its place; None returns none. They are of the model's own distribution, before temperature, penalties
        and filters; see `tvm_attn.runtime.logprobs`.
    prompt_logprobs: whether those of the prompt's tokens are returned too, as many for each as `logprobs` says. The
        prompt is computed in full, even if a KV-cache slot holds its beginning.
    speculate: how tokens are guessed, so that one call of the model computes several: "prompt" looks them up in the
        sequence, "draft" asks the artifact's draft (`build(draft="int4")`), "off" does not guess, and "auto" takes the
        draft if there is one, on devices that can. No choice changes the result.

    Raises GenerationError for a value outside its range.
    """

    max_new_tokens: int = 128
    stop: str | Collection[str] = ()
    stop_token_ids: int | Collection[int] | None = None
    seed: int | None = None
    min_new_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    speculate: Speculate = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("max_new_tokens", integer("max_new_tokens", self.max_new_tokens, 1))
        self._set("min_new_tokens", integer("min_new_tokens", self.min_new_tokens, 0))
        if self.min_new_tokens > self.max_new_tokens:
            smaller = f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}"
            raise GenerationError(f"{smaller}; it must be at most max_new_tokens")
        self._set("n", integer("n", self.n, 1, _MOST_COMPLETIONS))
        if self.logprobs is not None:
            self._set("logprobs", integer("logprobs", self.logprobs, 0, MOST_LOGPROBS))
        if not is_bool(self.prompt_logprobs):
            raise GenerationError(f"prompt_logprobs is {shorten(self.prompt_logprobs)}; it must be True or False")
        self._set("prompt_logprobs", bool(self.prompt_logprobs))
        if self.speculate not in get_args(Speculate):
            choices = ", ".join(get_args(Speculate))
            raise GenerationError(f"speculate is {shorten(self.speculate)}; it must be one of {choices}")
        if self.seed is not None:
            self._set("seed", integer("seed", self.seed, 0, _LARGEST_SEED))
        self._set("stop", tuple(_stop_string(stop) for stop in _several("stop", self.stop)))
        if self.stop_token_ids is not None:
            ids = _several("stop_token_ids", self.stop_token_ids)
            self._set("stop_token_ids", frozenset(integer("a stop token id", token_id, 0) for token_id in ids))

    def stop_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """`stop_token_ids` as a set, with the model's `eos_token_ids` as the default."""
        ids = eos_token_ids if self.stop_token_ids is None else self.stop_token_ids
        return frozenset(_several("stop_token_ids", ids))


def _several(name: str, value: Any) -> Collection[Any]:
    """A collection unchanged; a single value as a collection of one."""
    if isinstance(value, str | bytes) or not isinstance(value, Collection) or getattr(value, "ndim", 1) == 0:
        return (value,)
    if isinstance(value, Mapping) or len(value) > _MOST_STOPS:
        raise GenerationError(f"{name} is {shorten(value)}; pass one, or a list of at most {_MOST_STOPS}")
    return value


def _stop_string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise GenerationError(f"stop holds {shorten(value)}; a stop string must be text of at least one character")
    return str(value)


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt, without the prompt.

    text: the decoded tokens, without special tokens, cut before the stop string; "" without a tokenizer.
    token_ids: the generated ids; the last may be the stop token, or the token that completed the stop string.
    finish_reason: "stop" after a stop token or string, "length" at `max_new_tokens` or the end of the context,
        "cancelled" if the request was cancelled before: then this is what it had by then.
    logprobs: of each of `token_ids`, if they were asked for.
    prompt_logprobs: of each token of the prompt, if they were asked for; None for the first, which has none before it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass
class GenerationStats:
    """Counts and seconds of one request, filled in while it runs; choosing tokens counts as part of each step.

    Every sequence's first token comes from its prefill, so `decode_tokens` is the number of generated tokens minus the
    number of sequences. `prefill_seconds` and `decode_seconds` are those of the steps that it had a part in, alone or
    with other requests. `first_token_seconds` runs from the start to the request's first token.

    prompt_tokens: tokens of the prompts that have been read.
    reused_tokens: those of them that were not computed, because a KV-cache slot held them already.
    guessed_tokens: tokens that were guessed; see `tvm_attn.runtime.speculation`.
    accepted_tokens: those of them that are part of a completion.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    guessed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Computed prompt tokens per second; None before the first prefill."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decoded tokens per second, over all sequences; None before the first decode step."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None


class Choices:
    """Tokens for rows of logits; copies no more of them to the host than they need.

    Args:
        logits: the logits.
    """

    def __init__(self, logits: Logits) -> None:
        self._logits = logits
        self._largest: list[int] | None = None
        self._rows: npt.NDArray[np.float32] | None = None

    def token(self, row: int, sequence: "TokenSequence", ahead: int | None = None) -> int:
        """The token that a sequence takes from a row; -1 for logits with NaN. `ahead` and errors as in
        `TokenSequence.choose`."""
        if sequence.chooses_largest(ahead or 0):
            if self._largest is None:
                self._largest = self._logits.argmax().tolist()
            return self._largest[row]
        if self._rows is None:
            self._rows = self._logits.numpy()
        return sequence.choose(self._rows[row], ahead)


class StopScanner:
    """Finds stop strings in text that arrives in pieces.

    The stop string that is completed first cuts the text, so the cut does not depend on how the text was split into
    pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """Take a piece; return the text before any possible stop string. After a hit nothing more is returned."""
        if self.hit:
            return ""
        text = self._held + piece
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.hit = True
            return text[: min(matches)[1]]
        cut = len(text) - self._possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, once nothing more can follow."""
        return "" if self.hit else self._held

    def _possible_start(self, text: str) -> int:
        """Length of the longest suffix of `text` that a stop string could begin with."""
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class TokenSequence:
    """One sequence: its prompt and options, its ids so far, its place in the cache, and the text that is final.

    Attributes:
        prompt: (T,) int32.
        stats: of its request, which other sequences may share.
        ids: (T + most new tokens,) int32, of which the first `length` are valid.
        slot: its KV-cache slot, or -1.
        guesser: guesses its next tokens.
        cached: positions of the slot that hold its prompt.
        finish_reason: set when it ends, unless by an error.
        error: why it failed.
        logprobs: of the generated tokens, if they are wanted.
        prompt_logprobs: of the prompt's tokens so far, if they are wanted.
    """

    def __init__(
        self,
        prompt: Int32Array,
        options: GenerationOptions,
        config: "GPT2Config",
        tokenizer: "Tokenizer | None",
        index: int,
        stats: GenerationStats,
    ) -> None:
        limit = min(len(prompt) + options.max_new_tokens, config.n_positions + 1)
        self.ids = np.empty(limit, np.int32)
        self.ids[: len(prompt)] = prompt
        self.prompt = self.ids[: len(prompt)]
        self.length = len(prompt)
        self.options, self.stats = options, stats
        self.slot, self.cached = -1, 0
        self.guesser: Guesser | None = None
        self.pieces: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.begin = perf_counter()
        if (largest := max(options.logit_bias, default=0)) >= config.vocab_size:
            message = f"logit_bias holds the token id {largest}; the model's vocabulary is 0..{config.vocab_size - 1}"
            raise GenerationError(message)
        self._numbers = Numbers(sequence_rng(options.seed, index))
        self._stop_token_ids = options.stop_ids(config.eos_token_ids)
        self._vocabulary = config.vocab_size
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder()
        self._scanner = StopScanner(tuple(options.stop))
        # Until the sequence is that long, its stop tokens are not chosen.
        self._shortest = len(prompt) + options.min_new_tokens if self._stop_token_ids else 0
        self._is_plain_argmax = options.is_plain_argmax

    def chooses_largest(self, ahead: int = 0) -> bool:
        """Whether the next token, or the one that comes after `ahead` others, is that of the largest logit."""
        return self._is_plain_argmax and self.length + ahead >= self._shortest

    @property
    def room(self) -> int:
        """How many tokens can come after the next one."""
        return len(self.ids) - self.length - 1

    @property
    def takes_argmax(self) -> bool:
        """Whether the index of the largest logit is all that is wanted of the logits."""
        return self.chooses_largest() and self.options.logprobs is None

    @property
    def unscored(self) -> int:
        """Tokens of the prompt that are still to be computed with the log-probabilities of those after them."""
        return len(self.prompt) - 1 - self.cached if self.options.prompt_logprobs else 0

    def add_scores(self, scores: RowLogprobs) -> None:
        """Adds log-probabilities of the next tokens of the prompt, as many as there are rows.

        Raises:
            GenerationError: the logits are not numbers.
        """
        scores.require_numbers()
        first = len(self.prompt_logprobs)
        ids = self.prompt[first : first + len(scores.chosen)].tolist()
        count = self.options.logprobs or 0
        self.prompt_logprobs += [scores.token(row, token_id, count) for row, token_id in enumerate(ids)]

    def choose(self, logits: npt.NDArray[np.float32], ahead: int | None = None) -> int:
        """The next token for its logits (V,); takes its random number.

        With `ahead`, the token that would be chosen after so many others, which stand in `ids` behind `length`.

        Raises:
            GenerationError: the logits are not numbers.
        """
        length = self.length + (ahead or 0)
        numbers = self._numbers if ahead is None else self._numbers.peek(ahead)
        if length < self._shortest:
            logits = logits.copy()
            logits[[token_id for token_id in self._stop_token_ids if token_id < self._vocabulary]] = -np.inf
        return sample(logits, self.ids[:length], self.options, numbers, len(self.prompt))

    def push(self, token_id: int) -> str:
        """Appends a generated token; returns a piece of text, perhaps "", and sets `finish_reason` if this is the end.

        Raises:
            GenerationError: the id is not one of the vocabulary, as the logits were not numbers.
        """
        if not 0 <= token_id < self._vocabulary:
            raise GenerationError(f"the next-token logits hold NaN, {NOT_NUMBERS}")
        self.ids[self.length] = token_id
        self.length += 1
        is_stop_token = token_id in self._stop_token_ids
        piece = ""
        if self._decoder is not None and not is_stop_token:
            piece = self._scanner.push(self._decoder.push(token_id))
        if is_stop_token or self._scanner.hit:
            self.finish_reason = "stop"
        elif self.length == len(self.ids):
            self.finish_reason = "length"
        if self._decoder is not None and self.finish_reason is not None:
            piece += self._scanner.push(self._decoder.flush()) + self._scanner.flush()
        if piece:
            self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """What has been generated, once `finish_reason` is set."""
        assert self.finish_reason is not None
        options = self.options
        return Completion(
            "".join(self.pieces),
            tuple(self.ids[len(self.prompt) : self.length].tolist()),
            self.finish_reason,
            None if options.logprobs is None else tuple(self.logprobs),
            tuple(self.prompt_logprobs) if options.prompt_logprobs else None,
        )
