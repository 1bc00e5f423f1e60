"""Log-probabilities in the forms of `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tvm_attn.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tvm_attn.runtime.logprobs import TokenLogprobs

_LEAST = -9999.0  # JSON has no infinity


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is no UTF-8 by itself in OpenAI's notation, such as `bytes:\\xe2\\x80`."""
    written = tokenizer.written(token_id)
    try:
        return written.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


class CompletionLogprobs:
    """Collects the `logprobs` object of a choice of `/v1/completions`.

    The positions in `text_offset` count the characters of the choice's text, with the prompt if it is in it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder, self._offset = tokenizer, tokenizer.stream_decoder(), 0
        self._clear()

    def _clear(self) -> None:
        self._found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Adds a token; the first one of a prompt has no log-probability."""
        top: dict[str, float] | None = None
        if logprobs is not None:
            top = {}
            # Tokens may look the same; the likelier one stays. The token itself is always among them.
            for other, value in (*logprobs.top, (token_id, logprobs.logprob)):
                top.setdefault(token_text(self._tokenizer, other), max(value, _LEAST))
        found = self._found
        found["tokens"].append(token_text(self._tokenizer, token_id))
        found["token_logprobs"].append(None if logprobs is None else max(logprobs.logprob, _LEAST))
        found["top_logprobs"].append(top)
        found["text_offset"].append(self._offset)
        self._offset += len(self._decoder.push(token_id))

    def take(self) -> dict[str, list[Any]]:
        """What was added since the last call."""
        found = self._found
        self._clear()
        return found


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` object of a choice of `/v1/chat/completions`."""
    content = [
        _chat_token(tokenizer, token.token_id, token.logprob)
        | {"top_logprobs": [_chat_token(tokenizer, other, value) for other, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token_id)
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(tokenizer.written(token_id))}
