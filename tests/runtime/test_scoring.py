"""Scores of texts against the loop of transformers' documentation on perplexity."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

import tvm_attn
from tests.runtime.engines import ScriptedEngine
from tvm_attn.errors import GenerationError, TokenizerError
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.scheduler import Scheduler
from tvm_attn.runtime.scoring import TextScore, score, windows

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, "cpu", max_batch=3)


@pytest.fixture(scope="module")
def theirs(demo_model_dir: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(demo_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text(demo_model_dir: Path) -> str:
    return (demo_model_dir / "validation.txt").read_text(encoding="utf-8")


def their_loss(theirs: GPT2LMHeadModel, ids: list[int], context: int, stride: int) -> tuple[float, int]:
    """https://huggingface.co/docs/transformers/perplexity: the sum of the negative log-probabilities, their number.

    Each window's mean loss is weighed with the labels that it is the mean of. The page subtracts one of them even where
    the window's first label has tokens before it.
    """
    tokens, total, count, previous = torch.tensor([ids]), 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        labels = tokens[:, begin:end].clone()
        labels[:, : -(end - previous)] = -100
        valid = int((labels[:, 1:] != -100).sum())
        if valid:
            with torch.no_grad():
                total += float(theirs(tokens[:, begin:end], labels=labels).loss.double()) * valid
            count += valid
        previous = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [
        (700, 256, 128),
        (700, 256, 256),
        (700, 256, 1 << 7 | 3),
        (300, 64, 1 << 4),
        (41, 16, 1),
        (100, 256, 128),  # shorter than a window
        (256, 256, 128),  # exactly one
        (257, 256, 256),  # a second one of one token, which has none before it
        (257, 256, 255),
        (2, 256, 128),
    ],
)
def test_the_loop_of_transformers(
    model: Model, theirs: GPT2LMHeadModel, text: str, length: int, context: int, stride: int
) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text)[:length]
    (found,) = model.score(ids, context=context, stride=stride)
    loss, count = their_loss(theirs, ids, context, stride)
    assert found.token_ids == tuple(ids) and found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert found.logprob == pytest.approx(-loss, rel=1e-5)
    assert found.token_logprobs[0] is None and found.bytes is found.bits_per_byte is None


def test_texts(model: Model, theirs: GPT2LMHeadModel, text: str) -> None:
    """Several texts share calls, and each gets what it gets alone."""
    assert model.tokenizer is not None
    texts = [text[:3000], "a", text[:20], "déjà vu", text[500:1500]]
    done: list[tuple[int, int]] = []
    scores = model.score(texts, progress=lambda *numbers: done.append(numbers))
    assert scores == [model.score(each)[0] for each in texts]
    assert done == sorted(done) and done[-1] == (sum(score.tokens for score in scores),) * 2
    for each, found in zip(texts, scores, strict=True):
        ids = model.tokenizer.encode(each)
        assert found.token_ids == tuple(ids) and found.bytes == len(each.encode())
        if len(ids) == 1:
            assert (found.tokens, found.logprob, found.perplexity, found.bits_per_byte) == (0, 0, None, None)
            continue
        loss, count = their_loss(theirs, ids, 256, 128)
        assert found.perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)
        assert found.bits_per_byte == pytest.approx(loss / math.log(2) / len(each.encode()), rel=1e-4)
    assert model.score([]) == []


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("", {}, "the text has no tokens"),
        (["a", ""], {}, "text 2 of 2 has no tokens"),
        ([[1, 5000]], {}, "the token id 5000"),
        ("a", {"stride": 257}, "stride is 257 and context 256"),
        ("a", {"stride": 0}, "stride is 0; it must be an integer of at least 1"),
        ("a", {"context": 257}, "context is 257; it must be an integer from 2 to 256"),
        ("a", {"context": 1}, "context is 1; it must be an integer from 2 to 256"),
        ("a", {"context": 64, "stride": 65}, "stride is 65 and context 64"),
    ],
)
def test_what_cannot_be_scored(model: Model, texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.score(texts, **options)


def test_text_needs_a_tokenizer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(TokenizerError, match="pass token ids"):
        model.score("text")
    assert model.score([1, 2, 3])[0].tokens == 2


def test_logits_that_are_not_numbers() -> None:
    engine = ScriptedEngine([[1] * 9])
    engine.next_logits = lambda _ids: np.full(engine.config.vocab_size, np.nan)  # type: ignore[method-assign]
    with pytest.raises(GenerationError, match="hold NaN"):
        score(Scheduler(engine), [np.zeros(5, np.int32)], 8, 4)


def test_an_impossible_text_has_an_infinite_perplexity() -> None:
    found = TextScore((1, 2), (None, -1e30), 2)
    assert found.perplexity == math.inf and found.bits_per_byte is not None


@given(st.integers(1, 200), st.integers(2, 50), st.data())
def test_windows_score_each_token_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    found = list(windows(0, length, context, stride))
    scored = [place for window in found for place in range(window.scored, window.last)]
    assert scored == sorted(set(scored))
    starts = set(range(0, length, context)) if stride == context else {0}
    assert scored == sorted(set(range(length)) - starts)
    assert all(0 <= window.first < window.scored < window.last <= window.first + context for window in found)
