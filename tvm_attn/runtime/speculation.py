"""Speculation: tokens are guessed, and one call of the model checks several of them. It changes no result.

Decode is bound by reading the weights, so rows that are added to a call cost little. A sequence's last token and its
guesses are rows of one call, at consecutive positions of its slot. Then the sequence takes tokens from their logits,
one after the other, exactly as without guesses: with the same options, penalties and random numbers. A guess that is
the token that was taken is right, and the row after it counts; the first wrong one ends the step. Keys and values of
wrong guesses lie behind the end of the sequence, where nothing reads them before they are written again.

So what comes out is the same, bit by bit, where the logits of a row do not depend on the other rows, as on processors.
That is more than the method of Leviathan et al. 2023 ("Fast Inference from Transformers via Speculative Decoding")
promises, which keeps the distribution.

There are two kinds of guesses:

| | |
|---|---|
| prompt | what followed the last time that the sequence had its last two or three tokens (prompt lookup) |
| draft | what a copy of the model with fewer bits would generate; it reads the keys and values of the model itself |

Both are made only while they pay: the times of the calls are measured, and how often guesses are right.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median
from time import perf_counter

import numpy as np

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.decoding import Choices, Engine, Speculate, TokenSequence

_GRAMS = (3, 2)
"""Numbers of tokens that are looked up, the longest first."""
_DECAY = 0.8
"""What a guess counts after another step, against one of now."""
_PRIOR = 1.6, 0.4
"""Guesses that count as right and wrong before the first one."""
_GAIN = 1.02
"""A speed at which guesses pay, against that without them."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 4, 256
_TRIED = 2
"""Tokens that a draft guesses after a pause."""
_UNKNOWN_DRAFT = 0.3
"""What a call of the draft costs against one of the model, before it was measured."""
_PLAIN_EVERY = 64
"""Calls with guesses after which one goes without, to measure it again."""


class Lookup:
    """Finds what followed the last tokens of a sequence when they occurred before.

    Args:
        sequence: the sequence; its ids may grow.
    """

    def __init__(self, sequence: TokenSequence) -> None:
        self._sequence = sequence
        self._after: dict[tuple[int, ...], int] = {}  # where the latest occurrence of some tokens ended
        self._known = 0

    def find(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next."""
        length = self._sequence.length
        ids = self._sequence.ids[max(self._known - max(_GRAMS), 0) : length].tolist()
        first = length - len(ids)
        for end in range(self._known, length):
            for size in _GRAMS:
                if size <= end:
                    self._after[tuple(ids[end - size - first : end - first])] = end
        self._known = length
        for size in _GRAMS:
            place = self._after.get(tuple(ids[-size:]))
            if place is not None and size < length:
                found = self._sequence.ids[place : min(place + most, length)].tolist()
                period = length - place  # what would come after the end is what was found at the beginning
                return [found[index % period] for index in range(most)]
        return []


class Guesser:
    """What is known of one sequence's guesses.

    Args:
        sequence: the sequence.
        kind: "prompt", "draft" or "off".

    Attributes:
        is_trying: whether a pause was made since the last guess: the next one is made in any case.
    """

    def __init__(self, sequence: TokenSequence, kind: Speculate) -> None:
        self.kind = kind
        self.lookup = Lookup(sequence)
        self._right, self._wrong = _PRIOR
        self._pause = _SHORTEST_PAUSE
        self._wait = -1
        self.is_trying = False

    def expected(self, guesses: int) -> float:
        """How many tokens a step with so many guesses will probably give."""
        rate = self._right / (self._right + self._wrong)
        return (1 - rate ** (guesses + 1)) / (1 - rate)

    def count(self, guesses: int, right: int) -> None:
        """Counts the guesses of a step, and those of them that were right before the first wrong one."""
        self._right = _DECAY * self._right + right
        self._wrong = _DECAY * self._wrong + (right < guesses)
        self.is_trying = False
        if right:
            self._pause = _SHORTEST_PAUSE

    def pause(self, is_long: bool = False) -> None:
        """Makes no guesses for some steps, each time longer until one is right; then guesses once in any case."""
        self._wait = _LONGEST_PAUSE if is_long else self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self.is_trying = True

    def is_waiting(self) -> bool:
        """Whether this step, one after the last, is in a pause."""
        self._wait = max(self._wait - 1, -1)
        return self._wait >= 0


class Speculation:
    """Guesses for the sequences of an engine. For the thread that makes the engine's calls.

    Args:
        engine: the model.

    Attributes:
        default: what sequences with the option "auto" do.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.default: Speculate = "auto"
        # Seconds of the last calls, by whether they are the draft's and their row groups; 0 stands for a single row.
        self._seconds: defaultdict[tuple[bool, int], deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self._since_plain = 0

    def kind(self, wanted: Speculate) -> Speculate:
        """What a sequence with this option does: "prompt", "draft" or "off".

        Raises:
            GenerationError: the model or its device cannot do what is wanted.
        """
        wanted = self.default if wanted == "auto" else wanted
        if wanted == "off" or (wanted == "auto" and self._engine.verified_rows < 2):
            return "off"
        if self._engine.verified_rows < 2:
            raise GenerationError(f"speculate={wanted!r} is for processors, not for this device; leave it out")
        if self._engine.draft is None:
            if wanted == "draft":
                message = "there is no draft; build the artifact with --draft int4, and load it with its draft"
                raise GenerationError(f"speculate='draft': {message}")
            return "off" if wanted == "auto" else wanted
        return "draft" if wanted == "auto" else wanted

    def guess(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Tokens that may come next in each sequence, perhaps none. With the last tokens, one call takes them all."""
        guesses: list[list[int]] = [[] for _ in sequences]
        rows, count = self._engine.verified_rows, len(sequences)
        # A lone sequence has kernels of its own for a row; others leave rows of their last group unused.
        spare = rows - 1 if count == 1 else -count % rows
        if rows < 2 or not spare:
            return guesses
        wanted: list[tuple[int, Guesser]] = []
        for index, sequence in enumerate(sequences):
            if sequence.guesser is None:
                sequence.guesser = Guesser(sequence, self.kind(sequence.options.speculate))
            if sequence.guesser.kind != "off" and not sequence.guesser.is_waiting() and sequence.room:
                wanted.append((index, sequence.guesser))
        if not wanted or (count == 1 and self._is_plain_due()):
            return guesses
        wanted = wanted[:spare]
        most = spare // len(wanted)
        drafted: list[tuple[int, Guesser]] = []
        for index, guesser in wanted:
            if guesser.kind == "draft":
                drafted.append((index, guesser))
            else:
                guesses[index] = self._look_up(sequences[index], guesser, min(most, sequences[index].room), count)
        length = self._draft_length([guesser for _, guesser in drafted], most, count)
        self._draft(sequences, guesses, {index: min(length, sequences[index].room) for index, _ in drafted})
        return guesses

    def count(self, sequence: TokenSequence, guesses: int, right: int) -> None:
        """Counts a step of a sequence: its guesses, and how many of them were right."""
        if sequence.guesser is not None and guesses:
            sequence.guesser.count(guesses, right)
            sequence.stats.guessed_tokens += guesses
            sequence.stats.accepted_tokens += right

    def record(self, rows: int, seconds: float, is_draft: bool = False) -> None:
        """Remembers how long a call of so many rows took."""
        self._seconds[is_draft, self._groups(rows)].append(seconds)
        if rows == 1 and not is_draft:
            self._since_plain = 0

    def _groups(self, rows: int) -> int:
        return 0 if rows == 1 else -(-rows // max(self._engine.verified_rows, 1))

    def _is_plain_due(self) -> bool:
        """Whether a call of one row has to be measured: first, and from time to time."""
        self._since_plain += 1
        return len(self._seconds[False, 0]) < 2 or self._since_plain > _PLAIN_EVERY

    def _cost(self, key: tuple[bool, int], count: int, unknown: float) -> float:
        """The seconds of a call over those of a plain one for `count` sequences."""
        times, plain = self._seconds[key], self._seconds[False, self._groups(count)]
        # The first call may have prepared something.
        return median(times) / median(plain) if len(times) > 1 and plain else unknown

    def _checking(self, count: int) -> float:
        """What a call that checks guesses costs; for several sequences it is the same call."""
        return self._cost((False, 1), count, 1.0) if count == 1 else 1.0

    def _look_up(self, sequence: TokenSequence, guesser: Guesser, most: int, count: int) -> list[int]:
        found = guesser.lookup.find(most)
        if found and not guesser.is_trying and guesser.expected(len(found)) < _GAIN * self._checking(count):
            guesser.pause()
            return []
        return found

    def _draft_length(self, guessers: Sequence[Guesser], most: int, count: int) -> int:
        """How many tokens a draft should guess for each of these sequences."""
        if not guessers:
            return 0
        checking = self._checking(count)
        drafting = self._cost((True, self._groups(len(guessers))), count, _UNKNOWN_DRAFT)

        def speed(gained: float, length: int) -> float:
            return (count + gained) / (count * (checking + length * drafting)) if length else _GAIN

        lengths = range(most + 1)
        best = max(lengths, key=lambda length: speed(sum(g.expected(length) - 1 for g in guessers), length))
        if not best and any(guesser.is_trying for guesser in guessers):
            return min(most, _TRIED)
        if not best:
            # If it would not pay with every guess right, it is not worth a try soon.
            is_hopeless = max(speed(len(guessers) * length, length) for length in lengths) <= _GAIN
            for guesser in guessers:
                guesser.pause(is_hopeless)
        return best

    def _draft(self, sequences: Sequence[TokenSequence], guesses: list[list[int]], lengths: dict[int, int]) -> None:
        """Lets the draft continue some sequences by so many tokens, one a call."""
        draft = self._engine.draft
        step = 0
        while active := [index for index, length in lengths.items() if step < length]:
            assert draft is not None
            chosen = [sequences[index] for index in active]
            last = [sequence.length - 1 + step for sequence in chosen]
            token_ids = np.array([s.ids[place] for s, place in zip(chosen, last, strict=True)], np.int32)
            slots = np.array([sequence.slot for sequence in chosen], np.int32)
            begin = perf_counter()
            choices = Choices(draft.decode(token_ids, slots, np.array(last, np.int32)))
            self.record(len(active), perf_counter() - begin, is_draft=True)
            for row, index in enumerate(active):
                sequence = sequences[index]
                try:
                    token_id = choices.token(row, sequence, step)
                except GenerationError:  # its logits are not numbers
                    token_id = -1
                if token_id < 0:
                    del lengths[index]
                    continue
                guesses[index].append(token_id)
                sequence.ids[sequence.length + step] = token_id
            step += 1
