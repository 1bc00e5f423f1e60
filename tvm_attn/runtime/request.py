"""One sequence as its consumers see it: threads and asyncio tasks that wait for its tokens."""

from __future__ import annotations

from _thread import allocate_lock
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import TYPE_CHECKING

from tvm_attn.runtime.decoding import Completion, GenerationStats, TokenSequence
from tvm_attn.runtime.logprobs import TokenLogprobs

if TYPE_CHECKING:
    import asyncio


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: its id.
        text: the text that is final with it; "" while a character is incomplete or may belong to a stop string.
        logprobs: its log-probability and the best ones, if they were asked for.
    """

    id: int
    text: str
    logprobs: TokenLogprobs | None = None


class Feed:
    """Takes tokens from the thread that computes them to those who wait, without a lock that both sides need.

    Args:
        keeps_tokens: whether somebody may read tokens; otherwise only the end is told.

    Attributes:
        thread: the thread that started the sequence or last read from it.
        is_ended: whether no more tokens follow.
        is_cancelled: whether nobody wants more tokens.
    """

    def __init__(self, keeps_tokens: bool) -> None:
        self.thread = get_ident()
        self.is_ended = self.is_cancelled = False
        self._tokens: SimpleQueue[Token | None] | None = SimpleQueue() if keeps_tokens else None
        self._end = allocate_lock()
        self._end.acquire()
        self._readers: list[asyncio.Future[None]] = []  # tasks that wait for a token
        self._waiters: list[asyncio.Future[None]] = []  # and for the end

    def put(self, token: Token) -> None:
        """Adds a token."""
        if self._tokens is not None:
            self._tokens.put(token)

    def end(self) -> None:
        """Says that no more tokens follow."""
        self.is_ended = True
        if self._tokens is not None:
            self._tokens.put(None)
        self._end.release()

    def get(self) -> Token | None:
        """The next token, as soon as there is one; None at the end."""
        assert self._tokens is not None
        self.thread = get_ident()
        return self._checked(self._tokens.get())

    def _checked(self, token: Token | None) -> Token | None:
        if token is None:
            assert self._tokens is not None
            self._tokens.put(None)  # for those who ask again
        return token

    async def next(self) -> Token | None:
        """As `get`, for a task."""
        assert self._tokens is not None
        self.thread = get_ident()
        while True:
            try:
                return self._checked(self._tokens.get_nowait())
            except Empty:
                await self._news(self._readers, lambda: not self._tokens.empty())  # type: ignore[union-attr]

    def wait(self, timeout: float | None) -> None:
        """Waits for the end.

        Raises:
            TimeoutError: it has not come within `timeout` seconds.
        """
        self.thread = get_ident()
        if not self._end.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError(f"the request has not ended within {timeout} s")
        self._end.release()

    async def wait_async(self) -> None:
        """As `wait`, for a task."""
        self.thread = get_ident()
        while not self.is_ended:
            await self._news(self._waiters, lambda: self.is_ended)

    @staticmethod
    async def _news(futures: list[asyncio.Future[None]], has_come: Callable[[], bool]) -> None:
        import asyncio  # only where it is used: it takes longer to import than the rest of the runtime's Python

        future = asyncio.get_running_loop().create_future()
        futures.append(future)
        # What came before the future was seen by nobody; what comes after it wakes it.
        if not has_come():
            await future

    def take_woken(self) -> list[asyncio.Future[None]]:
        """The futures of tasks that have something to see now."""
        woken: list[asyncio.Future[None]] = []
        while self._readers:
            woken.append(self._readers.pop())
        while self.is_ended and self._waiters:
            woken.append(self._waiters.pop())
        return woken


def wake(feeds: Iterable[Feed]) -> None:
    """Wakes the tasks that wait for these feeds, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for feed in feeds:
        for future in feed.take_woken():
            loops.setdefault(future.get_loop(), []).append(future)
    for loop, futures in loops.items():
        with suppress(RuntimeError):  # the loop is closed, and its tasks with it
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Request:
    """One sequence that a scheduler computes, whether or not somebody reads it: at most `max_new_tokens` tokens wait.

    Iterating, with `for` or `async for`, gives each `Token` once, as soon as it is there; `result` and `wait` give the
    whole completion in any case. A request that nobody refers to any more is cancelled.

    Attributes:
        prompt_ids: the ids of the prompt.
        stats: counts and times, filled in while it runs.
    """

    def __init__(
        self, sequence: TokenSequence, feed: Feed, resume: Callable[[], None], cancel: Callable[[], None]
    ) -> None:
        self._sequence, self._feed, self._resume, self._cancel = sequence, feed, resume, cancel
        self.stats: GenerationStats = sequence.stats

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids of the prompt."""
        return tuple(self._sequence.prompt.tolist())

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """As in `Completion`; complete once there is a token."""
        return tuple(self._sequence.prompt_logprobs) if self._sequence.options.prompt_logprobs else None

    def __iter__(self) -> Iterator[Token]:
        """The tokens; waits for each.

        Raises:
            GenerationError: the logits are not numbers, or the sequence was left behind by a fork.
            Exception: what else made a step fail.
        """
        while (token := self._next()) is not None:
            yield token
        self._completion()

    async def __aiter__(self) -> AsyncIterator[Token]:
        """As `__iter__`, for a task. That the task is cancelled does not cancel the request."""
        while (token := await self._feed.next()) is not None:
            yield token
        self._completion()

    def _next(self) -> Token | None:
        self._resume()  # each time: there may have been a fork
        return self._feed.get()

    def result(self, timeout: float | None = None) -> Completion:
        """The completion, once it is there.

        Raises:
            TimeoutError: it is not there within `timeout` seconds; the request goes on.
            GenerationError, Exception: as from iterating.
        """
        self._resume()
        self._feed.wait(timeout)
        return self._completion()

    async def wait(self) -> Completion:
        """As `result`, for a task."""
        self._resume()
        await self._feed.wait_async()
        return self._completion()

    def cancel(self) -> None:
        """Ends the request within a step, wherever it is. Its result is what it has, with the reason "cancelled"."""
        if not self._feed.is_ended:
            self._feed.is_cancelled = True
            self._cancel()

    __del__ = cancel

    def _completion(self) -> Completion:
        if self._sequence.error is not None:
            raise self._sequence.error
        return self._sequence.completion()
