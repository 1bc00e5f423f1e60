"""`/v1/chat/completions` with the `openai` package."""

import asyncio

import openai
import pytest

from tests.serving.servers import NAME

MESSAGES = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "one."}]},
    {"role": "assistant", "content": "Once"},
    {"role": "user", "content": "Go on."},
]
PROMPT = "System: You tell stories.\n\nUser: Tell me one.\n\nAssistant: Once\n\nUser: Go on.\n\nAssistant:"


def expected(model, **options):
    return model.generate(PROMPT, stop=["\n\nUser:"], **options)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_that_of_generate(client, model, limit):
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, **{limit: 20})
    completion = expected(model, max_new_tokens=20)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", completion.text)
    assert (choice.finish_reason, answer.object) == (completion.finish_reason, "chat.completion")
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == len(completion.token_ids)


def test_without_a_limit_the_context_is_filled(client, model):
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}, stop=[]
    )
    completion = expected(model, max_new_tokens=model.config.n_positions, stop_token_ids=())
    assert answer.choices[0].message.content == completion.text
    assert answer.usage.completion_tokens == len(completion.token_ids)


def test_several_choices(client, model):
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, n=3, seed=4, max_tokens=8)
    completions = expected(model, n=3, seed=4, max_new_tokens=8, temperature=1.0)
    assert [choice.message.content for choice in answer.choices] == [each.text for each in completions]


def test_streams(url, model):
    completion = expected(model, max_new_tokens=20, temperature=1.0, seed=9)

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", timeout=120) as client:
            parts = await client.chat.completions.create(
                model=NAME,
                messages=MESSAGES,
                max_tokens=20,
                seed=9,
                stream=True,
                stream_options={"include_usage": True},
            )
            return [part async for part in parts]

    first, *parts, usage = asyncio.run(ask())
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(part.choices[0].delta.content or "" for part in parts) == completion.text
    assert parts[-1].choices[0].finish_reason == completion.finish_reason
    assert usage.choices == [] and usage.usage.completion_tokens == len(completion.token_ids)


@pytest.mark.parametrize(
    "messages",
    [None, [], "hello", [{"content": "x"}], [{"role": "tool", "content": "x"}], [{"role": "user"}], ["hello"]]
    + [[{"role": "user", "content": content}] for content in (5, [5], [{"type": "image_url"}], {"type": "text"})],
)
def test_messages_that_are_refused(http, messages):
    answer = http.post("/v1/chat/completions", json={"messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("field, value", [("tools", [{}]), ("top_logprobs", 2), ("max_completion_tokens", 0)])
def test_fields_that_are_refused(http, field, value):
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES, field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
