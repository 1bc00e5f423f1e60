"""Engines without a compiled model, which check every call against the rules of the cache."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tvm_attn.config import GPT2Config
from tvm_attn.runtime.logprobs import RowLogprobs
from tvm_attn.runtime.tokenizer import Tokenizer
from tvm_attn.runtime.worker import Worker

VOCAB, CONTEXT = 257, 40
EOS = 256


class HostLogits:
    """Logits that record what was asked of them."""

    def __init__(self, rows: np.ndarray, asked: list[str]) -> None:
        self.rows = rows.astype(np.float32)
        self.asked = asked

    def numpy(self) -> np.ndarray:
        self.asked.append("numpy")
        return self.rows

    def argmax(self) -> np.ndarray:
        self.asked.append("argmax")
        found = self.rows.argmax(-1).astype(np.int32)
        return np.where(np.isnan(self.rows).any(-1), np.int32(-1), found)

    def logprobs(self, token_ids: np.ndarray, count: int) -> RowLogprobs:
        self.asked.append("logprobs")
        return row_logprobs(self.rows, token_ids, count)


def row_logprobs(rows: np.ndarray, token_ids: np.ndarray, count: int) -> RowLogprobs:
    """From NumPy's float64."""
    logits = rows.astype(np.float64)
    every = logits - logits.max(-1, keepdims=True)
    every -= np.log(np.exp(every).sum(-1, keepdims=True))
    ids = np.argsort(-every, axis=-1, kind="stable")[:, :count].astype(np.int32)
    chosen = every[np.arange(len(rows)), np.maximum(token_ids, 0)]
    return RowLogprobs(chosen, ids, np.take_along_axis(every, ids, -1))


class FakeEngine:
    """The bookkeeping of an engine: checks every call against the cache's rules and records it."""

    def __init__(self, config: GPT2Config, max_batch: int) -> None:
        self.config = config
        self.max_batch = max_batch
        self.cache: dict[int, list[int]] = {}
        self.calls: list[tuple[str, list[int]]] = []
        self.asked: list[str] = []
        self.pauses: dict[int, threading.Event] = {}
        self.max_prefill_rows, self.prefill_chunk, self.writes = config.n_positions, 8, 0
        self.verified_rows = 1
        self.draft: FakeEngine | None = None
        self.post = Worker("test").post

    def prefill(self, prompts: Sequence[np.ndarray], slots: Sequence[int], starts: Sequence[int]) -> HostLogits:
        assert sum(map(len, prompts)) <= self.max_prefill_rows
        for prompt, slot, start in zip(prompts, slots, starts, strict=True):
            assert prompt.dtype == np.int32 and 1 <= len(prompt) <= self.config.n_positions - start
            assert len(self.cache.get(slot, [])) >= start
            self.cache[slot] = self.cache.get(slot, [])[:start] + prompt.tolist()
        return self._logits("prefill", list(slots))

    def decode(
        self, token_ids: np.ndarray, slots: np.ndarray, positions: np.ndarray, *, ahead: bool = False
    ) -> HostLogits:
        assert not ahead or (positions + 1 < self.config.n_positions).all()
        assert token_ids.dtype == slots.dtype == positions.dtype == np.int32
        rows: list[np.ndarray] = []
        kept: dict[int, list[int]] = {}
        for token_id, slot, position in zip(token_ids.tolist(), slots.tolist(), positions.tolist(), strict=True):
            # The rows of a slot follow one another; they may overwrite wrong guesses.
            before = kept.get(slot, self.cache[slot][:position])
            assert position == len(before) < self.config.n_positions
            kept[slot] = [*before, token_id]
            rows.append(self.next_logits(kept[slot]))
        self.cache |= kept
        assert max(Counter(slots.tolist()).values()) <= self.verified_rows
        logits = self._logits("decode", list(kept))
        return HostLogits(np.stack(rows), self.asked) if len(rows) > len(kept) else logits

    def score(
        self,
        prompts: Sequence[np.ndarray],
        slots: Sequence[int],
        starts: Sequence[int],
        targets: Sequence[np.ndarray],
        count: int = 0,
    ) -> list[RowLogprobs]:
        self.prefill(prompts, slots, starts)
        self.calls[-1] = ("score", list(slots))
        results = []
        for prompt, slot, start, target in zip(prompts, slots, starts, targets, strict=True):
            assert len(prompt) == len(target) >= 1
            rows = [self.next_logits(self.cache[slot][: start + i + 1]) for i in range(len(prompt))]
            results.append(row_logprobs(np.stack(rows), target, count))
        return results

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        assert len(self.cache[source]) >= length and source != target
        self.cache[target] = self.cache[source][:length]
        self.calls.append(("copy", [source, target]))

    @contextmanager
    def pause_at(self, number: int) -> Iterator[None]:
        """Lets call `number` from now on wait until the end of the block."""
        self.pauses[len(self.calls) + number] = event = threading.Event()
        try:
            yield
        finally:
            event.set()

    def _logits(self, name: str, slots: list[int]) -> HostLogits:
        assert len(set(slots)) == len(slots) <= self.max_batch
        assert all(0 <= slot < self.max_batch for slot in slots)
        self.calls.append((name, slots))
        if len(self.calls) in self.pauses:
            self.pauses.pop(len(self.calls)).wait()
        return HostLogits(np.stack([self.next_logits(self.cache[slot]) for slot in slots]), self.asked)

    def next_logits(self, token_ids: list[int]) -> np.ndarray:
        raise NotImplementedError


class ScriptedEngine(FakeEngine):
    """Answers a prompt that starts with id i with the tokens of script i, then with EOS forever."""

    def __init__(self, scripts: list[list[int]], max_batch: int = 4, **config: Any) -> None:
        super().__init__(
            GPT2Config(**{"vocab_size": VOCAB, "n_positions": CONTEXT, "eos_token_id": EOS} | config), max_batch
        )
        self.scripts = scripts
        self.prompt_length = 1

    def next_logits(self, token_ids: list[int]) -> np.ndarray:
        script = self.scripts[token_ids[0]]
        step = len(token_ids) - self.prompt_length
        logits = np.zeros(self.config.vocab_size)
        logits[script[step] if step < len(script) else EOS] = 1
        return logits


def byte_tokenizer() -> Tokenizer:
    """Byte-level without merges: one token per byte, so that every stop string and most characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = LibraryTokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(library.to_str())


def scripted(tokenizer: Tokenizer, *texts: str, **config: Any) -> ScriptedEngine:
    return ScriptedEngine([tokenizer.encode(text) for text in texts], **config)


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits until something is so; fails after a time in which it would be on any machine."""
    pause = threading.Event()
    for _ in range(60_000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("waited in vain")
