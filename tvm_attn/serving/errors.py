"""Errors as OpenAI's API answers them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_RETRY_SECONDS = {429: "1", 503: "5"}


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: the HTTP status.
        message: what was wrong and what to do.
        param: the field of the body that was wrong.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def content(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.status in _RETRY_SECONDS:
            headers["retry-after"] = _RETRY_SECONDS[self.status]
        if self.status == 408:  # the rest of the body may still come
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.content(), self.status, headers)
