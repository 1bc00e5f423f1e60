"""uvicorn for the application: the socket, time limits, and how it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from tvm_attn.errors import ServerError
from tvm_attn.serving.guard import Traffic
from tvm_attn.serving.service import Service

HEADER_SECONDS = 15.0
MOST_HEADER_BYTES = 1 << 16
_IDLE_SECONDS = 30
_LAST_SECONDS = 2  # for answers to leave, once all sequences have ended


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address but does not listen yet.

    Raises:
        ServerError: it cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        opened = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise ServerError(f"there is no address {host!r} on this machine ({error}); name another with --host") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        message = f"port {port} of {host} cannot be used ({error.strerror}); name another with --port"
        raise ServerError(message) from None
    return opened


class Server(uvicorn.Server):
    """Serves an application until it is told to end.

    The first signal refuses new requests and lets the others finish; the second one, or the end of the time for that,
    cancels them.

    Args:
        app: from `create_app`.
        shutdown_seconds: how long running requests may take to finish.
        started: called once connections are taken.
        access_log: whether each request is logged.

    Attributes:
        signal: that ended it, or None.
    """

    def __init__(
        self,
        app: Starlette,
        *,
        shutdown_seconds: float = 30.0,
        started: Callable[[], object] = lambda: None,
        access_log: bool = False,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_level="info" if access_log else "warning",
                access_log=access_log,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=_LAST_SECONDS,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            )
        )
        self._traffic: Traffic = app.state.traffic
        self._service: Service = app.state.service
        self._shutdown_seconds, self._tell_started = shutdown_seconds, started
        self._deadline = float("inf")
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn."""
        await super().startup(sockets)
        self._tell_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT and SIGTERM, and by tests."""
        if self._traffic.is_closing:
            self._deadline = 0.0
        else:
            self._traffic.is_closing = True
            self._deadline = monotonic() + self._shutdown_seconds
            self.signal = sig

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn, ten times a second: whether it is time to end."""
        if self._traffic.is_closing:
            is_late = monotonic() > self._deadline
            if is_late:
                self._service.model.scheduler.close(cancel=True)
            self.should_exit = is_late or self._traffic.running == 0
        return await super().on_tick(counter)


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which closes a connection whose next request's header does not come in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _set_timer(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
