"""Attention weights and the logit lens against transformers' eager attention and hidden states."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_attn
from tvm_attn.errors import GenerationError, TokenizerError
from tvm_attn.model.params import effective_params
from tvm_attn.runtime import model as model_module
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.model import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

TEXT = "def attention(q, k, v):\n    return softmax(q @ k.T) @ v\n"


@pytest.fixture(scope="module")
def loaded(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, "cpu")


@pytest.fixture(scope="module")
def reference(demo_artifact: Path) -> Any:
    artifact = Artifact(demo_artifact)
    params = effective_params(artifact.config, artifact.parameters.read, artifact.quantization)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**artifact.config.to_dict() | {"attn_implementation": "eager"})
    )
    state = {f"transformer.{name}": torch.from_numpy(np.array(array, np.float32)) for name, array in params}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    return model.eval()


def run(reference: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return reference(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("length", [1, 2, 8, 13, 0])
def test_attention_is_that_of_transformers(loaded: Model, reference: Any, length: int) -> None:
    length = length or loaded.config.n_positions  # the full context
    ids = np.random.default_rng(length).integers(0, loaded.config.vocab_size, length).tolist()
    weights = loaded.attention(ids)
    expected = np.stack([layer[0].numpy() for layer in run(reference, ids).attentions])
    assert weights.dtype == np.float32 and weights.shape == expected.shape
    np.testing.assert_allclose(weights, expected, atol=2e-5)
    assert (weights * np.triu(np.ones((length, length)), 1) == 0).all()


def test_layers_and_heads_can_be_chosen(loaded: Model) -> None:
    every = loaded.attention(TEXT)
    np.testing.assert_array_equal(loaded.attention(TEXT, layers=[4, 1], heads=1), every[[4, 1]][:, [1]])
    for layer, weights in enumerate(loaded.attention_layers(TEXT)):
        np.testing.assert_array_equal(weights, every[layer])


def test_the_lens_is_that_of_transformers(loaded: Model, reference: Any) -> None:
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(TEXT)
    found = loaded.logit_lens(TEXT, top=4)
    states = run(reference, ids).hidden_states
    assert len(found) == len(states) == loaded.config.n_layer + 1
    with torch.no_grad():
        for depth, state in enumerate(states):
            last = depth == loaded.config.n_layer  # transformers has normalized it already
            hidden = state[0] if last else reference.transformer.ln_f(state[0])
            expected = (hidden @ reference.lm_head.weight.T).double().softmax(-1)
            for row, predictions in enumerate(found[depth]):
                assert len(predictions) == 4
                assert [p for _, p in predictions] == sorted((p for _, p in predictions), reverse=True)
                top = torch.topk(expected[row], 4).values.numpy()
                np.testing.assert_allclose([p for _, p in predictions], top, atol=1e-5)
                for token_id, probability in predictions:
                    assert probability == pytest.approx(float(expected[row, token_id]), abs=1e-5)


def test_a_trace_leaves_the_slots_alone(demo_artifact: Path) -> None:
    model = tvm_attn.load(demo_artifact, "cpu", max_batch=1)
    alone = model.generate("def f(", max_new_tokens=12).token_ids
    stream = model.stream_ids("def f(", max_new_tokens=12)
    got = [next(stream)]
    model.attention(TEXT)
    model.logit_lens(TEXT)
    assert [*got, *stream] == list(alone)


def test_bad_arguments_are_refused(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ({"layers": 6}, {"layers": -1}, {"heads": [0, 9]}, {"layers": []}, {"heads": 0.5}):
        with pytest.raises(GenerationError):
            loaded.attention(TEXT, **arguments)
    for top in (0, 21, 1.5):
        with pytest.raises(GenerationError):
            loaded.logit_lens(TEXT, top)  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="one prompt, not 0"):
        loaded.attention([])
    with pytest.raises(GenerationError, match="context is 256"):
        loaded.attention([1] * 257)
    with pytest.raises(GenerationError, match="one prompt, not 2"):
        loaded.attention([[1], [2]])
    monkeypatch.setattr(model_module, "MOST_BYTES", 1000)
    with pytest.raises(GenerationError, match="attention_layers"):
        loaded.attention([1] * 20)


def test_text_needs_a_tokenizer(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.scheduler, "tokenizer", None)
    with pytest.raises(TokenizerError):
        loaded.attention(TEXT)
