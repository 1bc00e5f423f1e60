"""Loops of many rounds: Mesa's processor driver ends them without a word after 65,535 rounds.

It counts the rounds of all loops of an invocation together. Where constant extents say that there are more, the loops
with the most rounds get several bodies a round.
"""

from __future__ import annotations

from typing import NamedTuple

_MOST_ROUNDS = 60_000
# Bodies that a kernel may get for one, of all its loops together.
_MOST_COPIES = 128


class Loop(NamedTuple):
    """A loop: its variable's handle, its extent, how often it is started, and whether its body may be repeated."""

    handle: int
    extent: int
    starts: int
    repeatable: bool


def copies(loops: list[Loop]) -> dict[int, int]:
    """Handle -> bodies a round, for loops that have to have more than one. None where that would not be enough."""
    bodies: dict[int, int] = {}
    rounds = {loop.handle: loop.starts * loop.extent for loop in loops}
    left = _MOST_COPIES
    for loop in sorted(loops, key=lambda loop: -loop.starts * loop.extent):
        surplus = sum(rounds.values()) - _MOST_ROUNDS
        if surplus <= 0:
            return bodies
        own = rounds[loop.handle]
        count = min(loop.extent, -(-own // max(own - surplus, 1)))
        if loop.repeatable and 1 < count <= left:
            left //= count
            bodies[loop.handle] = count
            rounds[loop.handle] = 0 if count == loop.extent else loop.starts * (loop.extent // count)
    return bodies if sum(rounds.values()) <= _MOST_ROUNDS else {}
