"""The scheduler: all requests to a model, from any number of threads and asyncio tasks, computed step by step.

Sequences share one batch. Each holds a KV-cache slot from its admission until it ends; then the slot goes to the next
waiting one, first come, first served, so the batch never carries finished rows (continuous batching, Yu et al. 2022,
"Orca"). A step is one call of the engine: a token for every running sequence, or a part of the prompts of those that
begin. While others run, parts are chunks of `prefill_chunk` tokens, and every second step is theirs (chunked prefills,
Agrawal et al. 2023, "Sarathi"). A prompt whose beginning a slot holds takes it from there.

What a sequence gives depends on its prompt and its options, and on nothing else: on processors bit by bit.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import RLock, get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tvm_attn.errors import GenerationError, QueueFullError, TokenizerError
from tvm_attn.runtime.decoding import (
    Completion,
    Engine,
    GenerationOptions,
    GenerationStats,
    Logits,
    TokenSequence,
)
from tvm_attn.runtime.prompts import Prompt, Prompts, prompt_ids, read_prompts
from tvm_attn.runtime.request import Feed, Request, wake
from tvm_attn.runtime.slots import Int32Array, Slots, reusable

if TYPE_CHECKING:
    from tvm_attn.runtime.tokenizer import Tokenizer

R = TypeVar("R")
_COPIES = 128
"""Tokens of a prompt that are copied from another slot in less time than one is computed."""


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


class _Entry:
    """A sequence and those who wait for it."""

    def __init__(self, sequence: TokenSequence, keeps_tokens: bool) -> None:
        self.sequence, self.feed = sequence, Feed(keeps_tokens)
        self.has_begun = False  # whether a part of its prompt is in its slot


class _Job:
    """A function that waits for free slots."""

    def __init__(self, function: Callable[[list[int]], Any], wanted: int) -> None:
        self.function, self.wanted, self.feed = function, wanted, Feed(keeps_tokens=False)
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self, slots: list[int]) -> None:
        try:
            self.result = self.function(slots)
        except BaseException as error:
            self.error = error
        self.feed.end()


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
        self._unfinished: dict[_Entry, None] = {}  # in the order of their submission
        # The rest belongs to the device's thread.
        self._slots = Slots(engine.max_batch)
        self._waiting: deque[_Entry | _Job] = deque()
        self._beginning: list[_Entry] = []  # whose prompts are not complete
        self._running: list[_Entry] = []  # that get a token in each step
        self._is_active = False  # whether a step is queued
        self._has_cancelled = False
        self._is_turn_of_running = False
        self._writes = engine.writes
        self._batch = self._generated = self._prompt_tokens = self._reused_tokens = self._prefix_hits = 0
        self._is_torn = False  # by a fork
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
        job = _Job(function, wanted)
        self.engine.post(partial(self._enqueue, [job]))
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
    def stats(self) -> SchedulerStats:
        """The present state."""
        running = len(self._beginning) + len(self._running)
        return SchedulerStats(
            running=running,
            waiting=max(len(self._unfinished) - running, 0),
            free_slots=len(self._slots.free),
            batch=self._batch,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
            generated_tokens=self._generated,
            prefix_hits=self._prefix_hits,
        )

    def close(self, *, cancel: bool = False) -> None:
        """Refuses new requests from now on, and lets the others finish, or cancels them."""
        self._is_closed = True
        if cancel:
            for entry in list(self._unfinished):
                entry.feed.is_cancelled = True
            self._has_cancelled = True

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
        sequences = []
        for number in range(len(prompts.items)):
            name = "the prompt" if len(prompts.items) == 1 else f"prompt {number + 1} of {len(prompts.items)}"
            ids = prompt_ids(name, prompts.unpadded(number), self.engine.config, self.tokenizer)
            for index in range(first + number * options.n, first + (number + 1) * options.n):
                sequences.append(TokenSequence(ids, options, self.engine.config, self.tokenizer, index, stats))
        return sequences

    # --- from the caller's thread to the device's ---

    def _start(self, sequences: list[TokenSequence], keep_tokens: bool) -> list[Request]:
        entries = [_Entry(sequence, keep_tokens) for sequence in sequences]
        requests = [Request(entry.sequence, entry.feed, self._resume, self._note_cancelled) for entry in entries]
        try:
            with self._submitting:
                if self._is_closed:
                    raise GenerationError("the model is being closed and takes no more requests")
                room = None if self.queue_limit is None else self.engine.max_batch + self.queue_limit
                if room is not None and len(self._unfinished) + len(entries) > room:
                    raise QueueFullError(f"{len(self._unfinished)} requests run or wait, of {room}; try again later")
                self._unfinished.update(dict.fromkeys(entries))
            if entries:
                self.engine.post(partial(self._enqueue, entries))
        except BaseException:
            for entry in entries:
                self._unfinished.pop(entry, None)
            raise
        return requests

    def _note_cancelled(self) -> None:
        self._has_cancelled = True

    def _resume(self) -> None:
        """Continues in a child process, where the device's thread is gone: before somebody waits."""
        if self._is_torn:
            self.engine.post(partial(self._enqueue, []))

    def after_fork_in_child(self) -> None:
        """Keeps the requests of the thread that forked, which is the only one."""
        self._submitting = RLock()
        placed = {*self._beginning, *self._running}
        for entry in list(self._unfinished):
            if entry.feed.thread != get_ident():
                message = "this request belongs to a thread that is not in this process; start it again"
                self._end(entry, GenerationError(message))
                placed.discard(entry)
        kept = list(self._unfinished)
        self._waiting = deque(entry for entry in kept if entry not in placed)
        self._beginning = [entry for entry in self._beginning if entry in placed]
        self._running = [entry for entry in self._running if entry in placed]
        self._is_active, self._is_torn = False, bool(kept)

    # --- in the device's thread ---

    def _enqueue(self, entries: Sequence[_Entry | _Job]) -> None:
        self._waiting.extend(entries)
        self._has_cancelled = True  # perhaps one of these is
        self._is_torn = False
        if not self._is_active:
            self._is_active = True
            self.engine.post(self._step)

    def _step(self) -> None:
        try:
            self._drop_cancelled()
            if self._writes != self.engine.writes:  # somebody else has used the engine
                self._slots.forget()
            self._admit()
            self._compute()
        except BaseException as error:  # nothing is known of the state
            for entry in [*self._beginning, *self._running, *self._waiting]:
                self._end(entry, error)
            self._waiting.clear()
            self._slots.forget()
        self._writes = self.engine.writes
        self._is_active = bool(self._waiting or self._beginning or self._running)
        if self._is_active:
            self.engine.post(self._step)

    def _end(self, entry: _Entry | _Job, error: BaseException | None = None) -> None:
        """Takes an entry out of everything but `_waiting`, and tells those who wait for it."""
        if isinstance(entry, _Entry):
            sequence = entry.sequence
            if sequence.slot >= 0:
                (self._running if entry in self._running else self._beginning).remove(entry)
                self._slots.give_back(sequence.slot)
                sequence.slot = -1
            self._unfinished.pop(entry, None)
            sequence.error = error
        else:
            entry.error = error
        entry.feed.end()
        wake([entry.feed])

    def _drop_cancelled(self) -> None:
        if not self._has_cancelled:
            return
        self._has_cancelled = False
        cancelled = [entry for entry in [*self._beginning, *self._running, *self._waiting] if entry.feed.is_cancelled]
        if cancelled:
            gone = set(cancelled)
            self._waiting = deque(entry for entry in self._waiting if entry not in gone)
        for entry in cancelled:
            if isinstance(entry, _Entry):
                entry.sequence.finish_reason = "cancelled"
            self._end(entry)

    def _admit(self) -> None:
        """Gives free slots to those who wait."""
        while self._waiting and self._slots.free:
            first = self._waiting.popleft()
            if isinstance(first, _Job):
                slots = sorted(self._slots.free)[: first.wanted]
                self._slots.forget(slots)
                first.run(slots)
                return  # the others wait for a step of those who run
            sequence = first.sequence
            if sequence.unscored:  # all of the prompt's logits are wanted
                sequence.slot, sequence.cached = self._slots.take(sequence.prompt[:0], 0)
                first.has_begun = True
            else:
                promised = self._promised(sequence.prompt, [*self._running, *self._beginning])
                sequence.slot, sequence.cached = self._slots.take(sequence.prompt, promised)
            self._beginning.append(first)

    def _promised(self, prompt: Int32Array, others: Sequence[_Entry]) -> int:
        """How many tokens of a prompt could be copied from others, now or when their prompts are complete."""
        return max((reusable(other.sequence.prompt, prompt) for other in others), default=0)

    def _compute(self) -> None:
        if not self._beginning:
            if self._running:
                self._decode()
            return
        # Sequences of one request do not wait for each other's tokens.
        alternates = bool(self._running) and len(_distinct([*self._beginning, *self._running])) > 1
        if alternates and self._is_turn_of_running:
            self._decode()
        else:
            most = self.engine.prefill_chunk if alternates else self.engine.max_prefill_rows
            if self._beginning[0].sequence.unscored:
                self._score(most)
            else:
                self._prefill(most)

    def _prefill(self, most: int) -> None:
        """Computes up to `most` tokens of prompts, of the first ones first."""
        begin = perf_counter()
        self._is_turn_of_running = True
        parts: list[tuple[_Entry, Int32Array]] = []
        for index, entry in enumerate(self._beginning):
            sequence = entry.sequence
            if sequence.unscored:
                continue
            if most > 0 and not entry.has_begun and self._begin(entry, self._beginning[:index]):
                most = max(most - sequence.cached // _COPIES, 1)
            if most > 0 and entry.has_begun:
                parts.append((entry, sequence.prompt[sequence.cached : sequence.cached + most]))
                most -= len(parts[-1][1])
        entries = [entry for entry, _ in parts]
        try:
            slots = [entry.sequence.slot for entry in entries]
            starts = [entry.sequence.cached for entry in entries]
            logits = self.engine.prefill([tokens for _, tokens in parts], slots, starts)
            complete: list[_Entry | None] = []
            for entry, tokens in parts:
                sequence = entry.sequence
                sequence.cached += len(tokens)
                self._slots.held[sequence.slot] = sequence.prompt[: sequence.cached]
                complete.append(entry if sequence.cached == len(sequence.prompt) else None)
            found = self._next_tokens(logits, complete)
        except BaseException as error:
            self._fail(entries, error)
            return
        self._count(parts, perf_counter() - begin)
        for entry, _ in found:
            self._beginning.remove(entry)
            self._running.append(entry)
        self._deliver(found)

    def _score(self, most: int) -> None:
        """As `_prefill`, for prompts whose log-probabilities are wanted; their last tokens are left to `_prefill`."""
        begin = perf_counter()
        self._is_turn_of_running = True
        parts: list[tuple[_Entry, Int32Array]] = []
        for entry in self._beginning:
            sequence = entry.sequence
            if size := min(most, sequence.unscored):
                parts.append((entry, sequence.prompt[sequence.cached : sequence.cached + size]))
                most -= size
        entries, sequences = [entry for entry, _ in parts], [entry.sequence for entry, _ in parts]
        starts = [sequence.cached for sequence in sequences]
        targets = [
            sequence.prompt[start + 1 : start + 1 + len(tokens)]
            for sequence, start, (_, tokens) in zip(sequences, starts, parts, strict=True)
        ]
        count = max(sequence.options.logprobs or 0 for sequence in sequences)
        try:
            slots = [sequence.slot for sequence in sequences]
            scores = self.engine.score([tokens for _, tokens in parts], slots, starts, targets, count)
        except BaseException as error:
            self._fail(entries, error)
            return
        self._count(parts, perf_counter() - begin)
        for (entry, tokens), found in zip(parts, scores, strict=True):
            sequence = entry.sequence
            sequence.cached += len(tokens)
            self._slots.held[sequence.slot] = sequence.prompt[: sequence.cached]
            try:
                sequence.add_scores(found)
            except GenerationError as error:
                self._fail([entry], error)

    def _count(self, parts: Sequence[tuple[_Entry, Int32Array]], seconds: float) -> None:
        """Records that parts of prompts were computed."""
        for entry, tokens in parts:
            entry.sequence.stats.prompt_tokens += len(tokens)
            self._prompt_tokens += len(tokens)
        for stats in _distinct([entry for entry, _ in parts]):
            stats.prefill_seconds += seconds

    def _begin(self, entry: _Entry, ahead: Sequence[_Entry]) -> bool:
        """Copies the beginning of a prompt from another slot, unless one of those ahead will have more of it soon."""
        sequence = entry.sequence
        others = [slot for slot in range(len(self._slots.held)) if slot != sequence.slot]
        source, length = self._slots.longest(others, sequence.prompt)
        if self._promised(sequence.prompt, ahead) > max(length, sequence.cached):
            return False
        if length > sequence.cached:
            self.engine.copy_prefix(source, sequence.slot, length)
            sequence.cached = length
            self._slots.held[sequence.slot] = sequence.prompt[:length]
        entry.has_begun = True
        if sequence.cached:
            sequence.stats.prompt_tokens += sequence.cached
            sequence.stats.reused_tokens += sequence.cached
            self._prompt_tokens += sequence.cached
            self._reused_tokens += sequence.cached
            self._prefix_hits += 1
        return True

    def _decode(self) -> None:
        """Computes one token of each running sequence."""
        begin = perf_counter()
        self._is_turn_of_running = False
        entries = list(self._running)
        try:
            sequences = [entry.sequence for entry in entries]
            positions = np.array([sequence.length - 1 for sequence in sequences], np.int32)
            token_ids = np.array([sequence.ids[sequence.length - 1] for sequence in sequences], np.int32)
            slots = np.array([sequence.slot for sequence in sequences], np.int32)
            ahead = not self._beginning and all(s.takes_argmax and s.continues for s in sequences)
            found = self._next_tokens(self.engine.decode(token_ids, slots, positions, ahead=ahead), entries)
        except BaseException as error:
            self._fail(entries, error)
            return
        seconds = perf_counter() - begin
        for stats in _distinct(entries):
            stats.decode_seconds += seconds
        for sequence in sequences:
            sequence.stats.decode_tokens += 1
        self._deliver(found)

    def _next_tokens(self, logits: Logits, entries: Sequence[_Entry | None]) -> list[tuple[_Entry, str]]:
        """Chooses a token for each row of the logits that has an entry; returns the entries and their new text.

        A sequence whose logits are not numbers ends alone.
        """
        wants_argmax = [entry is not None and entry.sequence.chooses_largest for entry in entries]
        ids = logits.argmax().tolist() if any(wants_argmax) else []
        rows = logits.numpy() if any(e and not plain for e, plain in zip(entries, wants_argmax, strict=True)) else None
        found = []
        scored: list[tuple[int, TokenSequence]] = []
        chosen = np.full(len(entries), -1, np.int32)
        for row, entry in enumerate(entries):
            if entry is None:
                continue
            sequence = entry.sequence
            try:
                if rows is None or wants_argmax[row]:
                    text = sequence.push(ids[row])
                else:
                    text = sequence.push(sequence.choose(rows[row]))
                found.append((entry, text))
                chosen[row] = sequence.ids[sequence.length - 1]
                if sequence.options.logprobs is not None:
                    scored.append((row, sequence))
            except Exception as error:
                self._end(entry, error)
        if scored:
            logprobs = logits.logprobs(chosen, max(sequence.options.logprobs or 0 for _, sequence in scored))
            for row, sequence in scored:
                count = sequence.options.logprobs or 0
                sequence.logprobs.append(logprobs.token(row, int(chosen[row]), count))
        return found

    def _deliver(self, found: list[tuple[_Entry, str]]) -> None:
        """Gives new tokens to those who wait for them, and ends sequences."""
        now = perf_counter()
        self._batch = len(found)
        self._generated += len(found)
        for entry, text in found:
            sequence = entry.sequence
            stats = sequence.stats
            if not stats.first_token_seconds:
                stats.first_token_seconds = now - sequence.begin
            logprobs = sequence.logprobs[-1] if sequence.logprobs else None
            entry.feed.put(int(sequence.ids[sequence.length - 1]), text, logprobs)
            if sequence.finish_reason is not None:
                self._end(entry)
        wake(entry.feed for entry, _ in found)

    def _fail(self, entries: Sequence[_Entry], error: BaseException) -> None:
        """Ends entries whose call failed; their slots may hold anything."""
        self._slots.forget(entry.sequence.slot for entry in entries if entry.sequence.slot >= 0)
        for entry in entries:
            if not entry.feed.is_ended:
                self._end(entry, error)


def _distinct(entries: Sequence[_Entry]) -> list[GenerationStats]:
    """The statistics of all requests that have a part in these entries."""
    return list({id(entry.sequence.stats): entry.sequence.stats for entry in entries}.values())


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for scheduler in list(_schedulers):
        scheduler.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
