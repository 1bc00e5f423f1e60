"""The sequences that an engine computes together, step by step, in the thread that makes the engine's calls.

A step is one call of the engine: a token for every running sequence, more if some were guessed, or a part of the
prompts of those that begin.
While others run, parts are chunks of `prefill_chunk` tokens, and every second step is theirs (chunked prefills, Agrawal
et al. 2023, "Sarathi"). A prompt whose beginning a slot holds takes it from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import get_ident
from time import perf_counter
from typing import Any

import numpy as np

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.decoding import Choices, Engine, GenerationStats, Logits, TokenSequence
from tvm_attn.runtime.request import Feed, Token, wake
from tvm_attn.runtime.slots import Int32Array, Slots, reusable
from tvm_attn.runtime.speculation import Speculation

_COPIES = 128
"""Tokens of a prompt that are copied from another slot in less time than one is computed."""


class Entry:
    """A sequence and those who wait for it."""

    def __init__(self, sequence: TokenSequence, keeps_tokens: bool) -> None:
        self.sequence, self.feed = sequence, Feed(keeps_tokens)
        self.has_begun = False  # whether a part of its prompt is in its slot


class Job:
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


class Batch:
    """The sequences of one engine, and the functions that wait for its slots.

    All methods are for the device's thread; other threads may read the attributes, and set `has_cancelled`.

    Args:
        engine: the model.

    Attributes:
        unfinished: all entries that have been submitted, in their order, also those that `add` has not got yet.
        slots: the engine's slots.
        speculation: guesses tokens.
        waiting: what waits for a slot.
        beginning: entries whose prompts are not complete.
        running: entries that get a token in each step.
        has_cancelled: whether a feed may have been cancelled since the last step.
        is_torn: whether steps stopped because of a fork; `add` starts them again.
        last: sequences in the last step.
        generated_tokens, prompt_tokens, reused_tokens, prefix_hits: see `SchedulerStats`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.unfinished: dict[Entry, None] = {}
        self.slots = Slots(engine.max_batch)
        self.speculation = Speculation(engine)
        self.waiting: deque[Entry | Job] = deque()
        self.beginning: list[Entry] = []
        self.running: list[Entry] = []
        self.has_cancelled = self.is_torn = False
        self.last = self.generated_tokens = self.prompt_tokens = self.reused_tokens = self.prefix_hits = 0
        self._is_active = False  # whether a step is queued
        self._is_turn_of_running = False
        self._writes = engine.writes

    def after_fork_in_child(self) -> None:
        """Keeps the requests of the thread that forked, which is the only one."""
        placed = {*self.beginning, *self.running}
        for entry in list(self.unfinished):
            if entry.feed.thread != get_ident():
                message = "this request belongs to a thread that is not in this process; start it again"
                self._end(entry, GenerationError(message))
                placed.discard(entry)
        kept = list(self.unfinished)
        self.waiting = deque(entry for entry in kept if entry not in placed)
        self.beginning = [entry for entry in self.beginning if entry in placed]
        self.running = [entry for entry in self.running if entry in placed]
        self._is_active, self.is_torn = False, bool(kept)

    def add(self, entries: Sequence[Entry | Job]) -> None:
        """Takes entries in, and starts steps if none are on their way."""
        self.waiting.extend(entries)
        self.has_cancelled = True  # perhaps one of these is
        self.is_torn = False
        if not self._is_active:
            self._is_active = True
            self._engine.post(self._step)

    def _step(self) -> None:
        try:
            self._drop_cancelled()
            if self._writes != self._engine.writes:  # somebody else has used the engine
                self.slots.forget()
            self._admit()
            self._compute()
        except BaseException as error:  # nothing is known of the state
            for entry in [*self.beginning, *self.running, *self.waiting]:
                self._end(entry, error)
            self.waiting.clear()
            self.slots.forget()
        self._writes = self._engine.writes
        self._is_active = bool(self.waiting or self.beginning or self.running)
        if self._is_active:
            self._engine.post(self._step)

    def _end(self, entry: Entry | Job, error: BaseException | None = None) -> None:
        """Takes an entry out of everything but `waiting`, and tells those who wait for it."""
        if isinstance(entry, Entry):
            sequence = entry.sequence
            if sequence.slot >= 0:
                (self.running if entry in self.running else self.beginning).remove(entry)
                self.slots.give_back(sequence.slot)
                sequence.slot = -1
            self.unfinished.pop(entry, None)
            sequence.error = error
        else:
            entry.error = error
        entry.feed.end()
        wake([entry.feed])

    def _drop_cancelled(self) -> None:
        if not self.has_cancelled:
            return
        self.has_cancelled = False
        cancelled = [entry for entry in [*self.beginning, *self.running, *self.waiting] if entry.feed.is_cancelled]
        if cancelled:
            gone = set(cancelled)
            self.waiting = deque(entry for entry in self.waiting if entry not in gone)
        for entry in cancelled:
            if isinstance(entry, Entry):
                entry.sequence.finish_reason = "cancelled"
            self._end(entry)

    def _admit(self) -> None:
        """Gives free slots to those who wait."""
        while self.waiting and self.slots.free:
            first = self.waiting.popleft()
            if isinstance(first, Job):
                slots = sorted(self.slots.free)[: first.wanted]
                self.slots.forget(slots)
                first.run(slots)
                return  # the others wait for a step of those who run
            sequence = first.sequence
            if sequence.unscored:  # all of the prompt's logits are wanted
                sequence.slot, sequence.cached = self.slots.take(sequence.prompt[:0], 0)
                first.has_begun = True
            else:
                promised = self._promised(sequence.prompt, [*self.running, *self.beginning])
                sequence.slot, sequence.cached = self.slots.take(sequence.prompt, promised)
            self.beginning.append(first)

    def _promised(self, prompt: Int32Array, others: Sequence[Entry]) -> int:
        """How many tokens of a prompt could be copied from others, now or when their prompts are complete."""
        return max((reusable(other.sequence.prompt, prompt) for other in others), default=0)

    def _compute(self) -> None:
        if not self.beginning:
            if self.running:
                self._decode()
            return
        # Sequences of one request do not wait for each other's tokens.
        alternates = bool(self.running) and len(_distinct([*self.beginning, *self.running])) > 1
        if alternates and self._is_turn_of_running:
            self._decode()
        else:
            most = self._engine.prefill_chunk if alternates else self._engine.max_prefill_rows
            if self.beginning[0].sequence.unscored:
                self._score(most)
            else:
                self._prefill(most)

    def _prefill(self, most: int) -> None:
        """Computes up to `most` tokens of prompts, of the first ones first."""
        begin = perf_counter()
        self._is_turn_of_running = True
        parts: list[tuple[Entry, Int32Array]] = []
        for index, entry in enumerate(self.beginning):
            sequence = entry.sequence
            if sequence.unscored:
                continue
            if most > 0 and not entry.has_begun and self._begin(entry, self.beginning[:index]):
                most = max(most - sequence.cached // _COPIES, 1)
            if most > 0 and entry.has_begun:
                parts.append((entry, sequence.prompt[sequence.cached : sequence.cached + most]))
                most -= len(parts[-1][1])
        entries = [entry for entry, _ in parts]
        try:
            slots = [entry.sequence.slot for entry in entries]
            starts = [entry.sequence.cached for entry in entries]
            logits = self._engine.prefill([tokens for _, tokens in parts], slots, starts)
            complete: list[Entry | None] = []
            for entry, tokens in parts:
                sequence = entry.sequence
                sequence.cached += len(tokens)
                self.slots.held[sequence.slot] = sequence.prompt[: sequence.cached]
                complete.append(entry if sequence.cached == len(sequence.prompt) else None)
            found = self._next_tokens(logits, complete)
        except BaseException as error:
            self._fail(entries, error)
            return
        self._count(parts, perf_counter() - begin)
        for entry, _ in found:
            self.beginning.remove(entry)
            self.running.append(entry)
        self._deliver(found)

    def _score(self, most: int) -> None:
        """As `_prefill`, for prompts whose log-probabilities are wanted; their last tokens are left to `_prefill`."""
        begin = perf_counter()
        self._is_turn_of_running = True
        parts: list[tuple[Entry, Int32Array]] = []
        for entry in self.beginning:
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
            scores = self._engine.score([tokens for _, tokens in parts], slots, starts, targets, count)
        except BaseException as error:
            self._fail(entries, error)
            return
        self._count(parts, perf_counter() - begin)
        for (entry, tokens), found in zip(parts, scores, strict=True):
            sequence = entry.sequence
            sequence.cached += len(tokens)
            self.slots.held[sequence.slot] = sequence.prompt[: sequence.cached]
            try:
                sequence.add_scores(found)
            except GenerationError as error:
                self._fail([entry], error)

    def _count(self, parts: Sequence[tuple[Entry, Int32Array]], seconds: float) -> None:
        """Records that parts of prompts were computed."""
        for entry, tokens in parts:
            entry.sequence.stats.prompt_tokens += len(tokens)
            self.prompt_tokens += len(tokens)
        for stats in _distinct([entry for entry, _ in parts]):
            stats.prefill_seconds += seconds

    def _begin(self, entry: Entry, ahead: Sequence[Entry]) -> bool:
        """Copies the beginning of a prompt from another slot, unless one of those ahead will have more of it soon."""
        sequence = entry.sequence
        others = [slot for slot in range(len(self.slots.held)) if slot != sequence.slot]
        source, length = self.slots.longest(others, sequence.prompt)
        if self._promised(sequence.prompt, ahead) > max(length, sequence.cached):
            return False
        if length > sequence.cached:
            self._engine.copy_prefix(source, sequence.slot, length)
            sequence.cached = length
            self.slots.held[sequence.slot] = sequence.prompt[:length]
        entry.has_begun = True
        if sequence.cached:
            sequence.stats.prompt_tokens += sequence.cached
            sequence.stats.reused_tokens += sequence.cached
            self.prompt_tokens += sequence.cached
            self.reused_tokens += sequence.cached
            self.prefix_hits += 1
        return True

    def _decode(self) -> None:
        """Computes the next token of each running sequence, and those after it that were guessed right."""
        begin = perf_counter()
        self._is_turn_of_running = False
        entries = list(self.running)
        sequences = [entry.sequence for entry in entries]
        try:
            guesses = self.speculation.guess(sequences)
            found = self._next_tokens(self._call(sequences, guesses), entries, guesses)
        except BaseException as error:
            self._fail(entries, error)
            return
        seconds = perf_counter() - begin
        for stats in _distinct(entries):
            stats.decode_seconds += seconds
        for entry, tokens in found:
            entry.sequence.stats.decode_tokens += len(tokens)
        self._deliver(found)

    def _call(self, sequences: Sequence[TokenSequence], guesses: Sequence[list[int]]) -> Logits:
        """The logits of each sequence's last token, and after them those of its guesses."""
        lengths = [1 + len(guessed) for guessed in guesses]
        firsts = [sequence.length - 1 for sequence in sequences]
        ids = [[int(s.ids[first]), *guessed] for s, first, guessed in zip(sequences, firsts, guesses, strict=True)]
        places = [range(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
        token_ids, positions = (np.array([value for row in rows for value in row], np.int32) for rows in (ids, places))
        slots = np.repeat(np.array([sequence.slot for sequence in sequences], np.int32), lengths)
        is_plain = len(slots) == len(sequences) and not self.beginning
        ahead = is_plain and all(s.takes_argmax and s.room for s in sequences)
        begin = perf_counter()
        logits = self._engine.decode(token_ids, slots, positions, ahead=ahead)
        self.speculation.record(len(slots), perf_counter() - begin)
        return logits

    def _next_tokens(
        self, logits: Logits, entries: Sequence[Entry | None], guesses: Sequence[list[int]] | None = None
    ) -> list[tuple[Entry, list[Token]]]:
        """Chooses tokens for those rows of the logits that have an entry.

        An entry has a row, and one for each of its guesses; a row counts if the guesses before it are right. A sequence
        whose logits are not numbers ends alone.
        """
        guesses = [[]] * len(entries) if guesses is None else guesses
        choices = Choices(logits)
        chosen = np.full(len(entries) + sum(map(len, guesses)), -1, np.int32)
        pushed: list[tuple[Entry, list[str], int]] = []  # with the first row
        row = 0
        for entry, guessed in zip(entries, guesses, strict=True):
            if entry is not None:
                try:
                    texts = self._push(entry.sequence, choices, row, guessed)
                    end = entry.sequence.length
                    chosen[row : row + len(texts)] = entry.sequence.ids[end - len(texts) : end]
                    pushed.append((entry, texts, row))
                except Exception as error:
                    self._end(entry, error)
            row += 1 + len(guessed)
        counts = [e.sequence.options.logprobs for e, _, _ in pushed if e.sequence.options.logprobs is not None]
        scores = logits.logprobs(chosen, max(counts)) if counts else None
        found = []
        for entry, texts, row in pushed:
            tokens = [Token(int(chosen[row + i]), text) for i, text in enumerate(texts)]
            count = entry.sequence.options.logprobs
            if scores is not None and count is not None:
                tokens = [replace(t, logprobs=scores.token(row + i, t.id, count)) for i, t in enumerate(tokens)]
                entry.sequence.logprobs += [token.logprobs for token in tokens if token.logprobs is not None]
            found.append((entry, tokens))
        return found

    def _push(self, sequence: TokenSequence, choices: Choices, row: int, guessed: list[int]) -> list[str]:
        """Appends the tokens of a sequence's rows, the first of which is `row`; returns their texts."""
        texts: list[str] = []
        for guess in [*guessed, None]:
            token_id = choices.token(row + len(texts), sequence)
            texts.append(sequence.push(token_id))
            if token_id != guess or sequence.finish_reason is not None:
                break
        self.speculation.count(sequence, len(guessed), len(texts) - 1)
        return texts

    def _deliver(self, found: list[tuple[Entry, list[Token]]]) -> None:
        """Gives new tokens to those who wait for them, and ends sequences."""
        now = perf_counter()
        self.last = len(found)
        self.generated_tokens += sum(len(tokens) for _, tokens in found)
        for entry, tokens in found:
            sequence = entry.sequence
            stats = sequence.stats
            if not stats.first_token_seconds:
                stats.first_token_seconds = now - sequence.begin
            for token in tokens:
                entry.feed.put(token)
            if sequence.finish_reason is not None:
                self._end(entry)
        wake(entry.feed for entry, _ in found)

    def _fail(self, entries: Sequence[Entry], error: BaseException) -> None:
        """Ends entries whose call failed; their slots may hold anything."""
        self.slots.forget(entry.sequence.slot for entry in entries if entry.sequence.slot >= 0)
        for entry in entries:
            if not entry.feed.is_ended:
                self._end(entry, error)


def _distinct(entries: Sequence[Entry]) -> list[GenerationStats]:
    """The statistics of all requests that have a part in these entries."""
    return list({id(entry.sequence.stats): entry.sequence.stats for entry in entries}.values())
