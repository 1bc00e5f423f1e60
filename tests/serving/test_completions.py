"""`/v1/completions` with the `openai` package: every answer is that of `Model.generate` alone."""

import asyncio
import json

import openai
import pytest

from tests.serving.servers import NAME
from tvm_attn.runtime.model import Model

PROMPTS = ["Once upon a time", "The little dog", "", "Tom and his mother went to the park. They saw a big"]
OPTIONS = [
    {"temperature": 0},
    {"temperature": 1, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 0, "logit_bias": {"262": -100, "300": 3.5}},
    {"temperature": 0, "stop": [" the", "."]},
]
EXTRA = [{"top_k": 5}, {"min_p": 0.2}, {"repetition_penalty": 1.3}, {"top_k": 3, "min_p": 0.1}, {"min_tokens": 9}]


def expected(model: Model, prompts, **options):
    """The completions of `generate`, with the names that the API has for its options."""
    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    options = {names.get(name, name): value for name, value in options.items()}
    if "logit_bias" in options:
        options["logit_bias"] = {int(key): value for key, value in options["logit_bias"].items()}
    found = model.generate(prompts, **options)
    return found if isinstance(found, list) else [found]


def texts_and_reasons(choices):
    return [(choice.text, choice.finish_reason) for choice in sorted(choices, key=lambda choice: choice.index)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_is_that_of_generate(client, model, prompt, options):
    (completion,) = expected(model, prompt, max_tokens=24, **options)
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=24, **options)
    assert texts_and_reasons(answer.choices) == [(completion.text, completion.finish_reason)]
    assert answer.object == "text_completion" and answer.model == NAME
    prompt_tokens = len(model.tokenizer.encode(prompt)) or 1
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (prompt_tokens, len(completion.token_ids), prompt_tokens + len(completion.token_ids))


@pytest.mark.parametrize("extra", EXTRA, ids=str)
def test_what_others_add_to_the_api(client, model, extra):
    options = {"max_tokens": 16, "temperature": 1.0, "seed": 3}
    answer = client.completions.create(
        model=NAME, prompt=PROMPTS[0], **options, extra_body={**extra, "return_token_ids": True}
    )
    (completion,) = expected(model, PROMPTS[0], **options, **extra)
    assert answer.choices[0].text == completion.text
    assert answer.choices[0].token_ids == list(completion.token_ids)
    assert answer.choices[0].prompt_token_ids == model.tokenizer.encode(PROMPTS[0])


def test_the_default_is_sixteen_sampled_tokens(client, model):
    answer = client.completions.create(model=NAME, prompt="One day", seed=5)
    (completion,) = expected(model, "One day", seed=5, temperature=1.0, max_tokens=16)
    assert texts_and_reasons(answer.choices) == [(completion.text, completion.finish_reason)]


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_several_prompts_and_several_completions(client, model, ids, n):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    prompts = [model.tokenizer.encode(prompt) for prompt in prompts] if ids else prompts
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 11, "n": n}
    answer = client.completions.create(model=NAME, prompt=prompts, **options)
    completions = expected(model, prompts, **options)
    assert texts_and_reasons(answer.choices) == [(each.text, each.finish_reason) for each in completions]
    assert answer.usage.completion_tokens == sum(len(each.token_ids) for each in completions)
    known = sum(len(prompt if ids else model.tokenizer.encode(prompt)) for prompt in prompts)
    assert answer.usage.prompt_tokens == known


def test_a_prompt_of_token_ids(client, model):
    ids = model.tokenizer.encode(PROMPTS[3])
    answer = client.completions.create(model=NAME, prompt=ids, max_tokens=9, temperature=0)
    assert answer.choices[0].text == model.generate(ids, max_new_tokens=9).text


def test_best_of(client, model):
    answer = client.completions.create(model=NAME, prompt="A", n=2, best_of=2, max_tokens=4, temperature=0)
    assert len(answer.choices) == 2
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt="A", best_of=2, max_tokens=4)
    assert error.value.param == "best_of"


def test_echo(client, model):
    options = {"max_tokens": 6, "temperature": 0}
    text = model.generate(PROMPTS[0], max_new_tokens=6).text
    answer = client.completions.create(model=NAME, prompt=PROMPTS[0], echo=True, **options)
    assert answer.choices[0].text == PROMPTS[0] + text
    pieces = client.completions.create(model=NAME, prompt=PROMPTS[0], echo=True, stream=True, **options)
    assert "".join(part.choices[0].text for part in pieces) == PROMPTS[0] + text
    answer = client.completions.create(model=NAME, prompt=PROMPTS[0], echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (PROMPTS[0], 0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_stream_has_the_same_text(client, model, options):
    (completion,) = expected(model, PROMPTS[1], max_tokens=24, **options)
    parts = list(client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=24, stream=True, **options))
    assert "".join(part.choices[0].text for part in parts) == completion.text
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + [completion.finish_reason]
    assert len({part.id for part in parts}) == 1 and all(part.usage is None for part in parts)


def test_a_stream_of_several_choices_with_usage(client, model):
    options = {"max_tokens": 10, "temperature": 1.0, "seed": 2, "n": 2}
    completions = expected(model, PROMPTS[:2], **options)
    *parts, last = client.completions.create(
        model=NAME, prompt=PROMPTS[:2], stream=True, stream_options={"include_usage": True}, **options
    )
    texts, reasons = [""] * 4, [None] * 4
    for part in parts:
        (choice,) = part.choices
        assert part.usage is None and reasons[choice.index] is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert list(zip(texts, reasons, strict=True)) == [(each.text, each.finish_reason) for each in completions]
    assert last.choices == []
    assert last.usage.completion_tokens == sum(len(each.token_ids) for each in completions)


def test_bytes_of_a_stream(http, model):
    """What is on the wire: lines that a browser's EventSource reads too."""
    body = {"prompt": "One", "max_tokens": 3, "temperature": 0, "stream": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = answer.content.split(b"\n\n")
    assert end == b"data: [DONE]" and nothing == b""
    assert all(event.startswith(b'data: {"id":"cmpl-') and b"\n" not in event for event in events)


def test_the_context_ends_a_sequence(client, model):
    ids = [5] * (model.config.n_positions - 2)
    answer = client.completions.create(model=NAME, prompt=ids, max_tokens=10_000, temperature=0)
    (completion,) = expected(model, ids, max_tokens=10_000)
    assert texts_and_reasons(answer.choices) == [(completion.text, completion.finish_reason)]
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt=[5] * (model.config.n_positions + 1))
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
    assert str(model.config.n_positions) in error.value.message


def test_many_at_once_each_get_their_own(url, model):
    """More asyncio clients than slots, with different options; streams among them."""
    requests = [
        {
            "prompt": PROMPTS[number % 4] + " and" * (number % 3),
            "max_tokens": 5 + number,
            "temperature": number % 2,
            "seed": number,
        }
        for number in range(14)
    ]

    async def ask(client, number, body):
        answer = await client.completions.create(model=NAME, stream=number % 3 == 0, **body)
        if number % 3:
            return answer.choices[0].text
        return "".join([part.choices[0].text async for part in answer])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", timeout=120) as client:
            return await asyncio.gather(*(ask(client, *each) for each in enumerate(requests)))

    assert asyncio.run(ask_all()) == [expected(model, body.pop("prompt"), **body)[0].text for body in requests]


def test_ignore_eos_and_stop_token_ids(client, model):
    prompt = "The end."
    end = model.config.eos_token_ids[0]
    (free,) = expected(model, prompt, max_tokens=40, temperature=0, stop_token_ids=())
    answer = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (free.text, "length")
    stop = free.token_ids[3]
    answer = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=40, temperature=0, extra_body={"stop_token_ids": [stop]}
    )
    (stopped,) = expected(model, prompt, max_tokens=40, temperature=0, stop_token_ids=[stop, end])
    assert texts_and_reasons(answer.choices) == [(stopped.text, "stop")]


@pytest.mark.parametrize(
    "field, value",
    [
        ("suffix", "the end"),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {"type": "object"}),
        ("use_beam_search", True),
        ("n", 0),
        ("n", 129),
        ("n", "two"),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_k", -2),
        ("presence_penalty", 3),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", [1]),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", 5),
        ("seed", "x"),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("echo", 1),
        ("prompt", None),
        ("prompt", []),
        ("prompt", ["a", 1]),
        ("prompt", [1, True]),
        ("prompt", [-1]),
        ("prompt", [[1], []]),
        ("prompt", "a lone \ud800 surrogate"),
        ("min_tokens", 17),
        ("logprobs", 21),
    ],
)
def test_what_is_refused(http, field, value):
    answer = http.post("/v1/completions", content=json.dumps({"prompt": "A", field: value}))
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"] == field and error["type"] == "invalid_request_error" and error["code"]
    assert error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "unheard_of": [1]},
        {"suffix": None, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "best_of": 1},
        {"n": None, "temperature": None, "stop": None, "logit_bias": None, "stream": None, "seed": -1},
    ],
)
def test_what_is_ignored(http, fields):
    answer = http.post("/v1/completions", json={"prompt": "A", "max_tokens": 1, **fields})
    assert answer.status_code == 200, answer.text
