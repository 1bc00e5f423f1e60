"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tvm_attn.runtime.decoding import Completion
from tvm_attn.runtime.request import Request, Token
from tvm_attn.serving.answers import answer
from tvm_attn.serving.body import Body, read_body
from tvm_attn.serving.logprobs import CompletionLogprobs
from tvm_attn.serving.sampling import MOST_LOGPROBS, Asked, read_asked, read_count
from tvm_attn.serving.service import Service

_DEFAULT_TOKENS = 16  # OpenAI's


async def completions(http: HttpRequest) -> Response:
    """Continues text, token ids, or several of either."""
    service: Service = http.app.state.service
    body = await read_body(http)
    service.check_name(body)
    prompts = read_prompts(body)
    echo, logprobs = body.boolean("echo"), body.integer("logprobs", None, 0, MOST_LOGPROBS)
    asked = read_asked(
        body,
        service.model.config,
        max_tokens=read_count(body, "max_tokens", _DEFAULT_TOKENS, 0),
        logprobs=logprobs,
        prompt_logprobs=echo,
    )
    if logprobs is not None or not asked.token_ids:
        service.tokenizer  # noqa: B018  (refuses now what could not be written later)
    requests = service.start(prompts, asked, "prompt")
    form = _CompletionForm(service, asked, prompts, requests, echo, logprobs is not None)
    return await answer(http, service, asked, requests, form)


def read_prompts(body: Body) -> list[str | list[int]]:
    """The field `prompt`: a string, a list of strings, a list of token ids or a list of such lists."""
    given = body.get("prompt")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if _are_ids(given):
            return [given]
        if all(isinstance(part, str) for part in given) or all(
            isinstance(part, list) and _are_ids(part) for part in given
        ):
            return given
    raise body.wrong("prompt", "a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class _CompletionForm:
    """See `tvm_attn.serving.answers.Form`."""

    prefix, whole_name, part_name = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        service: Service,
        asked: Asked,
        prompts: Sequence[str | list[int]],
        requests: Sequence[Request],
        echo: bool,
        has_logprobs: bool,
    ) -> None:
        self._asked, self._requests, self._echo = asked, requests, echo
        self._prompts, self._tokenizer = prompts, service.model.tokenizer
        self._logprobs: list[CompletionLogprobs] | None = None
        if has_logprobs:
            self._logprobs = [CompletionLogprobs(service.tokenizer) for _ in requests]
        self._is_new = [True] * len(requests)

    def _opening(self, index: int) -> str:
        """The prompt, if it is to be in the text."""
        self._is_new[index] = False
        if not self._echo:
            return ""
        if self._logprobs is not None:
            request = self._requests[index]
            for token_id, found in zip(request.prompt_ids, request.prompt_logprobs or (), strict=True):
                self._logprobs[index].add(token_id, found)
        prompt = self._prompts[index // self._asked.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt) if self._tokenizer else ""

    def _choice(self, index: int, text: str, token_ids: Sequence[int], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._logprobs[index].take()
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        if self._asked.token_ids:
            choice["token_ids"] = list(token_ids)
        return choice

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def token(self, index: int, token: Token) -> dict[str, Any] | None:
        is_new = self._is_new[index]
        text, token_ids = self._opening(index) if is_new else "", []
        if not self._asked.skips_tokens:
            text, token_ids = text + token.text, [token.id]
            if self._logprobs is not None:
                self._logprobs[index].add(token.id, token.logprobs)
        if not text and self._logprobs is None and not self._asked.token_ids:
            return None
        return self._choice(index, text, token_ids, None)

    def end(self, index: int, completion: Completion) -> dict[str, Any]:
        return self._choice(index, "", [], self._finish_reason(completion))

    def whole(self, index: int, completion: Completion) -> dict[str, Any]:
        text, token_ids = self._opening(index), completion.token_ids
        if self._asked.skips_tokens:
            token_ids = ()
        else:
            text += completion.text
        if self._logprobs is not None and token_ids:
            for token_id, found in zip(token_ids, completion.logprobs or (), strict=True):
                self._logprobs[index].add(token_id, found)
        choice = self._choice(index, text, token_ids, self._finish_reason(completion))
        if self._asked.token_ids:
            choice["prompt_token_ids"] = list(self._requests[index].prompt_ids)
        return choice

    def _finish_reason(self, completion: Completion) -> str:
        return "length" if self._asked.skips_tokens else completion.finish_reason
