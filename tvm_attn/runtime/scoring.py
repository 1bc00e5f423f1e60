"""How likely a model finds texts: log-probabilities of their tokens, in windows of a context.

A text longer than the context is read in windows that overlap, as transformers' documentation does it
(https://huggingface.co/docs/transformers/perplexity): each window begins `stride` tokens after the one before, and only
tokens that the one before did not score are scored in it. A shorter stride gives each token more to go by and takes
longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import GenerationError
from tvm_attn.numbers import integer

if TYPE_CHECKING:
    from tvm_attn.runtime.decoding import Engine
    from tvm_attn.runtime.scheduler import Scheduler

Int32Array = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]
"""Called with the number of tokens scored so far, and of all."""


@dataclass(frozen=True)
class TextScore:
    """How likely a model finds a text.

    Attributes:
        token_ids: the text's tokens.
        token_logprobs: the log-probability of each, in nats; None for the first token of the text, which has nothing
            before it, and of every window if they do not overlap.
        bytes: of the text in UTF-8; None if it was given as ids.
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float | None, ...]
    bytes: int | None

    @property
    def tokens(self) -> int:
        """Number of tokens that have a log-probability."""
        return sum(logprob is not None for logprob in self.token_logprobs)

    @property
    def logprob(self) -> float:
        """The log-probability of the text after its first token: the sum of its tokens', in nats."""
        return math.fsum(logprob for logprob in self.token_logprobs if logprob is not None)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-probability of the tokens; None for a text of one token."""
        if not self.tokens:
            return None
        mean = -self.logprob / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The negative base-2 log-probability by the text's bytes: comparable between tokenizers, unlike perplexity.

        None for a text of one token, and if the bytes are not known.
        """
        return -self.logprob / math.log(2) / self.bytes if self.tokens and self.bytes else None


@dataclass(frozen=True)
class Window:
    """A part of a text that is read at once: tokens first .. last - 1, of which those from `scored` on are scored."""

    text: int
    first: int
    scored: int
    last: int


def windows(text: int, length: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of a text of `length` tokens."""
    done = 0
    for first in range(0, length, stride):
        last = min(first + context, length)
        if (scored := max(done, first + 1)) < last:
            yield Window(text, first, scored, last)
        done = last
        if last == length:
            return


def checked_windows(n_positions: int, context: int | None, stride: int | None) -> tuple[int, int]:
    """Tokens of a window, and from the beginning of one to the next: by default the model's context, and half a window.

    Raises:
        GenerationError: one is out of range, or the stride is longer than the window, so that tokens would be left out.
    """
    context = n_positions if context is None else integer("context", context, 2, n_positions)
    stride = max(context // 2, 1) if stride is None else integer("stride", stride, 1)
    if stride > context:
        raise GenerationError(f"stride is {stride} and context {context}; a stride over the context leaves tokens out")
    return context, stride


def score(
    scheduler: Scheduler,
    texts: list[Int32Array],
    context: int,
    stride: int,
    progress: Progress = lambda done, total: None,
) -> list[list[float | None]]:
    """Log-probabilities of the tokens of texts, each (T,) int32, T >= 1.

    Windows are read together, as many as there are free slots, in turn with what else the scheduler does.

    Raises:
        GenerationError: the logits are not numbers.
    """
    found: list[list[float | None]] = [[None] * len(ids) for ids in texts]
    waiting = [window for index, ids in enumerate(texts) for window in windows(index, len(ids), context, stride)]
    total = sum(window.last - window.scored for window in waiting)
    done = 0
    while waiting:
        taken = waiting[: _count(waiting, scheduler.engine.max_prefill_rows)]
        results = scheduler.call(partial(_score_windows, scheduler.engine, texts, taken), len(taken))
        for window, logprobs in zip(taken, results, strict=False):
            found[window.text][window.scored : window.last] = logprobs
            done += window.last - window.scored
        del waiting[: len(results)]
        progress(done, total)
    return found


def _count(waiting: list[Window], most: int) -> int:
    """How many windows have at most so many tokens together; at least one."""
    for count, window in enumerate(waiting):
        most -= window.last - window.first
        if most < 0:
            return max(count, 1)
    return len(waiting)


def _score_windows(engine: Engine, texts: list[Int32Array], taken: list[Window], slots: list[int]) -> list[list[float]]:
    """The log-probabilities of the first windows, one for each slot."""
    taken = taken[: len(slots)]
    # The logits after a token are those of the next; the last token's are not needed, nor those before `scored - 1`.
    ahead = [(slot, window) for slot, window in zip(slots, taken, strict=False) if window.scored - 1 > window.first]
    if ahead:
        prompts = [texts[window.text][window.first : window.scored - 1] for _, window in ahead]
        engine.prefill(prompts, [slot for slot, _ in ahead], [0] * len(ahead))
    results = engine.score(
        [texts[window.text][window.scored - 1 : window.last - 1] for window in taken],
        slots[: len(taken)],
        [window.scored - 1 - window.first for window in taken],
        [texts[window.text][window.scored : window.last] for window in taken],
    )
    for result in results:
        result.require_numbers()
    return [result.chosen.tolist() for result in results]
