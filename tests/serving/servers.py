"""Servers for the tests of this folder."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette

from tvm_attn.runtime.model import Model
from tvm_attn.serving.app import LOOPBACK, create_app
from tvm_attn.serving.server import Server, open_socket

NAME = "demo/gpt2"  # with a slash, as names of the Hub have
SLOTS, QUEUE = 4, 12


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    app: Starlette
    server: Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@contextmanager
def serving(model: Model, *, shutdown_seconds: float = 10.0, **options: Any) -> Iterator[Running]:
    """Serves a model until the end of the block."""
    app = create_app(model, **{"name": NAME, "queue": QUEUE, "hosts": LOOPBACK, **options})
    listener, started = open_socket("127.0.0.1", 0), threading.Event()
    server = Server(app, shutdown_seconds=shutdown_seconds, started=started.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, server, thread)
    finally:
        if thread.is_alive():
            server.handle_exit(15, None)
        thread.join(60)
        assert not thread.is_alive()
