"""The scheduler: all requests to a model, from any number of threads and asyncio tasks, computed step by step.

Sequences share one batch. Each holds a KV-cache slot from its admission until it ends; then the slot goes to the next
waiting one, first come, first served, so the batch never carries finished rows (continuous batching, Yu et al. 2022,
"Orca"). `tvm_attn.runtime.batch` says what a step is.

What a sequence gives depends on its prompt and its options, and on nothing else: on processors bit by bit.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import RLock
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from tvm_attn.errors import GenerationError, QueueFullError, TokenizerError
from tvm_attn.runtime.batch import Batch, Entry, Job
from tvm_attn.runtime.decoding import (
    Completion,
    Engine,
    GenerationOptions,
    GenerationStats,
    Speculate,
    TokenSequence,
)
from tvm_attn.runtime.prompts import Prompt, Prompts, prompt_ids, read_prompts
from tvm_attn.runtime.request import Request
from tvm_attn.runtime.slots import Int32Array

if TYPE_CHECKING:
    from tvm_attn.runtime.tokenizer import Tokenizer

R = TypeVar("R")


@dataclass(frozen=True)
class SchedulerStats:
    """The state of a scheduler, and what it has done so far.

    Attributes:
        running: sequences that have a slot.
        waiting: sequences that wait for one.
        free_slots: slots that no sequence has.
        batch: sequences in the last step.
        prompt_tokens: prompt tokens read, `reused_tokens` of which were not computed, as a slot held them.
        generated_tokens: tokens generated.
        prefix_hits: sequences that found the beginning of their prompt in a slot.
    """

    running: int
    waiting: int
    free_slots: int
    batch: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prefix_hits: int


class Scheduler:
    """Computes the requests to one engine.

    Every method may be called by any thread. The work is done by the device's own thread, a step a call, so that
    several models on a device take turns. It goes on whether or not results are read, so a slow reader holds up nobody.

    After a fork, the child goes on with the requests of the thread that forked; those of other threads fail there.

    Args:
        engine: the model.
        tokenizer: its tokenizer, if it has one.
        queue_limit: the most requests that wait for a slot; None is no limit.

    Attributes:
        queue_limit: may be changed at any time.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, *, queue_limit: int | None = None) -> None:
        self.engine, self.tokenizer, self.queue_limit = engine, tokenizer, queue_limit
        self._is_closed = False
        self._submitting = RLock()  # the device's thread never takes it
        self._batch = Batch(engine)
        _schedulers.add(self)

    # --- for callers ---

    def submit(self, prompt: Prompt | Prompts, options: GenerationOptions | None = None, *, index: int = 0) -> Request:
        """Starts one sequence.

        Args:
            prompt: text or ids; see `tvm_attn.runtime.prompts`.
            options: what to generate; `n` must be 1.
            index: the number of the sequence in its request: each has its own random numbers.

        Raises:
            GenerationError: the prompt is empty, longer than the context or has ids outside the vocabulary, or the
                scheduler is closed.
            QueueFullError: `queue_limit` requests wait already.
            TokenizerError: text or stop strings are given and there is no tokenizer.
        """
        return self._start([self._sequence(prompt, options, GenerationStats(), index)], keep_tokens=True)[0]

    def prompt_ids(self, prompt: Prompt | Prompts) -> Int32Array:
        """One prompt as token ids (T,), int32; errors as in `submit`."""
        read = prompt if isinstance(prompt, Prompts) else read_prompts(prompt)
        if len(read.items) != 1:
            raise GenerationError(f"this takes one prompt, not {len(read.items)}")
        return prompt_ids("the prompt", read.unpadded(0), self.engine.config, self.tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Prompts,
        options: GenerationOptions | None = None,
        stats: GenerationStats | None = None,
    ) -> Completion | list[Completion]:
        """Completes one prompt, or each of a list of them, and waits for it.

        Empty text stands for the model's `bos_token_id`, else the first of its `eos_token_ids`. Completions come in the
        order of the prompts, `n` for each; one prompt and n = 1 give one completion, and no list.

        Raises:
            GenerationError, QueueFullError, TokenizerError: as from `submit`, or the logits are not numbers.
        """
        options = options or GenerationOptions()
        read = prompts if isinstance(prompts, Prompts) else read_prompts(prompts)
        requests = self._start(self._sequences(read, options, stats or GenerationStats()), keep_tokens=False)
        try:
            completions = [request.result() for request in requests]
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return completions[0] if read.is_single and options.n == 1 else completions

    def stream(
        self, prompt: Prompt | Prompts, options: GenerationOptions | None = None, stats: GenerationStats | None = None
    ) -> Generator[str, None, Completion]:
        """Completes one prompt and yields its text piece by piece; no piece is empty or splits a character.

        The generator returns the Completion, whose text is all pieces joined. It starts when it is first advanced and
        then runs ahead of its reader, to the end; closing or dropping it cancels the rest. Text that may turn out to be
        a stop string is held back. Prompts and errors as in `generate`; this call raises those of prompt and options.
        """
        if self.tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer to stream text with; use stream_ids")
        sequence = self._sequence(prompt, options, stats or GenerationStats())
        return self._stream(sequence, lambda token: token.text or None)

    def stream_ids(
        self, prompt: Prompt | Prompts, options: GenerationOptions | None = None, stats: GenerationStats | None = None
    ) -> Generator[int, None, Completion]:
        """As `stream`, but yields each generated token id at once; needs no tokenizer if the prompt is ids."""
        sequence = self._sequence(prompt, options, stats or GenerationStats())
        return self._stream(sequence, lambda token: token.id)

    def _stream(self, sequence: TokenSequence, part: Callable[[Any], Any]) -> Generator[Any, None, Completion]:
        sequence.begin = perf_counter()
        (request,) = self._start([sequence], keep_tokens=True)
        try:
            for token in request:
                if (found := part(token)) is not None:
                    yield found
            return request.result()
        finally:
            request.cancel()

    def call(self, function: Callable[[list[int]], R], wanted: int) -> R:
        """Calls a function in the device's thread, as one step, with 1 to `wanted` slots that it may use meanwhile.

        Waits its turn among the requests. The exception that the function raises is raised here.
        """
        job = Job(function, wanted)
        self.engine.post(partial(self._batch.add, [job]))
        try:
            job.feed.wait(None)
        except BaseException:
            job.feed.is_cancelled = True
            raise
        if job.error is not None:
            raise job.error
        result: R = job.result
        return result

    @property
    def speculate(self) -> Speculate:
        """What requests with the option "auto" do; may be set at any time.

        Raises:
            GenerationError: when set to what the model or its device cannot do.
        """
        return self._batch.speculation.default

    @speculate.setter
    def speculate(self, value: Speculate) -> None:
        self._batch.speculation.kind(value)
        self._batch.speculation.default = value

    @property
    def stats(self) -> SchedulerStats:
        """The present state."""
        batch = self._batch
        running = len(batch.beginning) + len(batch.running)
        return SchedulerStats(
            running=running,
            waiting=max(len(batch.unfinished) - running, 0),
            free_slots=len(batch.slots.free),
            batch=batch.last,
            prompt_tokens=batch.prompt_tokens,
            reused_tokens=batch.reused_tokens,
            generated_tokens=batch.generated_tokens,
            prefix_hits=batch.prefix_hits,
        )

    def close(self, *, cancel: bool = False) -> None:
        """Refuses new requests from now on, and lets the others finish, or cancels them."""
        self._is_closed = True
        if cancel:
            for entry in list(self._batch.unfinished):
                entry.feed.is_cancelled = True
            self._batch.has_cancelled = True

    # --- prompts ---

    def _sequence(
        self, prompt: Prompt | Prompts, options: GenerationOptions | None, stats: GenerationStats, index: int = 0
    ) -> TokenSequence:
        read = prompt if isinstance(prompt, Prompts) else read_prompts(prompt)
        options = options or GenerationOptions()
        for wrong, name in ((len(read.items), "prompt"), (options.n, "completion")):
            if wrong != 1:
                raise GenerationError(f"a stream takes one {name}, not {wrong}; start one stream for each")
        return self._sequences(read, options, stats, index)[0]

    def _sequences(
        self, prompts: Prompts, options: GenerationOptions, stats: GenerationStats, first: int = 0
    ) -> list[TokenSequence]:
        if options.stop and self.tokenizer is None:
            raise TokenizerError("stop strings need a tokenizer, which the artifact lacks; use stop_token_ids")
        self._batch.speculation.kind(options.speculate)  # refuses what the model cannot do
        sequences = []
        for number in range(len(prompts.items)):
            name = "the prompt" if len(prompts.items) == 1 else f"prompt {number + 1} of {len(prompts.items)}"
            ids = prompt_ids(name, prompts.unpadded(number), self.engine.config, self.tokenizer)
            for index in range(first + number * options.n, first + (number + 1) * options.n):
                sequences.append(TokenSequence(ids, options, self.engine.config, self.tokenizer, index, stats))
        return sequences

    # --- from the caller's thread to the device's ---

    def _start(self, sequences: list[TokenSequence], keep_tokens: bool) -> list[Request]:
        entries = [Entry(sequence, keep_tokens) for sequence in sequences]
        requests = [Request(entry.sequence, entry.feed, self._resume, self._note_cancelled) for entry in entries]
        try:
            with self._submitting:
                if self._is_closed:
                    raise GenerationError("the model is being closed and takes no more requests")
                room = None if self.queue_limit is None else self.engine.max_batch + self.queue_limit
                if room is not None and len(self._batch.unfinished) + len(entries) > room:
                    raise QueueFullError(
                        f"{len(self._batch.unfinished)} requests run or wait, of {room}; try again later"
                    )
                self._batch.unfinished.update(dict.fromkeys(entries))
            if entries:
                self.engine.post(partial(self._batch.add, entries))
        except BaseException:
            for entry in entries:
                self._batch.unfinished.pop(entry, None)
            raise
        return requests

    def _note_cancelled(self) -> None:
        self._batch.has_cancelled = True

    def _resume(self) -> None:
        """Continues in a child process, where the device's thread is gone: before somebody waits."""
        if self._batch.is_torn:
            self.engine.post(partial(self._batch.add, []))

    def after_fork_in_child(self) -> None:
        """Goes on in a child process, with the requests of the thread that forked."""
        self._submitting = RLock()
        self._batch.after_fork_in_child()


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for scheduler in list(_schedulers):
        scheduler.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
