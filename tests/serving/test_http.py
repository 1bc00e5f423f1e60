"""What the server does with requests that are wrong, huge, slow, from elsewhere or without a key."""

import json
import shutil
import socket
import subprocess
from unittest import mock

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.servers import NAME, QUEUE, SLOTS, serving
from tvm_attn.serving import body as body_module
from tvm_attn.serving import server as server_module

GOOD = {"prompt": "One", "max_tokens": 2, "temperature": 0}


def error_of(answer):
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert answer.headers["content-type"] == "application/json"
    return error


# --- endpoints ---


def test_models(client, http, model):
    (found,) = client.models.list()
    assert (found.id, found.object) == (NAME, "model")
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="A")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_tokens(http, model):
    text = 'Once "upon" a time… 🙂<|endoftext|>'
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == model.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), model.config.n_positions)
    assert len(answer["token_strs"]) == answer["count"] and answer["token_strs"][0] == "On"
    assert answer["token_strs"][-1] == "<|endoftext|>"
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text.removesuffix("<|endoftext|>")}
    for path, content in (("/tokenize", {}), ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": "1"})):
        assert error_of(http.post(path, json=content))["param"] in ("prompt", "tokens")


def test_health_and_metrics(http, model):
    def figures():
        lines = [line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}

    assert http.get("/health").json() == {"status": "ok"}
    before = figures()
    prompt = "A prompt that nobody else sends: " + "x" * 40
    for stream in (False, True):
        answer = http.post("/v1/completions", json={**GOOD, "prompt": prompt, "max_tokens": 5, "stream": stream})
        assert answer.status_code == 200
    after = figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    tokens = len(model.generate(prompt, max_new_tokens=5).token_ids)
    assert grown['tvm_attn_requests_total{path="/v1/completions",status="200"}'] == 2
    assert grown["tvm_attn_generated_tokens_total"] == 2 * tokens
    assert grown["tvm_attn_prompt_tokens_total"] == 2 * len(model.tokenizer.encode(prompt))
    assert grown["tvm_attn_prefix_hits_total"] >= 1 and grown["tvm_attn_reused_tokens_total"] > 0
    assert grown["tvm_attn_time_to_first_token_seconds_count"] == 2
    assert grown["tvm_attn_time_between_tokens_seconds_count"] == tokens - 1
    assert (after["tvm_attn_running"], after["tvm_attn_waiting"], after["tvm_attn_free_slots"]) == (0, 0, SLOTS)
    assert after["tvm_attn_batch_size"] >= 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("stream", [False, True])
def test_curl(url, model, stream):
    """As people type it, without a header for the type of the body."""
    body = json.dumps({**GOOD, "max_tokens": 8, "stream": stream})
    command = ["curl", "-sN", "--fail-with-body", f"{url}/v1/completions", "-d", body]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    if stream:
        *events, end = output.removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]"
        text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
    else:
        text = json.loads(output)["choices"][0]["text"]
    assert text == model.generate("One", max_new_tokens=8).text


def test_paths_and_methods(http):
    assert error_of(http.get("/v1/nothing"))["type"] == "not_found_error"
    answer = http.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and error_of(answer)


# --- bodies ---


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff\xfe",
        b'{"prompt": "A", "temperature": NaN}',
        b'{"prompt": "A", "n": ' + b"1" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_malformed_json(http, content):
    answer = http.post("/v1/completions", content=content)
    assert answer.status_code == 400 and error_of(answer)["code"] == "invalid_json"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["\ud800", "\x00", "a" * 3000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = [
    *("model", "prompt", "messages", "n", "best_of", "echo", "logprobs", "top_logprobs", "stop", "seed", "max_tokens"),
    *("max_completion_tokens", "stream", "stream_options", "logit_bias", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "top_p", "temperature", "repetition_penalty", "suffix", "tools", "response_format", "tokens"),
    *("min_tokens", "ignore_eos", "stop_token_ids", "return_token_ids", "return_token_strs"),
]
few_tokens = {"max_tokens": 1, "max_completion_tokens": 1}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    good=st.booleans(),
    wrong=st.dictionaries(st.sampled_from(FIELDS), values, max_size=3),
)
def test_no_body_is_answered_with_500(http, path, good, wrong):
    start = {"prompt": "A", "messages": [{"role": "user", "content": "A"}], "tokens": [1], **few_tokens}
    answer = http.post(path, content=json.dumps((start if good else few_tokens) | wrong))
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert error_of(answer)["code"]


def test_limits(http, model):
    answer = http.post("/v1/completions", json={**GOOD, "prompt": ["A"] * (SLOTS + QUEUE + 1)})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "too_many_completions")
    answer = http.post("/v1/completions", json={**GOOD, "n": SLOTS + QUEUE + 1})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "n")
    answer = http.post("/v1/completions", json={**GOOD, "prompt": "A" * (body_module.MOST_BYTES - 100)})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(http, chunked):
    content = b"x" * (body_module.MOST_BYTES + 1)
    answer = http.post("/v1/completions", content=iter([content]) if chunked else content)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")


def connect(running, content=b""):
    found = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    found.sendall(content)
    return found


def read_all(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_large_headers_are_refused(running):
    with connect(running) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"x" * (1 << 20))
            answer = read_all(connection)
        except ConnectionError:  # the server has closed it while we were sending
            answer = b"HTTP/1.1 400"
    assert answer.startswith(b"HTTP/1.1 400")


def test_a_header_or_body_that_does_not_come(running):
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
    with mock.patch.object(server_module, "HEADER_SECONDS", 0.3), mock.patch.object(body_module, "BODY_SECONDS", 0.3):
        with connect(running) as silent, connect(running, start) as no_end, connect(running, start + b"\r\n{") as slow:
            assert read_all(silent) == b"" and read_all(no_end) == b""
            assert read_all(slow).startswith(b"HTTP/1.1 408")
        with connect(running, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as second:
            assert second.recv(65536).startswith(b"HTTP/1.1 200")
            second.sendall(b"GET /hea")
            assert read_all(second).partition(b"\r\n\r\n")[2] in (b"", b'{"status":"ok"}')


# --- who may ask ---


def test_hosts_and_origins(http, running):
    own = f"http://127.0.0.1:{running.port}"
    for name, value, status in (
        ("host", "evil.example", 403),
        ("host", "localhost", 200),
        ("host", f"[::1]:{running.port}", 200),
        ("origin", "https://evil.example", 403),
        ("origin", "null", 403),
        ("origin", own, 200),
    ):
        answer = http.post("/v1/completions", json=GOOD, headers={name: value})
        assert answer.status_code == status, (name, value)
        assert "access-control-allow-origin" not in answer.headers
        if status == 403:
            assert error_of(answer)["type"] == "permission_error"


def test_an_origin_may_be_allowed(model):
    site = "https://example.com"
    with serving(model, origins=[site], api_key="secret") as running:
        import httpx

        with httpx.Client(base_url=running.url, headers={"origin": site}) as http:
            asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
            answer = http.options("/v1/completions", headers=asked)
            assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
            answer = http.post("/v1/completions", json=GOOD, headers={"authorization": "Bearer secret"})
            assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
            answer = http.post("/v1/completions", json=GOOD, headers={"origin": "https://other.example"})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_keys(model):
    with serving(model, api_key=["first", "second"]) as running:
        for key, is_right in (("first", True), ("second", True), ("third", False), ("secon", False), ("firs", False)):
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)
            if is_right:
                assert client.completions.create(model=NAME, **GOOD).choices
                continue
            with pytest.raises(openai.AuthenticationError) as error:
                client.completions.create(model=NAME, **GOOD)
            assert error.value.code == "invalid_api_key"
        import httpx

        with httpx.Client(base_url=running.url) as http:
            assert http.get("/health").status_code == 200
            for path in ("/metrics", "/v1/models", "/tokenizer_info"):
                answer = http.get(path)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert http.get("/v1/models", headers={"authorization": "Basic first"}).status_code == 401
            assert http.get("/v1/models", headers={"authorization": b"Bearer \xff\xe9"}).status_code == 401


def test_a_bug_is_answered_as_json(http, model):
    with mock.patch.object(model.scheduler, "submit", side_effect=RuntimeError("a bug\nof two lines")):
        answer = http.post("/v1/completions", json=GOOD)
    assert answer.status_code == 500 and error_of(answer)["type"] == "server_error"
    assert "two lines" not in answer.text
