"""Long loops: Mesa's CPU driver silently ends them after 65,535 rounds.

It counts the rounds of all loops of an invocation together. If constant extents add up to more, the loops with the most
rounds get several bodies per round.
"""

from __future__ import annotations

from typing import NamedTuple

_MOST_ROUNDS = 60_000
# The most bodies per original body, over all loops of a kernel together.
_MOST_COPIES = 128


class Loop(NamedTuple):
    """A loop: its variable's handle, its extent, how often it starts, and whether its body may be repeated."""

    handle: int
    extent: int
    starts: int
    repeatable: bool


def copies(loops: list[Loop]) -> dict[int, int]:
    """Handle -> bodies per round, for loops that need more than one. None if that would not be enough."""
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
