"""`POST /v1/chat/completions`, with a plain template: GPT-2 has never seen one.

    System: You are terse.

    User: Hello

    Assistant:

The model goes on after the last colon, its answer usually begins with a space, and it ends before the next turn of the
user, "\\n\\nUser:".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tvm_attn.errors import shorten
from tvm_attn.runtime.decoding import Completion
from tvm_attn.runtime.request import Request, Token
from tvm_attn.serving.answers import answer
from tvm_attn.serving.body import Body, read_body
from tvm_attn.serving.errors import ApiError
from tvm_attn.serving.logprobs import chat_logprobs
from tvm_attn.serving.sampling import MOST_LOGPROBS, Asked, read_asked, read_count
from tvm_attn.serving.service import Service

_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
STOP = "\n\nUser:"


async def chat(http: HttpRequest) -> Response:
    """Answers a conversation."""
    service: Service = http.app.state.service
    body = await read_body(http)
    service.check_name(body)
    service.tokenizer  # noqa: B018  (refuses a model without)
    prompt = read_messages(body)
    has_logprobs, top = body.boolean("logprobs"), body.integer("top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not has_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    most = read_count(body, "max_completion_tokens", read_count(body, "max_tokens", None, 1), 1)
    logprobs = (top or 0) if has_logprobs else None
    asked = read_asked(body, service.model.config, max_tokens=most, logprobs=logprobs, stop=(STOP,))
    requests = service.start([prompt], asked, "messages")
    return await answer(http, service, asked, requests, _ChatForm(service, asked, requests, has_logprobs))


def read_messages(body: Body) -> str:
    """The field `messages`, in the template.

    Raises:
        ApiError: it is no list of messages of text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise body.wrong("messages", "a list of at least one message")
    turns = [f"{_role(message, number)}: {_content(message, number)}" for number, message in enumerate(messages)]
    return "\n\n".join([*turns, "Assistant:"])


def _role(message: Any, number: int) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _NAMES:
        text = f"the role of message {number} is {shorten(role)}; it must be one of {', '.join(_NAMES)}"
        raise ApiError(400, text, "messages", "invalid_value")
    return _NAMES[role]


def _content(message: dict[str, Any], number: int) -> str:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
        text = f"the content of message {number} is {shorten(content)}; it must be a string, or a list of parts of text"
        raise ApiError(400, text, "messages", "invalid_value")
    return "".join(part["text"] for part in parts)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


class _ChatForm:
    """See `tvm_attn.serving.answers.Form`."""

    prefix, whole_name, part_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, asked: Asked, requests: Sequence[Request], has_logprobs: bool) -> None:
        self._tokenizer, self._asked, self._requests = service.tokenizer, asked, requests
        self._has_logprobs = has_logprobs

    def _part(
        self, index: int, delta: dict[str, Any], tokens: Sequence[Token] = (), finish_reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if self._has_logprobs and tokens:
            logprobs = chat_logprobs(
                self._tokenizer, [token.logprobs for token in tokens if token.logprobs is not None]
            )
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if self._asked.token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return choice

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._part(index, {"role": "assistant", "content": ""})

    def token(self, index: int, token: Token) -> dict[str, Any] | None:
        if not token.text and not self._has_logprobs and not self._asked.token_ids:
            return None
        return self._part(index, {"content": token.text}, [token])

    def end(self, index: int, completion: Completion) -> dict[str, Any]:
        return self._part(index, {}, finish_reason=completion.finish_reason)

    def whole(self, index: int, completion: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        logprobs = chat_logprobs(self._tokenizer, completion.logprobs or ()) if self._has_logprobs else None
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": completion.finish_reason}
        if self._asked.token_ids:
            choice["token_ids"] = list(completion.token_ids)
            choice["prompt_token_ids"] = list(self._requests[index].prompt_ids)
        return choice
