"""The ASGI application: all routes of the server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from http import HTTPStatus
from importlib.util import find_spec
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tvm_attn.errors import shorten
from tvm_attn.runtime.model import Model
from tvm_attn.serving.answers import CLIENT_HAS_GONE
from tvm_attn.serving.chat import chat
from tvm_attn.serving.completions import completions
from tvm_attn.serving.errors import ApiError
from tvm_attn.serving.guard import Guard, Traffic
from tvm_attn.serving.metrics import Metrics
from tvm_attn.serving.service import Service
from tvm_attn.serving.tokens import detokenize, tokenize, tokenizer_info

QUEUE = 128
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def create_app(
    model: Model,
    *,
    name: str,
    api_key: str | Sequence[str] | None = None,
    queue: int = QUEUE,
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
) -> Starlette:
    """The application for one model, for uvicorn or any other ASGI server.

    Args:
        name: what clients call the model.
        api_key: requests need it, or one of several; None lets everybody in.
        queue: the most sequences that wait for a slot; requests beyond that are answered with 429.
        hosts: the names in the Host header that are taken, such as `LOOPBACK`; None takes any.
        origins: sites, such as "https://example.com", whose pages may use the server; "*" is all.

    The state has `service` (`Service`) and `traffic` (`Traffic`).
    """
    model.scheduler.queue_limit = queue
    metrics, traffic = Metrics(model.scheduler), Traffic()
    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/health", _health),
        Route("/metrics", _metrics),
    ]
    if find_spec("tvm_attn.serving.page"):
        from tvm_attn.serving import page

        routes += page.routes(model)
    keys = [] if api_key is None else [api_key] if isinstance(api_key, str) else list(api_key)
    guard = Middleware(
        Guard,
        traffic=traffic,
        metrics=metrics,
        paths=[route.path for route in routes],
        keys=keys,
        hosts=hosts,
        origins=origins,
    )
    # The outer one answers the questions that browsers ask before a request, which have no key.
    cors = [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])]
    app = Starlette(
        routes=routes,
        middleware=[*(cors if origins else []), guard],
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_bug,
        },
    )
    app.state.service = Service(model, name, queue, metrics)
    app.state.traffic = traffic
    return app


async def _models(http: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_description(http.app.state.service)]})


async def _model(http: Request) -> Response:
    service: Service = http.app.state.service
    name = http.path_params["name"]
    if name != service.name:
        message = f"there is no model {shorten(name)}; this server has {service.name}"
        raise ApiError(404, message, "model", "model_not_found")
    return JSONResponse(_description(service))


def _description(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "tvm-attn",
        "max_model_len": service.model.config.n_positions,
    }


async def _health(http: Request) -> Response:
    if http.app.state.traffic.is_closing:
        return JSONResponse({"status": "shutting down"}, 503)
    return JSONResponse({"status": "ok"})


async def _metrics(http: Request) -> Response:
    service: Service = http.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_error(http: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or another method."""
    assert isinstance(error, HTTPException)
    what = f"{shorten(http.method)} {shorten(http.url.path)}"
    refused = ApiError(error.status_code, f"{what}: {HTTPStatus(error.status_code).phrase.lower()}")
    response = refused.response()
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_HAS_GONE)


async def _answer_bug(http: Request, error: Exception) -> Response:
    return ApiError(500, f"the request failed: {type(error).__name__}", None, "internal_error").response()
