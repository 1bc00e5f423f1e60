"""Log-probabilities over HTTP, with the `openai` package and with lm-eval, against transformers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.servers import NAME

PROMPT = "Once upon a time, there was"
TOLERANCE = 2e-4  # float32, the sum of a few tokens


@pytest.fixture(scope="module")
def reference(demo_model_dir, model):
    """reference(ids) gives the log-probabilities (T, V) of the next token after each id, by transformers in float64."""
    network = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float64).eval()

    def logprobs(ids):
        with torch.no_grad():
            return network(torch.tensor([list(ids)])).logits[0].log_softmax(-1).numpy()

    return logprobs


def token_id_of(model, token):
    return next(token_id for token_id in range(model.config.vocab_size) if model.tokenizer.written(token_id) == token)


@pytest.mark.parametrize("stream", [False, True])
def test_completions(client, model, reference, stream):
    options = {"max_tokens": 6, "temperature": 0, "logprobs": 3, "echo": True}
    answer = client.completions.create(model=NAME, prompt=PROMPT, stream=stream, **options)
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    ids = [*model.tokenizer.encode(PROMPT), *model.generate(PROMPT, max_new_tokens=6).token_ids]
    expected = reference(ids)
    values = [value for each in found for value in each.token_logprobs]
    assert values[0] is None and len(values) == len(ids)
    np.testing.assert_allclose(values[1:], expected[np.arange(len(ids) - 1), ids[1:]], atol=TOLERANCE)
    tops = [top for each in found for top in each.top_logprobs]
    assert tops[0] is None
    for top, row, token_id in zip(tops[1:], expected, ids[1:], strict=False):
        assert len(top) in (3, 4)  # the token itself is always among them
        np.testing.assert_allclose(sorted(top.values())[-3:], np.sort(row)[-3:], atol=TOLERANCE)
        assert model.tokenizer.written(token_id).decode() in top
    text = "".join(choice.text for choice in choices)
    tokens = [token for each in found for token in each.tokens]
    offsets = [offset for each in found for offset in each.text_offset]
    assert "".join(tokens) == text
    assert [text[offset:].startswith(token) for offset, token in zip(offsets, tokens, strict=True)] == [True] * len(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(client, model, reference, stream):
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    prompt = model.tokenizer.encode("User: Hello\n\nAssistant:")
    ids = [token_id_of(model, bytes(token.bytes)) for token in tokens]
    expected = reference([*prompt, *ids])[len(prompt) - 1 : -1]
    assert len(ids) == 5
    np.testing.assert_allclose([t.logprob for t in tokens], expected[np.arange(5), ids], atol=TOLERANCE)
    best = [[top.logprob for top in token.top_logprobs] for token in tokens]
    np.testing.assert_allclose(best, -np.sort(-expected)[:, :2], atol=TOLERANCE)


def test_lm_eval(url, model, reference):
    """As `lm_eval --model local-completions` does it, with this server's tokenizer."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    harness = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=NAME,
        tokenizer_backend="auto",  # which asks the server
        max_length=model.config.n_positions,
        batch_size=2,
        max_retries=1,
    )
    assert harness.tokenizer_backend == "remote"
    best = model.generate(PROMPT, max_new_tokens=2).text
    pairs = [(PROMPT, best), (PROMPT, " zebra"), ("The dog said", " hello to the cat."), ("", "One day")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (context, continuation), (value, is_greedy) in zip(pairs, harness.loglikelihood(requests), strict=True):
        start = model.tokenizer.encode(context) or [model.config.eos_token_ids[0]]
        ids = model.tokenizer.encode(context + continuation)
        ids = [*start, *ids] if not context else ids
        rows = reference(ids)[len(start) - 1 : -1]
        wanted = ids[len(start) :]
        assert abs(value - rows[np.arange(len(wanted)), wanted].sum()) < TOLERANCE * len(wanted)
        assert is_greedy == (rows.argmax(-1) == wanted).all()
    until = [("Once upon a time", {"until": ["."], "max_gen_toks": 24}), ("The dog", {"until": [], "max_gen_toks": 8})]
    requests = [Instance("generate_until", {}, pair, index) for index, pair in enumerate(until)]
    texts = [
        model.generate(prompt, max_new_tokens=options["max_gen_toks"], stop=[*options["until"], "<|endoftext|>"]).text
        for prompt, options in until
    ]
    assert harness.generate_until(requests, disable_tqdm=True) == texts
