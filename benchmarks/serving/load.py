"""Load: clients that ask one thing after the other, and the times at which tokens come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks.serving.servers import ServerProcess
from tvm_attn.errors import BenchmarkError

_SECONDS = 600.0  # for one request


@dataclass
class Answer:
    """A streamed answer.

    Attributes:
        start: when it was asked for, in seconds of `time.perf_counter`.
        times: when each token came, or each event with text if the server does not tell tokens.
        token_ids: if the server tells them.
        finish_reason: None if the stream broke off.
    """

    start: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    end: float = 0.0


@dataclass(frozen=True)
class Load:
    """Figures of one run, in seconds.

    Attributes:
        tokens_per_second: generated tokens of all clients together.
        first_token: percentiles of the time to the first token.
        between_tokens: and of the time between two.
        server_cores: processor time of the server for each second.
    """

    clients: int
    requests: int
    seconds: float
    tokens_per_second: float
    first_token: dict[str, float]
    between_tokens: dict[str, float]
    server_cores: float


@dataclass(frozen=True)
class Prompt:
    """The same prompt for both kinds of servers."""

    ids: tuple[int, ...]
    text: str


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Sends one request and reads its stream.

    Raises:
        BenchmarkError: the server answered with an error.
    """
    answer = Answer(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise BenchmarkError(f"{response.status_code} from the server: {text[:300]}")
        rest = b""
        async for part in response.aiter_raw():
            now = time.perf_counter()
            *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    _read(answer, json.loads(event[6:]), now)
    answer.end = time.perf_counter()
    return answer


def _read(answer: Answer, content: dict[str, Any], now: float) -> None:
    if "error" in content:
        raise BenchmarkError(f"an error in the stream: {content['error']}")
    for choice in content["choices"]:
        ids = choice.get("token_ids")
        if ids or (ids is None and choice["text"]):
            answer.times.append(now)
            answer.token_ids += ids or []
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


def new_client(server: ServerProcess) -> httpx.AsyncClient:
    """A client without limits on connections."""
    return httpx.AsyncClient(base_url=server.url, timeout=_SECONDS, limits=httpx.Limits(max_connections=None))


def new_body(server: ServerProcess, prompt: Prompt, new_tokens: int) -> dict[str, Any]:
    """A request for exactly `new_tokens` tokens."""
    words = list(prompt.ids) if server.takes_ids else prompt.text
    return {"model": "model", "prompt": words, "max_tokens": new_tokens, "temperature": 0, **server.fields}


def run_load(
    server: ServerProcess,
    clients: int,
    prompts: Sequence[Prompt],
    new_tokens: int,
    say: Callable[[float], None],
) -> tuple[Load, list[Answer]]:
    """Has clients ask for `new_tokens` after each prompt, until all are answered; the answers in order."""
    answers: list[Answer | None] = [None] * len(prompts)
    left = iter(range(len(prompts)))

    async def work(client: httpx.AsyncClient) -> None:
        for number in left:
            answers[number] = await ask(client, new_body(server, prompts[number], new_tokens))
            say(sum(answer is not None for answer in answers) / len(prompts))

    async def run() -> None:
        async with new_client(server) as client:
            await asyncio.gather(*(work(client) for _ in range(clients)))

    begin, used = time.perf_counter(), server.cpu_seconds()
    asyncio.run(run())
    seconds = time.perf_counter() - begin
    done = [answer for answer in answers if answer is not None]
    if cut := [answer.finish_reason for answer in done if answer.finish_reason != "length"]:
        raise BenchmarkError(f"{server.name} ended {len(cut)} of {len(done)} answers early ({cut[0]})")
    load = Load(
        clients=clients,
        requests=len(done),
        seconds=seconds,
        tokens_per_second=len(done) * new_tokens / seconds,
        first_token=percentiles(answer.times[0] - answer.start for answer in done if answer.times),
        between_tokens=percentiles(gap for answer in done for gap in np.diff(answer.times)),
        server_cores=(server.cpu_seconds() - used) / seconds,
    )
    return load, done


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    values = np.fromiter(seconds, np.float64)
    if not len(values):
        return {}
    return {"p50": float(np.median(values)), "p99": float(np.percentile(values, 99)), "max": float(values.max())}
