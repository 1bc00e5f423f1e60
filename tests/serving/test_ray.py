"""Replicas on a local Ray: one is killed under load, and no answer is lost or wrong."""
# ruff: noqa: E402 (imports after those that may skip the file)

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytest.importorskip("ray.serve", reason="needs the extra ray")
httpx = pytest.importorskip("httpx", reason="needs httpx, of the extra test")
openai = pytest.importorskip("openai", reason="needs openai, of the extra test")
psutil = pytest.importorskip("psutil", reason="needs psutil, of the extra rpc")

import tvm_attn

pytestmark = pytest.mark.slow

PROMPTS = [f"Return the {word} of" for word in ("name", "value", "file", "list", "number", "path", "module", "string")]
LENGTH = 100
CLIENTS = 24  # more than the replicas take, so that each always has requests
SECONDS = 4.0


@pytest.fixture(scope="module")
def address(demo_artifact: Path) -> Iterator[str]:
    """Two replicas of one thread each behind Ray's proxy."""
    from ray import serve

    from tvm_attn.serving.ray import Arguments, app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = str(Path(tvm_attn.__file__).parents[1])
    ray.init(
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": source}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(Arguments(artifact=str(demo_artifact), name="demo", replicas=2, device="cpu", max_batch=4)))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[Any]:
    """The processes of the replicas."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name().startswith("ray::ServeRep")]


@pytest.fixture(scope="module")
def expected(demo_artifact: Path) -> dict[str, str]:
    model = tvm_attn.load(demo_artifact, device="cpu", threads=1)
    return {prompt: model.generate(prompt, max_new_tokens=LENGTH).text for prompt in PROMPTS}


class Load:
    """Clients that ask one question after the other, half of them for streams."""

    def __init__(self, address: str, expected: dict[str, str]) -> None:
        self.expected, self.outcomes, self.statuses = expected, Counter[str](), Counter[int]()
        http = httpx.AsyncClient(timeout=60, event_hooks={"response": [self.note]})
        self.client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", http_client=http)  # retries twice

    async def note(self, response: Any) -> None:
        self.statuses[response.status_code] += 1

    async def ask(self, prompt: str) -> None:
        answer = await self.client.completions.create(model="demo", prompt=prompt, max_tokens=LENGTH, temperature=0)
        assert answer.choices[0].text == self.expected[prompt]
        self.outcomes["whole"] += 1

    async def stream(self, prompt: str) -> None:
        chunks = await self.client.completions.create(
            model="demo", prompt=prompt, max_tokens=LENGTH, temperature=0, stream=True
        )
        text, reason = "", None
        try:
            async for chunk in chunks:
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason or reason
        except (openai.APIError, httpx.TransportError):
            assert reason is None and self.expected[prompt].startswith(text)
            self.outcomes["cut"] += 1
            return
        assert (text, reason) == (self.expected[prompt], "length")
        self.outcomes["streamed"] += 1

    async def ask_on(self, number: int, until: float) -> None:
        while time.monotonic() < until:
            await (self.stream if number % 2 else self.ask)(PROMPTS[number % len(PROMPTS)])
            number += 3


def test_a_replica_dies_under_load(address, expected):
    async def run() -> tuple[Load, Load]:
        during, after = Load(address, expected), Load(address, expected)
        until = time.monotonic() + SECONDS
        clients = [asyncio.create_task(during.ask_on(number, until)) for number in range(CLIENTS)]
        await asyncio.sleep(SECONDS / 4)
        os.kill(replicas()[0].pid, signal.SIGKILL)
        await asyncio.gather(
            *clients
        )  # raises if an answer is wrong, or an error reaches a client that asks for no stream
        await asyncio.gather(*(after.ask_on(number, 0.0) or after.stream(PROMPTS[number]) for number in range(8)))
        return during, after

    assert len(replicas()) == 2
    during, _ = asyncio.run(run())
    print(during.outcomes, during.statuses)
    # What the replica had not begun to answer came back as an error, which the client has retried.
    assert during.statuses[500] > 0
    assert set(during.statuses) <= {200, 500, 503}
    assert during.outcomes["whole"] > 0 and during.outcomes["streamed"] > 0  # how many depends on the machine
    deadline = time.monotonic() + 60
    while len(replicas()) < 2:  # Ray starts another
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_arguments_are_checked():
    from pydantic import ValidationError

    from tvm_attn.serving.ray import Arguments

    assert Arguments.model_validate({"artifact": "x", "replicas": "2"}).replicas == 2  # as the command line gives them
    for wrong in ({}, {"artifact": "x", "replicas": 0}, {"artifact": "x", "replica": 2}):
        with pytest.raises(ValidationError):
            Arguments.model_validate(wrong)
