"""What every request passes first: is it from a page of another site, does it have a key, is the server ending?"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tvm_attn.serving.errors import ApiError
from tvm_attn.serving.metrics import Metrics

_OPEN_PATHS = ("/health", "/", "/page/")  # need no key: the page asks for one
_ALWAYS = ("/health", "/metrics")  # answered while the server ends


@dataclass
class Traffic:
    """What a server is doing.

    Attributes:
        running: requests whose answers are not complete.
        is_closing: whether new requests are refused, as the server ends.
    """

    running: int = 0
    is_closing: bool = False


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        traffic: kept up to date.
        metrics: count the requests.
        paths: those that are counted under their own names.
        keys: a request must have one of them, unless there are none.
        hosts: names of this server, to which the Host header must belong; None takes any. Without that check, a page
            of another site that lets its own name point to this machine could read what the server says.
        origins: sites whose pages may use the server, beside its own; "*" is all of them.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        traffic: Traffic,
        metrics: Metrics,
        paths: Collection[str],
        keys: Sequence[str],
        hosts: Collection[str] | None,
        origins: Collection[str],
    ) -> None:
        self._app, self._traffic, self._metrics, self._paths = app, traffic, metrics, frozenset(paths)
        self._keys = [key.encode() for key in keys]
        self._hosts, self._origins = hosts, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        begin, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._traffic.running += 1
        try:
            self._check(scope["path"], Headers(scope=scope))
            await self._app(scope, receive, watched)
        except ApiError as error:
            await error.response()(scope, receive, watched)
        finally:
            self._traffic.running -= 1
            self._metrics.requests.labels(path, status).inc()
            self._metrics.duration.labels(path).observe(time.perf_counter() - begin)

    def _check(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self._hosts is not None and _without_port(host) not in self._hosts:
            message = "the Host header is not a name of this server; call it by its address, or allow the name"
            raise ApiError(403, message, None, "host_not_allowed")
        if origin is not None and not {origin, "*"} & self._origins and urlsplit(origin).netloc.lower() != host:
            raise ApiError(403, "pages of other sites may not use this server", None, "origin_not_allowed")
        is_open = path in _OPEN_PATHS or path.startswith("/page/")
        if self._keys and not is_open and not self._has_key(headers.get("authorization", "")):
            message = "the request has no valid key; send it as the header Authorization: Bearer KEY"
            raise ApiError(401, message, None, "invalid_api_key")
        if self._traffic.is_closing and path not in _ALWAYS:
            raise ApiError(503, "the server is shutting down; try again later", None, "shutting_down")

    def _has_key(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        # All keys are compared, each in constant time: how long it takes says nothing of them.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _without_port(host: str) -> str:
    """`[::1]:8000` to `[::1]`, `localhost:8000` to `localhost`."""
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host
