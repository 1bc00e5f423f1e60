"""Work on tensors that threads do while the one before is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tvm_attn.runtime.machine import usable_cores

T = TypeVar("T")


def ahead(started: Iterable[T]) -> Iterator[T]:
    """The items, whose iterator starts work on each: as many are started before they are wanted as there are cores."""
    waiting: deque[T] = deque()
    most = usable_cores()
    for item in started:
        waiting.append(item)
        if len(waiting) > most:
            yield waiting.popleft()
    yield from waiting
