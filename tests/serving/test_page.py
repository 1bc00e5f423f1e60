"""The page in a browser: against a server that does as it is told, and against the real one."""
# ruff: noqa: E402 (imports after those that may skip the file)

import asyncio
import base64
import contextlib
import json
import math
import os
import re
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

import tvm_attn
from tvm_attn.runtime.model import Model
from tvm_attn.serving import page as page_module

CHROMIUM = "/usr/bin/chromium"
PAGE = Path(page_module.__file__).parent / "page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"needs {CHROMIUM}, of Debian's package chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Serves an application in a thread; gives its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


# --- a server that does as it is told ---


def chunk(text: str, parts: list[tuple[str, float, dict[str, float]]], reason: str | None = None) -> dict[str, Any]:
    """A chunk of a stream as the OpenAI API has it; parts are (token, probability, alternatives)."""
    logprobs = {
        "tokens": [token for token, _, _ in parts],
        "token_logprobs": [math.log(share) for _, share, _ in parts],
        "top_logprobs": [{text: math.log(share) for text, share in top.items()} for _, _, top in parts],
        "text_offset": [0 for _ in parts],
    }
    return {"choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}]}


HELLO = [
    chunk(" Hello", [(" Hello", 0.5, {" Hello": 0.5, " Hi": 0.25})]),
    chunk("\n", [("\n", 0.125, {" you": 0.75})]),
    chunk("", [("bytes:\\xe2\\x82", 0.5, {"bytes:\\xe2\\x82": 0.5})]),
    chunk("€", [("bytes:\\xac", 0.5, {"bytes:\\xac": 0.5})]),
    chunk("", [("a", 1.0, {"a": 1.0})]),
    chunk("ab", [("b", 1.0, {"b": 1.0})]),
    chunk("<b>", [("<b>", 0.9, {"<b>": 0.9})], "length"),
    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 6, "total_tokens": 7}},
]


class Told:
    """Answers by the prompt; what the page sent is in `requests`."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.key: str | None = None
        self.is_left = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/attention", self.attention, methods=["POST"]),
                *page_module.routes(None),  # type: ignore[arg-type]
            ]
        )

    def refused(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return error(401, "wrong API key", code="invalid_api_key")

    async def models(self, request: Request) -> Any:
        return self.refused(request) or JSONResponse({"object": "list", "data": [{"id": "told", "object": "model"}]})

    async def completions(self, request: Request) -> Any:
        if refused := self.refused(request):
            return refused
        body = await request.json()
        self.requests.append(body)
        if body["prompt"] == "busy":
            return error(429, "too many requests wait", headers={"Retry-After": "3"})
        if body["prompt"] == "no json":
            return StreamingResponse(iter([b"<html>"]), 502)
        return StreamingResponse(self.events(body["prompt"]), media_type="text/event-stream")

    async def attention(self, request: Request) -> Any:
        """Head h of layer l attends to token h with 3/4 and to itself with 1/4, in layer 1 the other way."""
        body = await request.json()
        self.requests.append(body)
        if body["prompt"] == "long":
            return error(400, "the prompt is too long")
        words = [f" {word}" for word in body["prompt"].split()]
        if "layer" not in body:
            lens = [[[[f" {layer}{word}", 0.5], [" other", 0.25]] for word in words] for layer in range(3)]
            return JSONResponse({"tokens": words, "layers": 2, "heads": 3, "lens": lens})
        values = []
        for head in range(3):
            for to in range(len(words)):
                row = np.zeros(to + 1)
                row[min(head, to)] += 0.25 if body["layer"] else 0.75
                row[to] += 1 - row.sum()
                values += row.tolist()
        content = (np.array(values) * 10000).astype("<u2").tobytes()
        return JSONResponse({"weights": base64.b64encode(zlib.compress(content)).decode()})

    async def events(self, prompt: str) -> AsyncIterator[bytes]:
        def event(content: Any) -> bytes:
            return b"data: " + json.dumps(content).encode() + b"\n\n"

        if prompt == "slow":
            try:
                for index in range(1000):
                    yield event(chunk(f" {index}", [(f" {index}", 0.5, {})]))
                    await asyncio.sleep(0.05)
            finally:
                self.is_left.set()
        if prompt == "breaks":
            yield event(HELLO[0])
            yield event({"error": {"message": "the logits hold NaN", "type": "server_error"}})
            return
        if prompt == "cut":
            yield event(HELLO[0])
            return
        stream = b"".join(map(event, HELLO)) + b"data: [DONE]\n\n"
        for index in range(0, len(stream), 7):  # in pieces that split events and characters
            yield stream[index : index + 7]


def error(status: int, message: str, headers: dict[str, str] | None = None, **fields: Any) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": message, "type": "x", "param": None, "code": None} | fields}, status, headers
    )


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def address(told: Told) -> Iterator[str]:
    with served(told.app) as found:
        yield found


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """open_page(address, **context) opens the page, and fails the test if the browser's console holds an error."""
    contexts, said = [], []

    def open_it(address: str, **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        found = context.new_page()
        found.set_default_timeout(30_000)
        found.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        found.on("pageerror", lambda failure: said.append(str(failure)))
        found.goto(address)
        until(found, "document.getElementById('model').textContent || !document.getElementById('error').hidden")
        return found

    yield open_it
    for context in contexts:
        context.close()
    # The browser itself notes each answer that is an error.
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


def until(page: Any, expression: str) -> None:
    """Waits until an expression holds. The page's policy forbids what Playwright has for that."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.01)


def generate(page: Any, prompt: str, **fields: Any) -> None:
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#generate")


def wait_for_end(page: Any) -> None:
    until(page, "document.getElementById('stop').disabled")


def test_streams_tokens_with_their_probabilities(open_page, address, told):
    page = open_page(address)
    assert page.text_content("#model") == "told"
    generate(page, "Say", temperature=0.5, top_k="", top_p=0.9, min_p=0.1, seed=7, max_tokens=6)
    wait_for_end(page)
    assert told.requests == [
        {
            "model": "told",
            "prompt": "Say",
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 5,
            "temperature": 0.5,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 7,
            "max_tokens": 6,
        }
    ]
    assert page.text_content("#output").startswith("Say Hello\n€ab<b>")
    texts = page.eval_on_selector_all(".token", "found => found.map(each => each.textContent)")
    assert texts == [" Hello", "\n", "€", "a", "b", "<b>"]
    labels = page.eval_on_selector_all(".token", "found => found.map(each => each.ariaLabel)")
    assert labels[:3] == ["␣Hello, 50.0 %", "↵, 12.5 %", "€, 25.0 %"]
    assert re.fullmatch(
        r"7 tokens, first after [\d.]+ m?s, [\d.]+ tokens/s, max tokens reached", page.text_content("#stats")
    )
    assert page.text_content("#say").startswith("max tokens reached.")


def test_alternatives_by_pointer_and_by_keys(open_page, address):
    page = open_page(address)
    generate(page, "Say")
    wait_for_end(page)

    def shown() -> list[list[str]]:
        rows = "found => found.map(row => [row.className, row.cells[0].textContent, row.cells[1].textContent])"
        return page.eval_on_selector_all("#alternatives tr", rows)

    page.hover("#token-0")
    assert shown() == [["taken", "␣Hello", "50.0 %"], ["", "␣Hi", "25.0 %"]]
    assert page.text_content("#alternatives caption") == "␣Hello, 50.0 % likely"
    page.mouse.move(0, 0)
    page.focus("#copy")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tokens"
    page.keyboard.press("ArrowRight")
    assert shown() == [["", "␣you", "75.0 %"], ["taken", "↵", "12.5 %"]]
    assert page.get_attribute("#tokens", "aria-activedescendant") == "token-1"
    page.keyboard.press("End")
    assert page.get_attribute("#token-5", "aria-selected") == "true"
    assert page.locator("[aria-selected=true]").count() == 1
    page.keyboard.press("Home")
    assert page.get_attribute("#token-0", "aria-selected") == "true"


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(open_page, address, told, how):
    page = open_page(address)
    generate(page, "slow")
    page.wait_for_selector("#token-2")
    assert page.is_enabled("#stop")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    wait_for_end(page)
    assert told.is_left.wait(10)
    assert page.text_content("#stats").endswith(", stopped")
    assert page.is_hidden("#error")
    count = page.locator(".token").count()
    page.wait_for_timeout(200)
    assert page.locator(".token").count() == count
    page.focus("#prompt")
    page.fill("#prompt", "Say")
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('stats').textContent.endsWith('max tokens reached')")
    assert page.text_content("#output").startswith("Say Hello")


def test_a_new_completion_takes_the_place_of_the_last(open_page, address, told):
    page = open_page(address)
    generate(page, "slow")
    page.wait_for_selector("#token-1")
    generate(page, "Say")
    until(page, "document.getElementById('stats').textContent.endsWith('max tokens reached')")
    assert told.is_left.wait(10)
    assert page.text_content("#output").startswith("Say Hello\n€ab<b>")
    assert page.locator(".token").count() == 6


@pytest.mark.parametrize(
    ("prompt", "message", "tokens"),
    [
        ("busy", "too many requests wait (try again in 3 s)", 0),
        ("no json", "The server answers 502 Bad Gateway", 0),
        ("breaks", "the logits hold NaN", 1),
        ("cut", "The server has ended the answer before its end.", 1),
    ],
)
def test_errors_are_shown_and_the_next_completion_clears_them(open_page, address, prompt, message, tokens):
    page = open_page(address)
    generate(page, prompt)
    page.wait_for_selector("#error:not([hidden])")
    assert page.text_content("#error") == message
    assert page.locator(".token").count() == tokens
    wait_for_end(page)
    generate(page, "Say")
    wait_for_end(page)
    assert page.is_hidden("#error")


def test_a_wrong_option_is_not_sent(open_page, address, told):
    page = open_page(address)
    generate(page, "Say", top_p=2)
    assert page.locator("[name=top_p]:invalid").count() == 1
    assert told.requests == []


def test_the_api_key(open_page, address, told):
    told.key = "secret"
    page = open_page(address)
    assert page.text_content("#error") == "This server asks for an API key."
    page.fill("#key", "wrong")
    page.press("#key", "Tab")
    until(page, "document.getElementById('error').textContent === 'wrong API key'")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    until(page, "document.getElementById('model').textContent === 'told'")
    assert page.is_hidden("#error")
    generate(page, "Say")
    wait_for_end(page)
    assert page.locator(".token").count() == 6


def test_a_server_that_is_gone(open_page, told):
    with served(told.app) as address:
        page = open_page(address)
    generate(page, "Say")
    page.wait_for_selector("#error:not([hidden])")
    assert page.text_content("#error") == "The server cannot be reached."


# --- attention ---


def test_a_head_is_chosen(open_page, address, told):
    page = open_page(address)
    page.fill("#prompt", "one two three four five")
    page.click("#attend")
    page.wait_for_selector(".head[aria-pressed=true]")
    until(page, "!document.getElementById('attend').disabled")
    prompt = {"prompt": "one two three four five"}
    assert told.requests == [prompt, prompt | {"layer": 0}, prompt | {"layer": 1}]
    names = page.eval_on_selector_all(".head", "found => found.map(each => each.ariaLabel)")
    assert names == [f"Layer {layer}, head {head}" for layer in (0, 1) for head in (0, 1, 2)]
    assert page.text_content(".detail h3") == "Layer 0, head 0"
    said = "␣five (5 of 5) attends to ␣one 75 %, ␣five 25 %"
    assert page.text_content(".detail .note").startswith(said)
    page.click("[aria-label='Layer 1, head 1']")
    until(page, "document.querySelector('.detail h3').textContent === 'Layer 1, head 1'")
    assert page.text_content(".detail .note").startswith("␣five (5 of 5) attends to ␣five 75 %, ␣two 25 %")
    page.hover(".to span >> nth=2")
    assert page.text_content(".detail .note").startswith("␣three (3 of 5) attends to ␣three 75 %, ␣two 25 %")
    assert page.locator(".lines path").count() == 2
    assert page.locator(".head[aria-pressed=true]").count() == 1
    rows = page.eval_on_selector_all(
        ".lens tr", "found => found.map(row => [...row.cells].map(each => each.textContent))"
    )
    assert rows[0] == ["input", "␣0␣three 50 %", "␣other 25 %"]
    assert [row[0] for row in rows] == ["input", "layer 0", "layer 1"]
    assert page.text_content(".lens caption").startswith("The next token after ␣three")


def test_a_head_is_chosen_with_keys(open_page, address):
    page = open_page(address)
    page.fill("#prompt", "one two three")
    page.click("#attend")
    page.wait_for_selector(".head[aria-pressed=true]")
    until(page, "!document.getElementById('attend').disabled")
    page.focus("#attend")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.ariaLabel") == "Layer 1, head 1"
    until(page, "document.querySelector('.detail h3').textContent === 'Layer 1, head 1'")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    assert page.text_content(".detail .note").startswith("␣two (2 of 3) attends to ␣two 100 %")
    page.keyboard.press("Home")
    assert page.text_content(".detail .note").startswith("␣one (1 of 3) attends to ␣one 100 %")


def test_the_pictures_show_the_weights(open_page, address):
    """The picture of head 1 has its first column and its diagonal filled, and nothing above the diagonal."""
    page = open_page(address)
    page.fill("#prompt", "a b c d")
    page.click("#attend")
    page.wait_for_selector(".head[aria-pressed=true]")
    until(page, "!document.getElementById('attend').disabled")
    pixels = page.eval_on_selector(".head canvas", "each => [...each.getContext('2d').getImageData(0, 0, 4, 4).data]")
    alpha = np.array(pixels).reshape(4, 4, 4)[:, :, 3] / 255
    weights = np.zeros((4, 4))
    weights[:, 0] = 0.75
    weights[range(4), range(4)] += 0.25
    np.testing.assert_allclose(alpha, np.sqrt(weights), atol=0.01)


def test_the_attention_of_a_completion(open_page, address, told):
    page = open_page(address)
    generate(page, "one two")
    wait_for_end(page)
    page.click("#attend")
    page.wait_for_selector(".head[aria-pressed=true]")
    assert told.requests[1]["prompt"] == "one two Hello\n€ab<b>"


def test_an_error_of_the_attention(open_page, address):
    page = open_page(address)
    page.fill("#prompt", "long")
    page.click("#attend")
    page.wait_for_selector("#attention-error:not([hidden])")
    assert page.text_content("#attention-error") == "the prompt is too long"
    page.fill("#prompt", "one two")
    page.click("#attend")
    page.wait_for_selector(".head[aria-pressed=true]")
    assert page.is_hidden("#attention-error")


# --- the real server ---


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, device="cpu")


@pytest.fixture(scope="module")
def real_address(model: Model) -> Iterator[str]:
    from tvm_attn.serving.app import create_app

    with served(create_app(model, name="demo", api_key="secret")) as found:
        yield found


@pytest.fixture
def real_page(open_page: Callable[..., Any], real_address: str) -> Any:
    page = open_page(real_address)
    page.fill("#key", "secret") if page.is_visible("#key") else None
    page.press("#key", "Tab")
    until(page, "document.getElementById('model').textContent === 'demo'")
    return page


def test_the_models_tokens_and_probabilities(real_page, model):
    page, prompt = real_page, "Return the"
    generate(page, prompt, temperature=0, top_k="", max_tokens=12)
    wait_for_end(page)
    completion = model.generate(prompt, max_new_tokens=12)
    assert page.eval_on_selector("#output", "each => each.textContent").strip() == prompt + completion.text.rstrip()
    ids = model.tokenizer.encode(prompt) + list(completion.token_ids)
    logits = model.logits([ids])[0].astype(np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    labels = page.eval_on_selector_all(".token", "found => found.map(each => each.ariaLabel)")
    begin = len(ids) - 12
    for place, label in zip(range(begin, len(ids)), labels, strict=True):
        assert float(label.split(", ")[-1].removesuffix(" %")) == pytest.approx(
            100 * shares[place - 1, ids[place]], abs=0.06
        )
    page.hover("#token-0")
    found = page.eval_on_selector_all(
        "#alternatives td.number", "found => found.map(each => parseFloat(each.textContent))"
    )
    best = np.sort(shares[begin - 1])[::-1][:5]
    assert found == pytest.approx(100 * best, abs=0.06)


def test_the_models_attention(real_page, model, demo_model_dir):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    page, prompt = real_page, "Return the name of the file"
    page.fill("#prompt", prompt)
    page.click("#attend")
    page.wait_for_selector(".head[aria-pressed=true]")
    until(page, "!document.getElementById('attend').disabled")
    page.click("[aria-label='Layer 3, head 1']")
    until(page, "document.querySelector('.detail h3').textContent === 'Layer 3, head 1'")
    reference = transformers.GPT2LMHeadModel.from_pretrained(
        demo_model_dir, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ids = model.tokenizer.encode(prompt)
    with torch.no_grad():
        result = reference(torch.tensor([ids]), output_attentions=True)
    shares = np.sort(100 * result.attentions[3][0, 1, -1].numpy())[::-1][:5]
    said = page.text_content(".detail .note")
    found = [int(number) for number in re.findall(r" (\d+) %", said)]
    assert found == pytest.approx(shares, abs=0.52)  # whole percents
    last = page.eval_on_selector_all(".lens tr:last-child td", "found => found.map(each => each.textContent)")
    best = torch.softmax(result.logits[0, -1].double(), -1).topk(5).values.numpy()
    assert [int(text.split()[-2]) for text in last] == pytest.approx(100 * best, abs=0.52)


def test_the_attention_of_a_long_text_is_refused_in_words(real_page, model):
    real_page.fill("#prompt", "Return the " * 2000)
    real_page.click("#attend")
    real_page.wait_for_selector("#attention-error:not([hidden])")
    assert str(model.config.n_positions) in real_page.text_content("#attention-error")


def test_stop_frees_the_slot(real_page, model, monkeypatch):
    decode = model.engine.decode

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return decode(*arguments, **options)

    monkeypatch.setattr(model.engine, "decode", slow)
    generate(real_page, "Return the", max_tokens=200)
    real_page.wait_for_selector("#token-0")
    real_page.click("#stop")
    wait_for_end(real_page)
    deadline = time.monotonic() + 10
    while model.scheduler.stats.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_servers_own_words_about_a_wrong_request(real_page, model):
    generate(real_page, "Return the " * 2000)
    real_page.wait_for_selector("#error:not([hidden])")
    assert str(model.config.n_positions) in real_page.text_content("#error")


# --- how it looks ---


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_no_horizontal_scroll(open_page, address, width):
    page = open_page(address, viewport={"width": width, "height": 800})
    generate(page, "a" * 300)
    wait_for_end(page)
    page.hover("#token-0")
    page.click("#attend")
    page.wait_for_selector(".detail h3")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inside = """found => found.every(each => each.getBoundingClientRect().right <= innerWidth)"""
    assert page.eval_on_selector_all("main *", inside)


def rgba(color: str) -> np.ndarray:
    """Red, green, blue and opacity, 0 to 1, of "rgb(r, g, b)", "rgba(r, g, b, a)" or "color(srgb r g b / a)"."""
    parts = [float(part) for part in re.findall(r"[\d.]+(?:e-?\d+)?", color.removeprefix("color(srgb"))]
    scale = 1 if color.startswith("color") else 255
    return np.array([*(part / scale for part in parts[:3]), *parts[3:], 1.0][:4])


def luminance(color: np.ndarray) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in color[:3]]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(open_page, address, scheme):
    page = open_page(address, color_scheme=scheme)
    generate(page, "Say")
    wait_for_end(page)
    page.click("#attend")
    page.wait_for_selector(".detail h3")
    page.hover("#token-0")
    back = rgba(page.eval_on_selector("body", "each => getComputedStyle(each).backgroundColor"))
    assert (luminance(back) < 0.1) == (scheme == "dark")
    # The color of each element's text, and the backgrounds of the element and of all around it.
    found = page.evaluate("""() => [...document.querySelectorAll("body *")]
        .filter(each => each.checkVisibility() && !each.disabled
            && [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
        .map(each => {
            const layers = [];
            for (let at = each; at; at = at.parentElement) layers.push(getComputedStyle(at).backgroundColor);
            return [getComputedStyle(each).color, layers, each.outerHTML.slice(0, 80)];
        })""")
    assert len(found) > 20
    for text, layers, where in found:
        behind = back
        for layer in map(rgba, reversed(layers)):
            behind = layer * layer[3] + behind * (1 - layer[3])
        light, dark = sorted((luminance(rgba(text)), luminance(behind)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, where


def test_every_control_has_a_name_and_is_reached_by_tab(open_page, address):
    page = open_page(address)
    generate(page, "Say")
    wait_for_end(page)
    names = page.eval_on_selector_all(
        "button, input, textarea, [role=listbox]",
        "found => found.filter(each => each.checkVisibility())"
        ".map(each => each.ariaLabel || each.labels?.[0]?.textContent.trim() || each.textContent.trim())",
    )
    assert all(names) and len(names) == len(set(names))
    page.focus("#prompt")
    reached = []
    for _ in range(20):
        reached.append(
            page.evaluate("document.activeElement.name || document.activeElement.id || document.activeElement.tagName")
        )
        page.keyboard.press("Tab")
    for name in (
        "prompt",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "max_tokens",
        "SUMMARY",
        "generate",
        "tokens",
    ):
        assert name in reached


# --- what is served ---


def test_headers_forbid_everything_from_elsewhere(address):
    httpx = pytest.importorskip("httpx", reason="needs httpx, of the extra test")
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")):
        answer = httpx.get(address + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert httpx.get(address + "/page/index.html").status_code == 404
    assert httpx.get(address + "/page/..%2fpage.py").status_code == 404
    assert httpx.post(address + "/").status_code == 405


def test_the_policy_holds_in_the_browser(browser, address):
    """A script and a style in the HTML, and an address elsewhere, are refused."""
    page = browser.new_page()
    page.goto(address)
    page.evaluate("""() => {
        window.violations = [];
        document.addEventListener("securitypolicyviolation", event => window.violations.push(event.effectiveDirective));
        for (const kind of ["script", "style"]) {
            const element = document.createElement(kind);
            element.textContent = kind === "script" ? "window.isRun = true" : "body { color: red }";
            document.head.append(element);
        }
        fetch("http://127.0.0.2:1/").catch(() => 0);
    }""")
    until(page, "window.violations.length >= 3")
    assert sorted(page.evaluate("window.violations")) == ["connect-src", "script-src-elem", "style-src-elem"]
    assert page.evaluate("window.isRun") is None
    page.close()


def test_the_files_name_no_other_address():
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"//[\w.-]+\.\w|@import|url\(", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE)), (
            path.name
        )
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", html)
