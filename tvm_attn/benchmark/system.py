"""A case to measure, a system that runs it, and the clock around its calls.

Every peer runs this file in its own process and maybe its own Python, so it needs only NumPy.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

MIN_CALLS, MAX_CALLS = 2, 200
"""The least and most timed calls per round; in between, as many as fit the round's time."""
_RUN = 24
"""Tokens that `GreedySystem` decodes one after another before it goes back to the case's position."""


@dataclass(frozen=True)
class Case:
    """One call to measure.

    Attributes:
        phase: "prefill" is a prompt up to its next token, "decode" one more token for each sequence.
        tokens: length of the prompt, or of the context in the KV cache before the call.
        batch: number of sequences; 1 for prefill.
    """

    phase: Literal["prefill", "decode"]
    tokens: int
    batch: int = 1

    @property
    def tokens_per_call(self) -> int:
        """Tokens that a call processes, over all sequences."""
        return self.tokens if self.phase == "prefill" else self.batch

    def __str__(self) -> str:
        return f"{self.phase} {self.tokens}" + (f", batch {self.batch}" if self.batch > 1 else "")

    def to_dict(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        return asdict(self)


class System(ABC):
    """Something that runs GPT-2.

    Attributes:
        name: the runtime's name.
        version: its version.
        precision: the format in which weights are stored and multiplied.
        vocabulary: V, an upper bound of token ids.
    """

    name: str
    version: str
    precision: str
    vocabulary: int

    def supports(self, case: Case) -> bool:
        """Whether it can run the case."""
        return True

    @abstractmethod
    def fill(self, case: Case) -> None:
        """Fills the KV cache with the context of a decode case; not timed."""

    @abstractmethod
    def logits(self, ids: Int32Array) -> dict[str, Float32Array]:
        """Logits (V,) after ids (T,), T >= 2, for comparison: from "prefill", and from "decode" of the last id."""

    @abstractmethod
    def time(self, case: Case, seconds: float) -> list[float]:
        """Seconds of several calls including the greedy choice of the next token, after one call that is not counted.

        Args:
            case: what to run; for decode the cache is filled.
            seconds: about how long to go on, `MIN_CALLS` and `MAX_CALLS` permitting.
        """


class CachedSystem(System):
    """A system whose KV cache can be accessed between calls."""

    @abstractmethod
    def prefill(self, prompts: Int32Array) -> Any:
        """Runs prompts (B, T) into the cache from position 0 on; returns the last tokens' logits in its own form."""

    @abstractmethod
    def decode(self, token_ids: Int32Array, context: int) -> Any:
        """Runs one token per sequence, (B,), at position `context`; later calls may repeat the position."""

    @abstractmethod
    def numpy(self, logits: Any) -> Float32Array:
        """The logits that prefill and decode return, as (B, V)."""

    def argmax(self, logits: Any) -> Int32Array:
        """The most likely next token of each sequence, (B,)."""
        return self.numpy(logits).argmax(axis=-1).astype(np.int32)

    def rewind(self, context: int) -> None:
        """Forgets the cache from position `context` on; called between decode calls, not timed.

        A cache that is written by position need not do anything.
        """

    def fill(self, case: Case) -> None:
        """See `System.fill`."""
        self.prefill(prompts(case, self.vocabulary))

    def logits(self, ids: Int32Array) -> dict[str, Float32Array]:
        """See `System.logits`."""
        result = {"prefill": self.numpy(self.prefill(ids[None]))[0].copy()}
        self.prefill(ids[None, :-1])
        result["decode"] = self.numpy(self.decode(ids[-1:], len(ids) - 1))[0].copy()
        return result

    def call(self, case: Case, inputs: Int32Array) -> float:
        """Seconds of one call of a case on its `prompts`, including the greedy choice of the next token."""
        start = time.perf_counter()
        if case.phase == "prefill":
            self.argmax(self.prefill(inputs))
            return time.perf_counter() - start
        self.argmax(self.decode(inputs[:, 0], case.tokens))
        elapsed = time.perf_counter() - start
        self.rewind(case.tokens)
        return elapsed

    def time(self, case: Case, seconds: float) -> list[float]:
        """See `System.time`."""
        inputs = prompts(case, self.vocabulary)
        self.call(case, inputs)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < MIN_CALLS or (time.perf_counter() < end and len(times) < MAX_CALLS):
            times.append(self.call(case, inputs))
        return times


class GreedySystem(CachedSystem):
    """Runs decode cases as in real use: each step gets the token that the last one chose, at the next position.

    Attributes:
        positions: the longest context.
    """

    positions: int

    def time(self, case: Case, seconds: float) -> list[float]:
        """See `System.time`."""
        if case.phase == "prefill":
            return super().time(case, seconds)
        ids = prompts(case, self.vocabulary)[:, 0]
        self._run(case, ids)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < MIN_CALLS or (time.perf_counter() < end and len(times) < 5 * MAX_CALLS):
            times += self._run(case, ids)
        return times

    def step(self, token_ids: Int32Array, context: int, *, continues: bool) -> Int32Array:
        """The ids (B,) after the tokens (B,) at position `context`; `continues` if the next call is for these."""
        return self.argmax(self.decode(token_ids, context))

    def _run(self, case: Case, ids: Int32Array) -> list[float]:
        times = []
        end = min(case.tokens + _RUN, self.positions)
        for position in range(case.tokens, end):
            start = time.perf_counter()
            ids = self.step(ids, position, continues=position + 1 < end)
            times.append(time.perf_counter() - start)
        self.rewind(case.tokens)
        return times


def prompts(case: Case, vocabulary: int) -> Int32Array:
    """Token ids (B, T) of a case, the same in every process."""
    rng = np.random.default_rng(case.tokens)
    return rng.integers(0, vocabulary, (case.batch, case.tokens), dtype=np.int32)
