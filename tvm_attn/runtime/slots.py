"""The KV-cache slots of an engine, handed out to calls and streams of any number of threads."""

from __future__ import annotations

import os
import weakref
from _thread import allocate_lock
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.worker import refuse_at_the_end


class Lease:
    """Slots in use by a call or by a stream.

    Attributes:
        slots: their numbers, ascending.
        thread: the thread that took them.
        is_stream: whether they are returned only when somebody advances or closes a stream, not by themselves.
        is_lost: whether the thread that took them was left behind by a fork.
    """

    def __init__(self, is_stream: bool) -> None:
        self.slots: list[int] = []
        self.thread, self.is_stream, self.is_lost = get_ident(), is_stream, False
        self._news = allocate_lock()
        self._news.acquire()

    def wait(self) -> None:
        """Waits for `wake`, unless it has been called."""
        self._news.acquire()

    def wake(self) -> None:
        """Ends `wait`; two threads must not call it at once."""
        if self._news.locked():
            self._news.release()


class SlotPool:
    """The slots of an engine.

    Nobody waits for a stream: the thread that would have to advance it may be the one that waits.
    """

    def __init__(self, count: int) -> None:
        self._leases: list[Lease | None] = [None] * count
        self._waiting: list[Lease] = []
        # Reentrant, and lists are changed in place: garbage collection may close a stream in between.
        self._lock = RLock()
        _pools.add(self)

    @property
    def free(self) -> list[int]:
        """The slots that nobody uses, ascending."""
        return [slot for slot, lease in enumerate(self._leases) if lease is None]

    @contextmanager
    def lease(self, wanted: int, *, is_stream: bool = False) -> Iterator[Lease]:
        """Up to `wanted` slots, returned at the end.

        Waits while calls of other threads hold all slots that streams leave; first come, first served.

        Raises:
            GenerationError: streams hold all slots.
        """
        lease = Lease(is_stream)
        try:
            while not self._take(lease, wanted):
                lease.wait()
            yield lease
        finally:
            self._give_back(lease)

    def _take(self, lease: Lease, wanted: int) -> bool:
        """Takes slots if some are free and nobody else was first; otherwise joins the queue and returns False."""
        refuse_at_the_end()
        with self._lock:
            is_first = not self._waiting or self._waiting[0] is lease
            slots = self.free[:wanted]
            if is_first and (slots or not wanted):
                for slot in slots:
                    self._leases[slot] = lease
                lease.slots = slots
                self._leave_queue(lease)
                return True
            if is_first and all(taken.is_stream or taken.thread == lease.thread for taken in self._leases if taken):
                raise GenerationError("every KV-cache slot is taken by an unfinished stream; finish one or close() it")
            if lease not in self._waiting:
                self._waiting.append(lease)
            return False

    def _give_back(self, lease: Lease) -> None:
        with self._lock:
            for slot, taken in enumerate(self._leases):
                if taken is lease:
                    self._leases[slot] = None
            self._leave_queue(lease)

    def _leave_queue(self, lease: Lease) -> None:
        if lease in self._waiting:
            self._waiting.remove(lease)
        if self._waiting:
            self._waiting[0].wake()

    def after_fork_in_child(self) -> None:
        """Frees the slots of threads that do not exist in the child."""
        self._lock, self._waiting = RLock(), []
        for slot, lease in enumerate(self._leases):
            if lease is not None and lease.thread != get_ident():
                lease.is_lost = True
                self._leases[slot] = None


_pools: weakref.WeakSet[SlotPool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
