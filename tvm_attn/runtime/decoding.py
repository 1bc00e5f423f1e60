"""The decoding loop: prompts in, completions out, for any engine that can prefill and decode.

Sequences share one batch. Each holds a KV-cache slot from its prefill until it ends; then the slot goes to the next
waiting prompt, so the batch never carries finished rows (continuous batching, Yu et al. 2022, "Orca").
"""

from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import GenerationError, TokenizerError, shorten
from tvm_attn.numbers import integer
from tvm_attn.runtime.prompts import IdArray, Prompt, Prompts, checked_ids, read_prompts
from tvm_attn.runtime.sampling import NOT_NUMBERS, SamplingOptions, sample, sequence_rng
from tvm_attn.runtime.slots import SlotPool

if TYPE_CHECKING:
    from tvm_attn.config import GPT2Config
    from tvm_attn.runtime.tokenizer import Tokenizer

Int32Array = npt.NDArray[np.int32]
FinishReason: TypeAlias = Literal["stop", "length"]

_LARGEST_SEED = (1 << 1024) - 1
_MOST_STOPS = 1 << 20
_MOST_CHARACTERS_A_TOKEN = 1024  # if the tokenizer does not know


class Logits(Protocol):
    """Next-token logits on the device, one row per sequence."""

    def numpy(self) -> npt.NDArray[np.float32]:
        """The logits (B, V), float32, copied to the host."""

    def argmax(self) -> Int32Array:
        """The id of the largest logit of each row, (B,) int32, found on the device; -1 for a row with NaN."""


class Engine(Protocol):
    """A compiled model with a KV cache of `max_batch` slots."""

    @property
    def config(self) -> "GPT2Config":
        """The model's configuration."""

    @property
    def max_batch(self) -> int:
        """Number of KV-cache slots, and so the most sequences in one call."""

    def prefill(self, prompts: Sequence[Int32Array], slots: Sequence[int]) -> Logits:
        """Run prompts, each (T_b,) int32, into positions 0..T_b-1 of their slots; the logits of each last token."""

    def decode(self, token_ids: Int32Array, slots: Int32Array, positions: Int32Array) -> Logits:
        """Run one token per sequence, each argument (B,) int32: token b is written at `positions[b]` of its slot."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """What to generate: `SamplingOptions`, and when to stop.

    max_new_tokens: most tokens to generate, >= 1. The context also ends a sequence: with n_positions P, a prompt of T
        tokens leaves P - T + 1, as the last token is never fed back.
    stop: strings that end a sequence as soon as one appears in the generated text; the text is cut before it.
    stop_token_ids: ids that end a sequence and are not part of its text; None means all of the model's `eos_token_ids`.
    seed: makes sampling repeatable, >= 0. Each sequence has its own random stream, derived from the seed and the
        prompt's index in the request. None takes fresh entropy.

    Raises GenerationError for a value outside its range.
    """

    max_new_tokens: int = 128
    stop: str | Collection[str] = ()
    stop_token_ids: int | Collection[int] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("max_new_tokens", integer("max_new_tokens", self.max_new_tokens, 1))
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
    finish_reason: "stop" after a stop token or string, "length" at `max_new_tokens` or the end of the context.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass
class GenerationStats:
    """Counts and seconds of one request, filled in while it runs; choosing tokens counts as part of each step.

    Every prompt's first token comes from its prefill, so `decode_tokens` is the number of generated tokens minus the
    number of prompts. `first_token_seconds` runs from the start to the first token of the first prefill.
    """

    prompt_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens per second; None before the first prefill."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decoded tokens per second, over all sequences; None before the first decode step."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None


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


class _Sequence:
    """One prompt in the loop: its ids so far, its slot, and the text that is final."""

    def __init__(
        self,
        prompt: Int32Array,
        options: GenerationOptions,
        stop_token_ids: frozenset[int],
        limit: int,
        tokenizer: "Tokenizer | None",
        rng: np.random.Generator,
    ) -> None:
        self.ids = np.empty(limit, np.int32)  # prompt and generated ids, of which `length` are valid
        self.ids[: len(prompt)] = prompt
        self.length = self.prompt_length = len(prompt)
        self.options = options
        self.rng = rng
        self.slot = -1
        self.pieces: list[str] = []
        self.finish_reason: FinishReason | None = None
        self._stop_token_ids = stop_token_ids
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder()
        self._scanner = StopScanner(tuple(options.stop))

    def push(self, token_id: int) -> None:
        """Append a generated token; returns a piece of text (perhaps "") and, if the sequence ends, the reason."""
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
        self.pieces.append(piece)

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        token_ids = tuple(self.ids[self.prompt_length : self.length].tolist())
        return Completion("".join(self.pieces), token_ids, self.finish_reason)


def _call_at_once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class DecodingLoop:
    """Generates with one engine and hands out its slots.

    Any number of threads may use it. Several streams may be open at once, and `generate` may be called among them, as
    long as slots are left.

    Args:
        engine: the model.
        tokenizer: its tokenizer, if it has one.
        run: calls a function with arguments while nobody else uses the engine; every step is such a call.
    """

    def __init__(
        self, engine: Engine, tokenizer: "Tokenizer | None" = None, run: Callable[..., Any] = _call_at_once
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._run = run
        self.slots = SlotPool(engine.max_batch)

    # Every str is a Sequence[str] too; the first signature that matches is used.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Sequence[int], options: GenerationOptions | None = ..., stats: GenerationStats | None = ...
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], options: GenerationOptions | None = ..., stats: GenerationStats | None = ...
    ) -> list[Completion]: ...

    @overload  # an array is one prompt or several depending on its number of dimensions, which its type does not show
    def generate(
        self,
        prompts: IdArray | Prompts,
        options: GenerationOptions | None = ...,
        stats: GenerationStats | None = ...,
    ) -> Completion | list[Completion]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Prompts,
        options: GenerationOptions | None = None,
        stats: GenerationStats | None = None,
    ) -> Completion | list[Completion]:
        """Complete one prompt, or a list of them as one batch; more prompts than slots wait for a slot.

        `tvm_attn.runtime.prompts` lists what a prompt may be. Empty text stands for the model's `bos_token_id`, else
        the first of its `eos_token_ids`. Completions come in the order of the prompts. `stats` is filled in.

        Raises TokenizerError for text without a tokenizer, and GenerationError for a prompt that is empty, longer than
        the context or has ids outside the vocabulary, and for logits that are not numbers.
        """
        options = options or GenerationOptions()
        read = prompts if isinstance(prompts, Prompts) else read_prompts(prompts)
        sequences = self._sequences(read, options)
        with closing(self._steps(sequences, stats or GenerationStats(), is_stream=False)) as steps:
            deque(steps, maxlen=0)
        completions = [sequence.completion() for sequence in sequences]
        return completions[0] if read.is_single else completions

    def stream(
        self, prompt: Prompt | Prompts, options: GenerationOptions | None = None, stats: GenerationStats | None = None
    ) -> Generator[str, None, Completion]:
        """Complete one prompt and yield its text piece by piece; no piece is empty or splits a character.

        The generator returns the Completion, whose text is all pieces joined. It takes a slot when it is first advanced
        and frees it when it ends or is closed. Text that may turn out to be a stop string is held back. Prompts and
        errors as in `generate`; this call raises them, except for a lack of slots.
        """
        if self.tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer to stream text with; use stream_ids")
        sequence = self._sequence(prompt, options)
        return self._stream_text(sequence, stats or GenerationStats())

    def stream_ids(
        self, prompt: Prompt | Prompts, options: GenerationOptions | None = None, stats: GenerationStats | None = None
    ) -> Generator[int, None, Completion]:
        """As `stream`, but yields each generated token id at once; needs no tokenizer if the prompt is ids."""
        sequence = self._sequence(prompt, options)
        return self._stream_ids(sequence, stats or GenerationStats())

    def _stream_text(self, sequence: _Sequence, stats: GenerationStats) -> Generator[str, None, Completion]:
        with closing(self._steps([sequence], stats, is_stream=True)) as steps:
            for _ in steps:
                if sequence.pieces[-1]:
                    yield sequence.pieces[-1]
        return sequence.completion()

    def _stream_ids(self, sequence: _Sequence, stats: GenerationStats) -> Generator[int, None, Completion]:
        with closing(self._steps([sequence], stats, is_stream=True)) as steps:
            for _ in steps:
                yield int(sequence.ids[sequence.length - 1])
        return sequence.completion()

    def _steps(
        self, sequences: Sequence[_Sequence], stats: GenerationStats, *, is_stream: bool
    ) -> Generator[None, None, None]:
        """Run all sequences to their end; yields after each engine call, in which each sequence gains a token."""
        waiting = deque(sequences)
        active: list[_Sequence] = []
        begin = perf_counter()
        with self.slots.lease(len(sequences), is_stream=is_stream) as lease:
            free = list(lease.slots)
            while waiting or active:
                if lease.is_lost:
                    raise GenerationError("this stream belongs to a thread that is not in this process; start it again")
                admitted = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                for sequence in admitted:
                    sequence.slot = free.pop(0)
                start = perf_counter()
                if admitted:
                    self._run(self._prefill, admitted)
                    stats.prefill_seconds += perf_counter() - start
                    stats.prompt_tokens += sum(sequence.prompt_length for sequence in admitted)
                else:
                    self._run(self._decode, active)
                    stats.decode_seconds += perf_counter() - start
                    stats.decode_tokens += len(active)
                stats.first_token_seconds = stats.first_token_seconds or perf_counter() - begin
                active += admitted
                free += [sequence.slot for sequence in active if sequence.finish_reason]
                active = [sequence for sequence in active if not sequence.finish_reason]
                yield

    def _prefill(self, sequences: Sequence[_Sequence]) -> None:
        prompts = [sequence.ids[: sequence.length] for sequence in sequences]
        self._push_next(self.engine.prefill(prompts, [sequence.slot for sequence in sequences]), sequences)

    def _decode(self, sequences: Sequence[_Sequence]) -> None:
        positions = np.array([sequence.length - 1 for sequence in sequences], np.int32)
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        token_ids = np.array([sequence.ids[sequence.length - 1] for sequence in sequences], np.int32)
        self._push_next(self.engine.decode(token_ids, slots, positions), sequences)

    def _push_next(self, logits: Logits, sequences: Sequence[_Sequence]) -> None:
        """Choose each sequence's next token from its row of the logits. A request's sequences share its options."""
        if sequences[0].options.is_plain_argmax:
            token_ids = logits.argmax().tolist()
        else:
            token_ids = [
                sample(row, sequence.ids[: sequence.length], sequence.options, sequence.rng)
                for row, sequence in zip(logits.numpy(), sequences, strict=True)
            ]
        for token_id, sequence in zip(token_ids, sequences, strict=True):
            if not 0 <= token_id < self.engine.config.vocab_size:
                raise GenerationError(f"the next-token logits hold NaN, {NOT_NUMBERS}")
            sequence.push(token_id)

    def _sequence(self, prompt: Prompt | Prompts, options: GenerationOptions | None) -> _Sequence:
        read = prompt if isinstance(prompt, Prompts) else read_prompts(prompt)
        if len(read.items) != 1:
            raise GenerationError(f"a stream takes one prompt, not {len(read.items)}; start one stream for each")
        return self._sequences(read, options or GenerationOptions())[0]

    def _sequences(self, prompts: Prompts, options: GenerationOptions) -> list[_Sequence]:
        if options.stop and self.tokenizer is None:
            raise TokenizerError("stop strings need a tokenizer, which the artifact lacks; use stop_token_ids")
        config = self.engine.config
        stop_token_ids = options.stop_ids(config.eos_token_ids)
        sequences = []
        for index in range(len(prompts.items)):
            name = "the prompt" if len(prompts.items) == 1 else f"prompt {index + 1} of {len(prompts.items)}"
            ids = self._prompt_ids(prompts.unpadded(index), name)
            limit = min(len(ids) + options.max_new_tokens, config.n_positions + 1)
            rng = sequence_rng(options.seed, index)
            sequences.append(_Sequence(ids, options, stop_token_ids, limit, self.tokenizer, rng))
        return sequences

    def _prompt_ids(self, prompt: str | IdArray | list[int], name: str) -> Int32Array:
        """The prompt as (T,) int32, checked against vocabulary and context; `name` is used in messages."""
        if isinstance(prompt, str):
            prompt = self._encode(prompt, name)
        return checked_ids(name, prompt, self.engine.config)

    def _encode(self, text: str, name: str) -> list[int]:
        config = self.engine.config
        if self.tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer; pass token ids instead of text")
        most = config.n_positions * (self.tokenizer.longest_token or _MOST_CHARACTERS_A_TOKEN)
        if len(text) > most:
            message = f"{name} has {len(text)} characters, and the model's context, {config.n_positions} tokens, holds"
            raise GenerationError(f"{message} {most} at most; shorten the prompt")
        start = config.eos_token_ids[:1] if config.bos_token_id is None else (config.bos_token_id,)
        return self.tokenizer.encode(text) or list(start)
