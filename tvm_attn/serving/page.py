"""The page at `/` of the server, a client of its API in the browser, and `/attention`, which only the page needs.

The files in `page/` load nothing from elsewhere, and the Content-Security-Policy forbids it: no other origin, no script
or style in the HTML, no frame around it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tvm_attn.attention_view import LENS_TOP, lens_texts, packed, token_text
from tvm_attn.errors import GenerationError, TokenizerError
from tvm_attn.runtime.prompts import prompt_ids
from tvm_attn.serving.body import read_body
from tvm_attn.serving.errors import ApiError

if TYPE_CHECKING:
    from tvm_attn.runtime.model import Model

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""https://www.w3.org/TR/CSP3/; the only image is the icon in the HTML."""

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes(model: Model) -> list[Route]:
    """`/` and `/page/NAME`, the files of the page, which need no API key; and `/attention`."""
    files = [
        Route(
            "/" if path.name == "index.html" else f"/page/{path.name}", partial(_file, path.read_bytes(), path.suffix)
        )
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    ]
    one_at_a_time = asyncio.Lock()  # a layer of a long text takes much memory

    async def attention(http: Request) -> Response:
        body = await read_body(http)
        config = model.config
        prompt, layer = body.text("prompt"), body.integer("layer", None, 0, config.n_layer - 1)
        if prompt is None:
            raise body.wrong("prompt", "a string")
        async with one_at_a_time:
            try:
                return JSONResponse(await asyncio.to_thread(_attention, model, prompt, layer))
            except (GenerationError, TokenizerError) as error:
                raise ApiError(400, str(error), "prompt", "invalid_value") from None

    return [*files, Route("/attention", attention, methods=["POST"])]


async def _file(content: bytes, suffix: str, _: Request) -> Response:
    return Response(content, media_type=_TYPES[suffix], headers=_HEADERS)


def _attention(model: Model, prompt: str, layer: int | None) -> dict[str, Any]:
    """Without a layer: tokens, number of layers and heads, and the lens; else the weights of the layer's heads."""
    ids = prompt_ids("the prompt", prompt, model.config, model.tokenizer).tolist()
    if layer is not None:
        return {"layer": layer, "weights": packed(model.attention(ids, layers=[layer])[0])}
    return {
        "tokens": [token_text(model.tokenizer, token_id) for token_id in ids],
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
        "lens": lens_texts(model, model.logit_lens(ids, top=LENS_TOP)),
    }
