"""What all endpoints share: the model, its name, and the start of sequences."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tvm_attn.errors import GenerationError, PromptTooLongError, QueueFullError, TokenizerError, shorten
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.request import Request
from tvm_attn.runtime.tokenizer import Tokenizer
from tvm_attn.serving.body import Body
from tvm_attn.serving.errors import ApiError
from tvm_attn.serving.metrics import Metrics
from tvm_attn.serving.sampling import Asked


@dataclass
class Service:
    """A served model.

    Attributes:
        name: what clients call it.
        queue: the most sequences that wait for a slot.
        created: when it was loaded, in seconds since 1970.
    """

    model: Model
    name: str
    queue: int
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ApiError: it has none.
        """
        if self.model.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer; send and ask for token ids", None, "no_tokenizer")
        return self.model.tokenizer

    def check_name(self, body: Body) -> None:
        """Refuses a request for another model."""
        name = body.text("model", self.name)
        if name != self.name:
            message = f"there is no model {shorten(name)}; this server has {self.name}"
            raise ApiError(404, message, "model", "model_not_found")

    def start(self, prompts: Sequence[str | list[int]], asked: Asked, param: str) -> list[Request]:
        """Starts `n` sequences for each prompt, all or none, in the order of `Model.generate`.

        Args:
            param: the field of the body that the prompts came from.

        Raises:
            ApiError: a prompt is refused, or the queue has no room.
        """
        count, most = len(prompts) * asked.n, self.model.engine.max_batch + self.queue
        if count > most:
            message = f"the request is for {count} completions, and this server takes at most {most} at a time"
            raise ApiError(400, message, param if len(prompts) > 1 else "n", "too_many_completions")
        requests: list[Request] = []
        try:
            for prompt in prompts:
                for number in range(asked.n):
                    known: str | list[int] = list(requests[-1].prompt_ids) if number else prompt
                    request = self.model.scheduler.submit(known, asked.options, index=len(requests))
                    requests.append(request)
        except (GenerationError, TokenizerError) as error:
            for request in requests:
                request.cancel()
            raise _refused(error, param) from None
        return requests


def _refused(error: Exception, param: str) -> ApiError:
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), None, "queue_full")
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param, "context_length_exceeded")
    return ApiError(400, str(error), param, "invalid_value")
