"""Reading a request's JSON body, and its fields one by one."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import anyio
from starlette.requests import Request

from tvm_attn.errors import GenerationError, shorten
from tvm_attn.numbers import integer, real
from tvm_attn.serving.errors import ApiError

MOST_BYTES = 1 << 20
BODY_SECONDS = 30.0


async def read_body(request: Request) -> Body:
    """The body of a request, which must be a JSON object.

    Raises:
        ApiError: it is larger than `MOST_BYTES`, not complete within `BODY_SECONDS`, or not a JSON object.
    """
    length = request.headers.get("content-length", "")
    too_large = ApiError(413, f"the body has more than {MOST_BYTES} bytes; send less at a time", code="body_too_large")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > MOST_BYTES):
        raise too_large
    content = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body has not arrived within {BODY_SECONDS:g} s", code="timeout") from None
    try:
        fields = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # A number with more digits than Python reads is a ValueError too.
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {shorten(fields)}; it must be a JSON object", code="invalid_json")
    return Body(fields)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


class Body:
    """A JSON object whose fields are read with their types checked. A field that is null counts as absent.

    Every method raises ApiError with status 400 that names the field.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def get(self, name: str) -> Any:
        """The value as it is; None if it is absent."""
        return self.fields.get(name)

    def wrong(self, name: str, legal: str) -> ApiError:
        """The error for a value that is not what it must be."""
        return ApiError(400, f"{name} is {shorten(self.get(name))}; it must be {legal}", name, "invalid_value")

    def integer(self, name: str, default: Any, least: int, most: int) -> Any:
        """A whole number in `least` .. `most`."""
        value = self.get(name)
        if value is None:
            return default
        try:
            return integer(name, value, least, most)
        except GenerationError as error:
            raise ApiError(400, str(error), name, "invalid_value") from None

    def real(self, name: str, default: Any, low: float, high: float) -> Any:
        """A number in `low` .. `high`."""
        value = self.get(name)
        if value is None:
            return default
        try:
            return real(name, value, f"a number from {low:g} to {high:g}", low, high)
        except GenerationError as error:
            raise ApiError(400, str(error), name, "invalid_value") from None

    def boolean(self, name: str) -> bool:
        """true or false; false if it is absent."""
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: Any = None) -> Any:
        """A string."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def object(self, name: str) -> Body:
        """An object; empty if it is absent."""
        value = self.get(name)
        if value is None:
            return Body({})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Body(value)

    def ids(self, name: str, most: int) -> list[int]:
        """A list of at most `most` token ids; empty if it is absent."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most or not all(map(_is_id, value)):
            raise self.wrong(name, f"a list of at most {most} token ids")
        return value

    def refuse(self, unsupported: dict[str, tuple[Any, ...]]) -> None:
        """Refuses fields that would change the result and have no effect here, unless they have a value that is off."""
        for name, off in unsupported.items():
            value = self.get(name)
            if value is None or value is False or value in ("", [], {}) or _is_one_of(value, off):
                continue
            message = f"{name} is not supported here; leave it out"
            raise ApiError(400, message, name, "unsupported_parameter")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_one_of(value: Any, values: Collection[Any]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)
