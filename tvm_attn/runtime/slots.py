"""The KV-cache slots of an engine: which are free, and which prompts they hold.

A slot that was given back keeps its keys and values, so that a later prompt with the same beginning need not compute
them again. Only tokens of prompts count: those that were decoded went through other kernels, and another order of
additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

SHORTEST_PREFIX = 32
"""A common beginning of fewer tokens is not worth a copy, nor waiting for the prompt that computes it."""


_NOTHING = np.empty(0, np.int32)


def reusable(held: Int32Array, prompt: Int32Array) -> int:
    """How many tokens of a prompt (T,) need not be computed where `held`, (L,), is in the cache: 0, or at least
    `SHORTEST_PREFIX`, and never the last, whose logits are wanted."""
    n = SHORTEST_PREFIX
    if len(held) < n or len(prompt) <= n or held[:n].tobytes() != prompt[:n].tobytes():
        return 0
    length = min(len(held), len(prompt) - 1)
    differs = held[:length] != prompt[:length]
    return int(differs.argmax()) if differs.any() else length


class Slots:
    """The slots, numbered from 0. For one thread.

    Args:
        count: number of slots.

    Attributes:
        free: the free ones, those first that were given back first.
        held: for each slot, the prompt ids whose keys and values it holds from position 0 on, (L,) int32.
    """

    def __init__(self, count: int) -> None:
        self.free = list(range(count))
        self.held = [_NOTHING] * count

    def forget(self, slots: Iterable[int] | None = None) -> None:
        """Records that these slots, or all, may hold anything."""
        for slot in range(len(self.held)) if slots is None else slots:
            self.held[slot] = _NOTHING

    def longest(self, slots: Sequence[int], prompt: Int32Array) -> tuple[int, int]:
        """Which of some slots holds most reusable tokens of a prompt, and how many; slot -1 if none holds any."""
        lengths = [reusable(self.held[slot], prompt) for slot in slots]
        most = max(lengths, default=0)
        return (slots[lengths.index(most)] if most else -1), most

    def take(self, prompt: Int32Array, promised: int) -> tuple[int, int]:
        """Takes a free slot for a prompt; returns it and how many of the prompt's tokens it holds.

        `promised` is how many could be copied from slots in use. If these are more, a slot is taken that holds no
        prompt, or was given back first.
        """
        slot, length = self.longest(self.free, prompt)
        if length < max(promised, 1):
            empty = [slot for slot in self.free if len(self.held[slot]) < SHORTEST_PREFIX]
            slot, length = min(empty, default=self.free[0]), 0
        self.free.remove(slot)
        self.held[slot] = prompt[:length]
        return slot, length

    def give_back(self, slot: int) -> None:
        """Makes a slot free; it keeps what it holds."""
        self.free.append(slot)
