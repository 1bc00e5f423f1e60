"""The page at `/` of the server, a client of its API in the browser.

The files in `page/` load nothing from elsewhere, and the Content-Security-Policy forbids it: no other origin, no script
or style in the HTML, no frame around it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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
    """The routes of the page: `/` and `/page/NAME` of each of its other files, which need no API key."""
    return [
        Route(
            "/" if path.name == "index.html" else f"/page/{path.name}", partial(_file, path.read_bytes(), path.suffix)
        )
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    ]


async def _file(content: bytes, suffix: str, _: Request) -> Response:
    return Response(content, media_type=_TYPES[suffix], headers=_HEADERS)
