"""Mixed load for a long time: clients of all kinds, many of which go away in the middle.

Every answer is compared with what the same model gives for the request alone; what came before a disconnection must be
its beginning.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from benchmarks.serving.load import new_client
from benchmarks.serving.servers import ServerProcess
from tvm_attn.cli import Show
from tvm_attn.runtime.model import Model

_CLIENTS = 12
_REQUESTS = 240  # different ones
_SAMPLE_SECONDS = 10.0
_SETTLED_SECONDS = 300.0  # memory is compared from then on
_MOST_GROWTH = 0.05
_LONGEST_REQUEST = 120.0
_WORDS = [
    "Once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "dog",
    "who",
    "went",
    "to",
    "the",
    "park",
    "and",
    "red",
    "ball",
]


@dataclass
class Question:
    """A request and the texts of its choices."""

    path: str
    body: dict[str, Any]
    texts: list[str]


def _questions(model: Model, seed: int, show: Show) -> list[Question]:
    """Random requests, each answered alone by a model in this process."""
    rng = np.random.default_rng(seed)
    context, found = model.config.n_positions, list[Question]()
    shared = " ".join(rng.choice(_WORDS, context // 8))
    while len(found) < _REQUESTS:
        show("computing the answers", len(found) / _REQUESTS)
        words = " ".join(rng.choice(_WORDS, int(rng.integers(1, context // 4))))
        prompt = f"{shared} {words}" if rng.random() < 0.3 else words
        n = int(rng.choice([1, 1, 1, 2, 3]))
        options: dict[str, Any] = {"seed": int(rng.integers(1000)), "temperature": float(rng.choice([0, 0.7, 1.0]))}
        if rng.random() < 0.3:
            options["top_p"] = 0.9
        if rng.random() < 0.3:
            options["frequency_penalty"] = 0.5
        if rng.random() < 0.2:
            options["stop"] = [" park", "dog."]
        most = int(rng.integers(1, context // 3))
        is_chat = rng.random() < 0.3
        asked, stops = prompt, list(options.get("stop", ()))
        if is_chat:
            asked, stops = f"User: {prompt}\n\nAssistant:", ["\n\nUser:", *stops]
        if len(model.tokenizer.encode(asked) if model.tokenizer else asked) > context:
            continue
        completions = model.generate([asked], n=n, max_new_tokens=most, **(options | {"stop": stops}))
        body = {"model": "model", "max_tokens": most, "n": n, **options}
        if is_chat:
            question = Question("/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}, [])
        else:
            question = Question("/v1/completions", body | {"prompt": prompt}, [])
        question.texts = [completion.text for completion in completions]
        found.append(question)
    return found


def soak(
    model: Model,
    server: ServerProcess,
    seconds: float,
    seed: int,
    report: dict[str, Any],
    save: Callable[[], None],
    show: Show,
) -> bool:
    """Runs the load and fills in `report`; whether nothing was wrong."""
    questions = _questions(model, seed, show)
    counts: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    memory: list[tuple[float, int]] = []
    begin = time.monotonic()
    rng = np.random.default_rng(seed + 1)

    async def one(client: httpx.AsyncClient) -> None:
        question = questions[rng.integers(len(questions))]
        stream, leaves = bool(rng.random() < 0.6), bool(rng.random() < 0.3)
        patience = float(rng.exponential(0.1)) if leaves else _LONGEST_REQUEST
        texts = [""] * len(question.texts)
        try:
            status = await asyncio.wait_for(_ask(client, question, stream, texts), patience)
        except asyncio.TimeoutError:
            counts["left" if leaves else "timed out"] += 1
            if not leaves:
                wrong.append({"request": question.body, "problem": "no answer"})
            is_right = all(whole.startswith(text) for whole, text in zip(question.texts, texts, strict=True))
        else:
            counts[f"status {status}"] += 1
            if status == 429:
                await asyncio.sleep(0.05)
                return
            is_right = status == 200 and texts == question.texts
        if not is_right:
            counts["wrong"] += 1
            wrong.append({"request": question.body, "stream": stream, "got": texts, "expected": question.texts})

    async def work(client: httpx.AsyncClient) -> None:
        while time.monotonic() < begin + seconds:
            try:
                await one(client)
            except httpx.HTTPError as error:
                counts["connection errors"] += 1
                wrong.append({"problem": f"{type(error).__name__}: {error}"})
                server.check()

    async def sample(client: httpx.AsyncClient) -> None:
        while True:
            memory.append((round(time.monotonic() - begin, 1), server.memory()))
            report.update(_summary(counts, wrong, memory))
            save()
            done = (time.monotonic() - begin) / seconds
            show("soak", min(done, 1.0), f": {sum(counts.values())} requests, {memory[-1][1] / 1e6:.0f} MB")
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def run() -> dict[str, float]:
        async with new_client(server) as client:
            sampler = asyncio.create_task(sample(client))
            await asyncio.gather(*(work(client) for _ in range(_CLIENTS)))
            sampler.cancel()
            end = time.monotonic() + 10
            while True:  # everybody has gone: all slots must be free
                state = await _state(client)
                if not state["tvm_attn_running"] + state["tvm_attn_waiting"] or time.monotonic() > end:
                    return state
                await asyncio.sleep(0.1)

    state = asyncio.run(run())
    memory.append((round(time.monotonic() - begin, 1), server.memory()))
    report.update(_summary(counts, wrong, memory))
    report["stuck_sequences"] = int(state["tvm_attn_running"] + state["tvm_attn_waiting"])
    report["prefix_hits"] = int(state["tvm_attn_prefix_hits_total"])
    report["generated_tokens"] = int(state["tvm_attn_generated_tokens_total"])
    grown = report["memory_growth_after_settling"]
    report["passed"] = not wrong and not report["stuck_sequences"] and (grown is None or grown <= _MOST_GROWTH)
    return bool(report["passed"])


async def _ask(client: httpx.AsyncClient, question: Question, stream: bool, texts: list[str]) -> int:
    """Sends a request and adds to the texts of its choices as they come; the status."""
    is_chat = question.path.endswith("chat/completions")
    async with client.stream("POST", question.path, json={**question.body, "stream": stream}) as response:
        if response.status_code != 200:
            await response.aread()
            return response.status_code
        if not stream:
            for choice in json.loads(await response.aread())["choices"]:
                texts[choice["index"]] = choice["message"]["content"] if is_chat else choice["text"]
            return 200
        is_done = False
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content", "") if is_chat else choice["text"]
            is_done = is_done or line == "data: [DONE]"
        return 200 if is_done else 0


async def _state(client: httpx.AsyncClient) -> dict[str, float]:
    lines = (await client.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def _summary(counts: Counter[str], wrong: list[dict[str, Any]], memory: list[tuple[float, int]]) -> dict[str, Any]:
    settled = [used for at, used in memory if at >= _SETTLED_SECONDS]
    growth = settled[-1] / settled[0] - 1 if len(settled) > 1 else None
    return {
        "seconds": memory[-1][0],
        "requests": dict(counts),
        "wrong": wrong[:20],
        "memory": memory,
        "memory_growth_after_settling": growth,
    }
