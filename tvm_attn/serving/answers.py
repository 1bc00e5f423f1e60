"""Runs the sequences of a request and sends the answer: whole, or as server-sent events.

The events are those of OpenAI's API: `data: ` and a JSON object each, the last one `data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tvm_attn.errors import TvmAttnError, one_line
from tvm_attn.runtime.decoding import Completion
from tvm_attn.runtime.request import Request, Token
from tvm_attn.serving.errors import ApiError
from tvm_attn.serving.sampling import Asked
from tvm_attn.serving.service import Service

CLIENT_HAS_GONE = 499  # nginx's status, for the log only

T = TypeVar("T")
News: TypeAlias = tuple[int, Token | Completion | Exception]  # of the sequence with this index

_logger = logging.getLogger(__name__)


class Form(Protocol):
    """How an endpoint writes its choices."""

    prefix: str  # of ids
    whole_name: str  # the `object` of a whole answer
    part_name: str  # and of an event

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the first event of a sequence, sent before there is a token."""

    def token(self, index: int, token: Token) -> dict[str, Any] | None:
        """The choice of the event for a token; None if there is nothing to send yet."""

    def end(self, index: int, completion: Completion) -> dict[str, Any]:
        """The choice of the last event of a sequence."""

    def whole(self, index: int, completion: Completion) -> dict[str, Any]:
        """The choice of a whole answer."""


async def answer(http: HttpRequest, service: Service, asked: Asked, requests: list[Request], form: Form) -> Response:
    """Waits for the sequences, or sends them while they are generated. They are cancelled when the client goes away.

    A stream's status is sent with its first token: whoever passes requests on may still repeat them before.

    Raises:
        ApiError: a sequence failed; in a stream, before any token.
    """
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if asked.stream:
        return await _stream(http, service, asked, requests, form, head)
    try:
        completions = await _unless_gone(http, _completions(requests))
    except Exception as error:
        raise _failure(error) from error
    finally:
        _cancel(requests)
    if completions is None:
        return Response(status_code=CLIENT_HAS_GONE)
    if any(completion.finish_reason == "cancelled" for completion in completions):
        raise _cancelled()
    for request in requests:
        service.metrics.first_token.observe(request.stats.first_token_seconds)
    choices = [form.whole(index, completion) for index, completion in enumerate(completions)]
    content = head | {"object": form.whole_name, "choices": choices, "usage": _usage(asked, requests, completions)}
    return JSONResponse(content)


async def _unless_gone(http: HttpRequest, result: Coroutine[Any, Any, T]) -> T | None:
    """The result; None if the client goes away before."""
    waiting, leaving = asyncio.create_task(result), asyncio.create_task(_disconnection(http))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await waiting if waiting.done() else None
    finally:
        waiting.cancel()
        leaving.cancel()


def _cancel(requests: Sequence[Request]) -> None:
    for request in requests:
        request.cancel()


async def _completions(requests: Sequence[Request]) -> list[Completion]:
    return [await request.wait() for request in requests]


async def _disconnection(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _failure(error: Exception) -> ApiError:
    if isinstance(error, TvmAttnError):
        return ApiError(500, one_line(error), None, "generation_failed")
    _logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the request failed: {type(error).__name__}", None, "internal_error")


def _cancelled() -> ApiError:
    return ApiError(503, "the server is shutting down and has cancelled the request", None, "shutting_down")


def _usage(asked: Asked, requests: Sequence[Request], completions: Sequence[Completion]) -> dict[str, Any]:
    """The numbers of tokens; a prompt counts once, however many completions it has."""
    firsts = requests[:: asked.n]
    prompt = sum(len(request.prompt_ids) for request in firsts)
    generated = 0 if asked.skips_tokens else sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(request.stats.reused_tokens for request in firsts)},
    }


# --- streams ---


async def _stream(
    http: HttpRequest, service: Service, asked: Asked, requests: list[Request], form: Form, head: dict[str, Any]
) -> Response:
    news: asyncio.Queue[News] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(index, request, news)) for index, request in enumerate(requests)]

    def end() -> None:
        for pump in pumps:
            pump.cancel()
        _cancel(requests)

    try:
        first = await _unless_gone(http, news.get())
        if first is None:
            end()
            return Response(status_code=CLIENT_HAS_GONE)
        if (error := _problem(first[1])) is not None:
            raise error
    except BaseException:
        end()
        raise
    events = _events(service, asked, requests, form, head | {"object": form.part_name}, first, news)
    return _EventStream(events, end)


class _EventStream(StreamingResponse):
    """Sends events, and calls `end` afterwards, however that comes."""

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        # no-transform and the other: proxies should neither compress nor collect the events
        headers = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _problem(item: Token | Completion | Exception) -> ApiError | None:
    if isinstance(item, Exception):
        return _failure(item)
    return _cancelled() if isinstance(item, Completion) and item.finish_reason == "cancelled" else None


async def _events(
    service: Service,
    asked: Asked,
    requests: list[Request],
    form: Form,
    head: dict[str, Any],
    first: News,
    news: asyncio.Queue[News],
) -> AsyncIterator[bytes]:
    if asked.include_usage:
        head["usage"] = None
    last_times: list[float | None] = [None] * len(requests)
    completions: dict[int, Completion] = {}
    openings = [choice for index in range(len(requests)) if (choice := form.opening(index)) is not None]
    parts, items = [_event(head | {"choices": [choice]}) for choice in openings], [first]
    while True:
        with suppress(asyncio.QueueEmpty):  # what has come meanwhile goes into the same packet
            while True:
                items.append(news.get_nowait())
        now = time.perf_counter()
        for index, item in items:
            if (error := _problem(item)) is not None:
                yield b"".join([*parts, _event(error.content())])
                return
            if isinstance(item, Token):
                if (last := last_times[index]) is None:
                    service.metrics.first_token.observe(requests[index].stats.first_token_seconds)
                else:
                    service.metrics.between_tokens.observe(now - last)
                last_times[index] = now
                choice = form.token(index, item)
            else:
                assert isinstance(item, Completion)
                completions[index] = item
                choice = form.end(index, item)
            if choice is not None:
                parts.append(_event(head | {"choices": [choice]}))
        if len(completions) == len(requests):
            break
        if parts:
            yield b"".join(parts)
        parts, items = [], [await news.get()]
    if asked.include_usage:
        usage = _usage(asked, requests, [completions[index] for index in range(len(requests))])
        parts.append(_event(head | {"choices": [], "usage": usage}))
    yield b"".join([*parts, b"data: [DONE]\n\n"])


async def _pump(index: int, request: Request, news: asyncio.Queue[News]) -> None:
    try:
        async for token in request:
            news.put_nowait((index, token))
        news.put_nowait((index, await request.wait()))
    except Exception as error:
        news.put_nowait((index, error))


def _event(content: dict[str, Any]) -> bytes:
    # ASCII: some clients end a line at U+2028 too.
    return b"data: " + json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n\n"
