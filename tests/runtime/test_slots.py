"""Slots that several threads want: every waiting thread gets some, and nobody waits for a stream."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.slots import SlotPool


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], object]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)


def test_slots_are_given_back_in_any_order() -> None:
    pool = SlotPool(5)
    with ExitStack() as first, ExitStack() as second:
        assert first.enter_context(pool.lease(2)).slots == [0, 1]
        assert second.enter_context(pool.lease(2)).slots == [2, 3]
        first.close()
        with pool.lease(4) as lease:
            assert lease.slots == [0, 1, 4]
    assert pool.free == [0, 1, 2, 3, 4]
    with pool.lease(5), pool.lease(0) as none:
        assert none.slots == []


def test_calls_wait_for_calls_in_their_order() -> None:
    pool, order = SlotPool(3), list[str]()

    def call(name: str, wanted: int) -> None:
        with pool.lease(wanted) as lease:
            order.append(f"{name}{len(lease.slots)}")

    with ExitStack() as held:
        held.enter_context(pool.lease(3))
        threads = []
        for count, (name, wanted) in enumerate([("a", 3), ("b", 1), ("c", 2)], start=1):
            threads.append(in_thread(lambda name=name, wanted=wanted: call(name, wanted)))
            wait_for(lambda count=count: len(pool._waiting) == count)
        assert order == []
    for thread in threads:
        thread.join()
    assert order[0] == "a3" and sorted(name[0] for name in order) == ["a", "b", "c"]
    assert pool.free == [0, 1, 2] and pool._waiting == []


@pytest.mark.parametrize("is_stream", [False, True])
def test_nobody_waits_for_a_stream(is_stream: bool) -> None:
    pool, found = SlotPool(2), list[object]()

    def want() -> None:
        try:
            with pool.lease(1, is_stream=is_stream):
                found.append("a slot")
        except GenerationError as error:
            found.append(error)

    with pool.lease(1, is_stream=True):
        with ExitStack() as call:
            call.enter_context(pool.lease(1))
            waiting = in_thread(want)
            wait_for(lambda: pool._waiting)
        waiting.join()
        assert found == ["a slot"]
        with pool.lease(1, is_stream=True):
            in_thread(want).join()
            assert "every KV-cache slot is taken by an unfinished stream" in str(found[1])
            want()
            assert "every KV-cache slot is taken" in str(found[2])
    assert pool.free == [0, 1]


def test_a_thread_does_not_wait_for_itself() -> None:
    """As a signal handler would that generates while its thread does."""
    pool = SlotPool(1)
    with pool.lease(1), pytest.raises(GenerationError, match="every KV-cache slot"), pool.lease(1):
        pass
    assert pool.free == [0] and pool._waiting == []


def test_those_who_wait_learn_that_only_streams_are_left() -> None:
    pool, failed = SlotPool(1), list[str]()
    streams: list[Iterator[None]] = []

    def stream() -> Iterator[None]:
        with pool.lease(1, is_stream=True):
            yield

    def want() -> None:
        try:
            with pool.lease(1):
                pass
        except GenerationError as error:
            failed.append(str(error))

    def open_stream() -> None:
        streams.append(stream())
        next(streams[0])

    with ExitStack() as call:
        call.enter_context(pool.lease(1))
        first = in_thread(open_stream)
        wait_for(lambda: len(pool._waiting) == 1)
        second = in_thread(want)
        wait_for(lambda: len(pool._waiting) == 2)
    first.join()
    second.join()
    assert len(failed) == 1 and pool.free == []
    streams.clear()
    assert pool.free == [0]


def test_an_exception_while_waiting_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, done = SlotPool(1), list[str]()

    def interrupted() -> None:
        try:
            with pool.lease(1):
                pass
        except KeyboardInterrupt:
            done.append("interrupted")

    def patient() -> None:
        with pool.lease(1):
            done.append("patient")

    with pool.lease(1):
        first = in_thread(interrupted)
        wait_for(lambda: len(pool._waiting) == 1)
        second = in_thread(patient)
        wait_for(lambda: len(pool._waiting) == 2)

        def wait() -> None:
            raise KeyboardInterrupt

        lease = pool._waiting[0]
        lease.wait = wait  # type: ignore[method-assign]
        lease.wake()
        first.join()
        assert done == ["interrupted"] and len(pool._waiting) == 1
    second.join()
    assert done == ["interrupted", "patient"] and pool.free == [0]


def test_a_stream_in_a_cycle_is_given_back_by_the_collector() -> None:
    pool = SlotPool(3)

    def stream() -> Iterator[None]:
        with pool.lease(1, is_stream=True):
            yield

    for _ in range(10):
        cycle: list[object] = [stream()]
        next(cycle[0])  # type: ignore[call-overload]
        cycle.append(cycle)
        del cycle
        gc.collect()
        with pool.lease(3) as lease:
            assert lease.slots == [0, 1, 2]


def test_a_forked_child_has_the_slots_of_threads_that_it_has_not() -> None:
    pool = SlotPool(3)
    with ExitStack() as own, ExitStack() as other:
        kept = own.enter_context(pool.lease(1))
        leases = []
        in_thread(lambda: leases.append(other.enter_context(pool.lease(2, is_stream=True)))).join()
        pool.after_fork_in_child()
        assert pool.free == [1, 2] and leases[0].is_lost and not kept.is_lost
        with pool.lease(2) as lease:
            other.close()
            assert pool.free == [] and lease.slots == [1, 2]
    assert pool.free == [0, 1, 2]
