"""Compiled models against transformers' GPT2LMHeadModel on random weights, over the configurations that GPT-2 knows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config as HuggingFaceConfig
from transformers import GPT2LMHeadModel

import tvm_attn
from tvm_attn.compiler.verification import BOUNDS
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.model import Model

# Every configuration differs from GPT-2 in several ways at once, since each one is compiled.
CONFIGS: dict[str, dict[str, Any]] = {
    "gelu_new, head_dim 48, vocabulary 1021": {"n_embd": 96, "n_head": 2, "vocab_size": 1021},
    "gelu, 3 heads of 20, context 45, one layer, narrow MLP": {
        "activation_function": "gelu",
        "n_embd": 60,
        "n_head": 3,
        "n_positions": 45,
        "n_layer": 1,
        "n_inner": 40,
    },
    "relu, one head of 80, unscaled attention, epsilon 1e-6": {
        "activation_function": "relu",
        "n_embd": 80,
        "n_head": 1,
        "scale_attn_weights": False,
        "layer_norm_epsilon": 1e-6,
    },
    "silu, untied head, scaled by layer, context 65": {
        "activation_function": "silu",
        "tie_word_embeddings": False,
        "scale_attn_by_inverse_layer_idx": True,
        "n_positions": 65,
    },
    "tanh, attention reordered, head_dim 24, one layer": {
        "activation_function": "tanh",
        "reorder_and_upcast_attn": True,
        "n_layer": 1,
        "n_embd": 72,
        "n_head": 3,
    },
    "odd width 39, odd MLP 71, untied head, vocabulary 67": {
        "n_embd": 39,
        "n_head": 3,
        "n_inner": 71,
        "vocab_size": 67,
        "tie_word_embeddings": False,
    },
    "smallest: heads of one, vocabulary 5, context 7, MLP 1": {
        "n_embd": 4,
        "n_head": 4,
        "n_inner": 1,
        "vocab_size": 5,
        "n_positions": 7,
        "n_layer": 1,
    },
}
DEFAULTS: dict[str, Any] = {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 80, "vocab_size": 300}
LOGIT_ERROR = 2e-4

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Pair:
    """A model and what `tvm_attn.build` made of it."""

    theirs: GPT2LMHeadModel
    ours: Model

    @property
    def context(self) -> int:
        return self.ours.config.n_positions

    def ids(self, length: int, seed: int = 0) -> list[int]:
        ids: list[int] = np.random.default_rng(seed).integers(0, self.ours.config.vocab_size, length).tolist()
        return ids

    @torch.inference_mode()
    def expected_logits(self, ids: list[int]) -> np.ndarray:
        """(T, V), computed without a cache."""
        logits: np.ndarray = self.theirs(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        return logits

    def expected_tokens(self, ids: list[int], count: int) -> tuple[int, ...]:
        prompt = torch.tensor([ids])
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        found = self.theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return tuple(found[0, len(ids) :].tolist())


@torch.no_grad()
def random_model(**changes: Any) -> GPT2LMHeadModel:
    """Weights at which logits are of order one, attention is far from uniform, and every bias counts."""
    values = {**DEFAULTS, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager", **changes}
    model = GPT2LMHeadModel(HuggingFaceConfig(**values)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * noise)
        else:
            table = any(part in name for part in ("wte", "wpe", "lm_head"))
            fan_in = parameter.shape[1] if table else parameter.shape[0]
            parameter.copy_(noise * (1.5 if "c_attn" in name else 1.0) * fan_in**-0.5)
    return model


def compiled(model: GPT2LMHeadModel, folder: Path, dtype: str = "float32", quant: str = "none") -> Model:
    model.save_pretrained(folder / "checkpoint")
    out = folder / "artifact"
    tvm_attn.build(model=folder / "checkpoint", target="cpu", dtype=dtype, quant=quant, out=out, verify=False)
    return tvm_attn.load(out, max_batch=4)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = random_model(**CONFIGS[request.param])
    return Pair(model, compiled(model, tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def demo(demo_artifact: Path, demo_model_dir: Path) -> Pair:
    theirs = GPT2LMHeadModel.from_pretrained(demo_model_dir, dtype=torch.float32, attn_implementation="eager")
    return Pair(theirs.eval(), tvm_attn.load(demo_artifact))


def lengths(context: int) -> list[int]:
    return sorted({1, 2, min(17, context), context // 2, context - 1, context})


def test_configurations_cover_every_activation() -> None:
    activations = {HuggingFaceConfig(**changes).activation_function for changes in CONFIGS.values()}
    assert activations == {"gelu_new", "gelu", "relu", "silu", "tanh"}


def test_logits(pair: Pair) -> None:
    for seed, length in enumerate(lengths(pair.context)):
        ids = pair.ids(length, seed)
        expected = pair.expected_logits(ids)
        assert 0.1 < expected.std() < 10
        np.testing.assert_allclose(pair.ours.logits([ids])[0], expected, rtol=0, atol=LOGIT_ERROR)


def test_cached_decoding(pair: Pair) -> None:
    """One token after the other, alone and beside other sequences, against the recomputation of all."""
    ids = pair.ids(pair.context)
    expected = pair.expected_logits(ids)
    engine, array = pair.ours.engine, np.array(ids, np.int32)
    np.testing.assert_allclose(engine.prefill([array[:1]], [3]).numpy(), expected[:1], rtol=0, atol=LOGIT_ERROR)
    for position in range(1, len(ids)):
        slots, positions = np.array([3], np.int32), np.array([position], np.int32)
        actual = engine.decode(array[position : position + 1], slots, positions).numpy()
        np.testing.assert_allclose(actual[0], expected[position], rtol=0, atol=LOGIT_ERROR)
    starts, slots = np.array([2, len(ids) // 2, 1], np.int32), np.array([2, 0, 1], np.int32)
    engine.prefill([array[:start] for start in starts], slots.tolist())
    for step in range(len(ids) - int(starts.max())):
        actual = engine.decode(array[starts + step], slots, starts + np.int32(step)).numpy()
        np.testing.assert_allclose(actual, expected[starts + step], rtol=0, atol=LOGIT_ERROR)


def test_greedy_generation(pair: Pair) -> None:
    """64 tokens, or up to the end of the context: the last token is never fed back."""
    for length in (1, 7, pair.context):
        ids, count = pair.ids(length, seed=length), min(64, pair.context - length + 1)
        completion = pair.ours.generate(ids, max_new_tokens=64)
        assert completion.token_ids == pair.expected_tokens(ids, count)
        assert completion.finish_reason == "length"


def test_ragged_batch(pair: Pair) -> None:
    """Six prompts in four slots: a batch gives what single runs give."""
    prompts = [pair.ids(length, seed) for seed, length in enumerate(lengths(pair.context)[::-1])]
    batch = pair.ours.generate(prompts, max_new_tokens=20)
    assert [completion.token_ids for completion in batch] == [
        pair.ours.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts
    ]


def test_trained_model(demo: Pair) -> None:
    assert demo.ours.tokenizer is not None
    ids = demo.ours.tokenizer.encode("Return the number of characters in the string, where")
    expected = demo.expected_logits(ids)
    np.testing.assert_allclose(demo.ours.logits([ids])[0], expected, rtol=0, atol=LOGIT_ERROR)
    tokens = demo.ours.generate(ids, max_new_tokens=64, stop_token_ids=[]).token_ids
    theirs = demo.expected_tokens(ids, 64)
    # The demo model may end its text; transformers then stops at its end-of-text token.
    assert tokens[: len(theirs)] == theirs
    assert len(theirs) == 64 or theirs[-1] == demo.ours.config.eos_token_id


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_dtype(dtype: str, tmp_path: Path) -> None:
    """Against transformers in float32 on the rounded matrices; keys and values are rounded on our side only."""
    model = random_model(n_embd=96, vocab_size=1021, n_layer=1)
    ours = compiled(model, tmp_path, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    pair = Pair(model, ours)
    ids = pair.ids(pair.context)
    expected, actual = pair.expected_logits(ids), ours.logits([ids])[0]
    assert_within(dtype, actual, expected)
    assert ours.generate(ids[:9], max_new_tokens=8).token_ids == pair.expected_tokens(ids[:9], 8)


def assert_within(bounds_of: str, actual: np.ndarray, expected: np.ndarray) -> None:
    bounds = BOUNDS[bounds_of]
    assert nmse(actual, expected) <= bounds.nmse
    assert np.abs(actual - expected).max() / np.sqrt(np.square(expected).mean()) <= bounds.max_abs


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.square(actual - expected).mean() / np.square(expected).mean())


# --- quantized weights ---

GROUP = 32  # weights that share a scale; they are neighbours along a matrix's input


def dequantized(artifact: Path, quant: str, name: str, original: np.ndarray) -> np.ndarray:
    """What the artifact's bytes stand for, as tvm_attn/storage.py documents them; shaped like `original`."""
    read = Artifact(artifact).parameters.read
    table = name in ("wte.weight", "lm_head.weight")  # (outputs, inputs); the other matrices are (inputs, outputs)
    stored, scales = read(name), read(f"{name}_scales")
    assert scales.dtype == np.float16
    values, scales = (stored.T, scales.T) if table else (stored, scales)
    if quant == "int4":  # two inputs a byte, the even one in the low half, each plus 8
        assert values.dtype == np.uint8
        values = np.stack([values & 15, values >> 4], axis=1).reshape(-1, values.shape[1]).astype(np.int64) - 8
    matrix = values.reshape(-1, GROUP, values.shape[1]) * scales[:, None].astype(np.float32)
    matrix = matrix.reshape(values.shape).astype(np.float32)
    return matrix.T if table else matrix


def dequantize(model: GPT2LMHeadModel, artifact: Path, quant: str) -> None:
    """Gives transformers' model the weights of the artifact, after a check that they are near its own.

    Symmetric rounding to `largest` steps moves a weight by half a step at most; the step is float16, 2^-11 of it more.
    """
    largest = {"int8": 127, "int4": 7}[quant]
    tied = model.config.tie_word_embeddings
    for key, parameter in model.named_parameters():
        name = key.removeprefix("transformer.")
        if parameter.ndim == 1 or name == "wpe.weight":
            continue
        original = parameter.detach().numpy()
        matrix = dequantized(artifact, quant, name, original)
        inputs = original.T if name in ("wte.weight", "lm_head.weight") else original
        step = np.abs(inputs.reshape(-1, GROUP, inputs.shape[1])).max(1).repeat(GROUP, axis=0) / largest
        moved = np.abs((matrix - original).T if inputs is not original else matrix - original)
        assert (moved <= step * (0.5 + largest * 2.0**-11)).all()
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(matrix.copy()))
    assert tied == (model.lm_head.weight is model.transformer.wte.weight)


QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8, gelu_new, head_dim 48": ("int8", {"n_embd": 96, "vocab_size": 1021}),
    "int8, silu, untied head, one layer, MLP 160": (
        "int8",
        {"activation_function": "silu", "tie_word_embeddings": False, "n_layer": 1, "n_inner": 160},
    ),
    "int4, gelu, 4 heads of 24, context 65": (
        "int4",
        {"activation_function": "gelu", "n_embd": 96, "n_head": 4, "n_positions": 65},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized(name: str, tmp_path: Path) -> None:
    """Against transformers in float32 on the dequantized weights.

    What differs is the 8-bit rounding of activations, which the bounds of int8 and int4 are for. The library must be
    further away from the weights as they were: int4 moves logits by more than the bounds allow.
    """
    quant, changes = QUANTIZED[name]
    model = random_model(**changes)
    ours = compiled(model, tmp_path, quant=quant)
    pair = Pair(model, ours)
    ids = pair.ids(pair.context)
    unquantized, actual = pair.expected_logits(ids), ours.logits([ids])[0]
    dequantize(model, tmp_path / "artifact", quant)
    expected = pair.expected_logits(ids)
    assert_within(quant, actual, expected)
    assert nmse(actual, unquantized) > nmse(actual, expected)
    assert quant == "int8" or nmse(actual, unquantized) > BOUNDS[quant].nmse
    assert_decodes_within(quant, pair, ids, expected)


def assert_decodes_within(quant: str, pair: Pair, ids: list[int], expected: np.ndarray) -> None:
    """Cached decoding of the second half, one sequence alone and two at once."""
    engine, array, start = pair.ours.engine, np.array(ids, np.int32), len(ids) // 2
    for slots in ([1], [2, 0]):
        engine.prefill([array[:start]] * len(slots), slots)
        rows = []
        for position in range(start, len(ids)):
            positions = np.full(len(slots), position, np.int32)
            rows.append(engine.decode(array[positions], np.array(slots, np.int32), positions).numpy())
        for index in range(len(slots)):
            assert_within(quant, np.stack(rows)[:, index], expected[start:])


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_trained_model(quant: str, demo_model_dir: Path, tmp_path: Path) -> None:
    """The demo model reads text like what it was trained on, up to the end of its context."""
    theirs = GPT2LMHeadModel.from_pretrained(demo_model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    tvm_attn.build(model=demo_model_dir, target="cpu", quant=quant, out=tmp_path / "artifact", verify=False)
    pair = Pair(theirs, tvm_attn.load(tmp_path / "artifact"))
    dequantize(theirs, tmp_path / "artifact", quant)
    assert pair.ours.tokenizer is not None
    text = (demo_model_dir / "validation.txt").read_text(encoding="utf-8")
    ids = pair.ours.tokenizer.encode(text)[: pair.context]
    expected = pair.expected_logits(ids)
    assert_within(quant, pair.ours.logits([ids])[0], expected)
    assert_decodes_within(quant, pair, ids, expected)
