"""Clients that go away, queues that are full, and servers that end."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

import tvm_attn
from tests.serving.servers import NAME, serving

LONG = {"prompt": "Once", "max_tokens": 200, "temperature": 0}
ENDLESS = {**LONG, "ignore_eos": True}


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class SlowModel:
    """A model of its own whose every step takes at least `seconds`."""

    def __init__(self, folder, seconds, **options):
        self.model = tvm_attn.load(folder, device="cpu", **options)
        self.steps = 0
        engine = self.model.engine
        decode = engine.decode

        def slow(*args, **options):
            time.sleep(seconds)
            self.steps += 1
            return decode(*args, **options)

        engine.decode = slow


@pytest.fixture
def slow(demo_artifact):
    return SlowModel(demo_artifact, 0.02, max_batch=2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_goes_away_frees_its_slots(slow, stream, n):
    with serving(slow.model, queue=4) as running:
        body = json.dumps({**ENDLESS, "stream": stream, "n": n}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
            connection.sendall(head.encode() + body)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: slow.model.scheduler.stats.running == n and slow.steps >= 3)
        before = slow.steps
        wait_until(lambda: slow.model.scheduler.stats.running == 0)
        assert slow.steps - before < 20  # of 200
        assert slow.model.scheduler.stats.free_slots == 2
        wait_until(lambda: running.app.state.traffic.running == 0)


def test_a_client_that_leaves_the_queue(slow):
    with serving(slow.model, queue=4) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        threads = [threading.Thread(target=lambda: http.post("/v1/completions", json=ENDLESS)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: slow.model.scheduler.stats.running == 2)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/completions", json=LONG, timeout=0.2)
        wait_until(lambda: slow.model.scheduler.stats.waiting == 0)
        for thread in threads:
            thread.join(60)


def test_disconnect_of_the_asyncio_client_in_mid_stream(slow):
    with serving(slow.model) as running:

        async def leave():
            async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x") as client:
                parts = await client.completions.create(
                    model=NAME, prompt="One", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
                )
                async for _ in parts:
                    await parts.close()
                    return

        asyncio.run(leave())
        wait_until(lambda: slow.model.scheduler.stats.running == 0)
        assert slow.steps < 30


def test_a_full_queue(slow):
    with serving(slow.model, queue=1) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        answers = []
        post = lambda: answers.append(http.post("/v1/completions", json={**ENDLESS, "max_tokens": 60}))  # noqa: E731
        threads = [threading.Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: (stats := slow.model.scheduler.stats).running == 2 and stats.waiting == 1)
        answer = http.post("/v1/completions", json=LONG)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        answer = http.post("/v1/completions", json={**LONG, "stream": True, "n": 2})  # all or none
        assert answer.status_code == 429
        assert slow.model.scheduler.stats.waiting == 1
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0).completions.create(
                model=NAME, prompt="A"
            )
        # The client tries again by itself, as the header says.
        patient = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=20)
        assert patient.completions.create(model=NAME, prompt="A", max_tokens=1).choices
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200] * 3


def test_ending_finishes_what_runs_and_refuses_what_comes(slow):
    with serving(slow.model) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        found = {}

        def ask(stream):
            found[stream] = http.post("/v1/completions", json={**ENDLESS, "max_tokens": 60, "stream": stream})

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_until(lambda: slow.model.scheduler.stats.running == 2)
        running.server.handle_exit(signal.SIGTERM, None)
        answer = http.post("/v1/completions", json=LONG)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "shutting_down"
        assert http.get("/health").status_code == 503
        for thread in threads:
            thread.join(60)
        text = slow.model.generate("Once", max_new_tokens=60, stop_token_ids=()).text
        assert found[False].json()["choices"][0]["text"] == text
        assert found[True].text.endswith('"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')
        running.thread.join(30)
        assert not running.thread.is_alive()


@pytest.mark.parametrize("how", ["a second signal", "the limit"])
def test_ending_at_once(slow, how):
    limit = 0.2 if how == "the limit" else 1000
    with serving(slow.model, shutdown_seconds=limit) as running, httpx.Client(timeout=60) as http:
        found = {}

        def ask(stream):
            found[stream] = http.post(f"{running.url}/v1/completions", json={**ENDLESS, "stream": stream})

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_until(lambda: slow.model.scheduler.stats.running == 2 and slow.steps > 1)
        running.server.handle_exit(signal.SIGTERM, None)
        if how == "a second signal":
            running.server.handle_exit(signal.SIGTERM, None)
        for thread in [*threads, running.thread]:
            thread.join(60)
            assert not thread.is_alive()
        assert found[False].status_code == 503 and found[False].json()["error"]["code"] == "shutting_down"
        last = found[True].text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert slow.steps < 100


# --- the command ---


def start(folder, *arguments, **environment):
    command = [sys.executable, "-m", "tvm_attn", "serve", str(folder), "--port", "0", "--device", "cpu", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    return process


def test_the_command(demo_artifact):
    with start(demo_artifact, "--name", "demo", "--max-batch", "2", TVM_ATTN_API_KEY="one, two") as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving demo at (http://127\.0\.0\.1:\d+) on cpu\n", line)
            assert found, line
            assert httpx.get(f"{found[1]}/health").status_code == 200
            assert httpx.get(f"{found[1]}/v1/models").status_code == 401
            client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="two", max_retries=0)
            parts = client.completions.create(
                model="demo", prompt="Once", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
            )
            first = next(iter(parts))
            process.send_signal(signal.SIGTERM)
            rest = list(parts)
            assert first.choices[0].finish_reason is None and rest[-1].choices[0].finish_reason == "length"
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_ctrl_c(demo_artifact):
    with start(demo_artifact) as process:
        try:
            assert process.stdout.readline().startswith("serving artifact at http://127.0.0.1:")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


def test_an_address_that_cannot_be_used(demo_artifact, capsys):
    from tvm_attn.serve import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(demo_artifact), "--port", str(taken.getsockname()[1])]) == 2
    assert re.search(
        r"error: port \d+ of 127.0.0.1 cannot be used \(.*\); name another with --port", capsys.readouterr().err
    )
    assert main([str(demo_artifact), "--host", "no.such.host.invalid"]) == 2
    assert "--host" in capsys.readouterr().err
    assert main([str(demo_artifact), "--api-key", "ä"]) == 2
    assert "key" in capsys.readouterr().err
