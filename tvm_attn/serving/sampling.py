"""The fields that both completion endpoints share, under the names that OpenAI's API and vLLM give them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tvm_attn.config import GPT2Config
from tvm_attn.errors import shorten
from tvm_attn.runtime.decoding import GenerationOptions
from tvm_attn.serving.body import Body
from tvm_attn.serving.errors import ApiError

MOST_COMPLETIONS = 128  # of a prompt
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_BIASES = 1024
MOST_LOGPROBS = 20

_LARGEST_SEED = (1 << 64) - 1
_LARGEST_COUNT = 1 << 31

# Fields that would change the result, with the values that mean nothing. What is in neither list is ignored, as clients
# send much that only tells who asks.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "functions": (),
    "function_call": ("none", "auto"),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "no_repeat_ngram_size": (0,),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for, apart from its prompts.

    Attributes:
        n: completions of each prompt.
        options: those of each sequence.
        skips_tokens: whether no token is wanted, only what is known of the prompt.
        stream: whether the answer is a stream of events.
        include_usage: whether the stream ends with the numbers of tokens.
        token_ids: whether the answer has the ids of its tokens.
    """

    n: int
    options: GenerationOptions
    skips_tokens: bool
    stream: bool
    include_usage: bool
    token_ids: bool


def read_asked(
    body: Body,
    config: GPT2Config,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: bool = False,
    stop: Collection[str] = (),
) -> Asked:
    """Reads the fields that do not depend on the endpoint.

    Args:
        max_tokens: the most tokens; None is all that the context has room for.
        logprobs: how many alternatives are wanted at each token; None if no log-probabilities.
        prompt_logprobs: whether they are wanted for the prompt too.
        stop: strings that end every completion.

    Raises:
        ApiError: a field is malformed or not supported.
    """
    body.refuse(_UNSUPPORTED)
    n = body.integer("n", 1, 1, MOST_COMPLETIONS)
    if body.integer("best_of", n, 1, MOST_COMPLETIONS) != n:
        raise ApiError(400, "best_of must be equal to n, or left out", "best_of", "unsupported_parameter")
    stream, usage = body.boolean("stream"), body.object("stream_options")
    if body.get("stream_options") is not None and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options", "invalid_value")
    most = config.n_positions if max_tokens is None else min(max_tokens, config.n_positions)
    least = body.integer("min_tokens", 0, 0, _LARGEST_COUNT)
    if least > most:
        raise body.wrong("min_tokens", f"at most {most}, max_tokens")
    top_k = body.integer("top_k", -1, -1, _LARGEST_COUNT)
    given: dict[str, Any] = {
        "max_new_tokens": max(most, 1),
        "min_new_tokens": least,
        "temperature": body.real("temperature", 1.0, 0.0, 2.0),
        "top_k": top_k if top_k > 0 else None,
        "top_p": _positive(body, "top_p", 1.0),
        "min_p": body.real("min_p", 0.0, 0.0, 1.0) or None,
        "repetition_penalty": _positive(body, "repetition_penalty", 10.0) or 1.0,
        "presence_penalty": body.real("presence_penalty", 0.0, -2.0, 2.0),
        "frequency_penalty": body.real("frequency_penalty", 0.0, -2.0, 2.0),
        "logit_bias": _logit_bias(body, config.vocab_size),
        "stop": (*stop, *_stops(body)),
        "stop_token_ids": _stop_token_ids(body, config),
        "seed": None if (seed := body.integer("seed", None, -(1 << 63), _LARGEST_SEED)) is None else seed % (1 << 64),
    }
    if logprobs is not None:
        given |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    return Asked(
        n,
        GenerationOptions(**given),
        most == 0,
        stream,
        usage.boolean("include_usage"),
        body.boolean("return_token_ids"),
    )


def read_count(body: Body, name: str, default: int | None, least: int) -> int | None:
    """A number of tokens; beyond the context it means all that there is room for."""
    count: int | None = body.integer(name, default, least, _LARGEST_COUNT)
    return count


def _positive(body: Body, name: str, most: float) -> float | None:
    value: float | None = body.real(name, None, 0.0, most)
    if value == 0.0:
        raise body.wrong(name, f"a number above 0, at most {most:g}")
    return value


def _stops(body: Body) -> list[str]:
    given = body.get("stop")
    stops = [] if given is None or given == "" else [given] if isinstance(given, str) else given
    legal = f"a string, or a list of at most {MOST_STOPS}, each of 1 to {LONGEST_STOP} characters"
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise body.wrong("stop", legal)
    if not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise body.wrong("stop", legal)
    return stops


def _stop_token_ids(body: Body, config: GPT2Config) -> tuple[int, ...] | None:
    """Ids that end a sequence beside the model's, which `ignore_eos` leaves out; None is the model's alone."""
    extra, ignores = body.ids("stop_token_ids", MOST_STOPS), body.boolean("ignore_eos")
    if not extra and not ignores:
        return None
    return (*extra, *(() if ignores else config.eos_token_ids))


def _logit_bias(body: Body, vocabulary: int) -> dict[int, float]:
    given, name = body.object("logit_bias").fields, "logit_bias"
    if len(given) > MOST_BIASES:
        raise body.wrong(name, f"an object of at most {MOST_BIASES} token ids")
    biases = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            message = f"{name} has the key {shorten(key)}; keys must be token ids, 0 to {vocabulary - 1}"
            raise ApiError(400, message, name, "invalid_value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            message = f"{name} of {key} is {shorten(value)}; it must be a number from -100 to 100"
            raise ApiError(400, message, name, "invalid_value")
        biases[int(key)] = float(value)
    return biases
