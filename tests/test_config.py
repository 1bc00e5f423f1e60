"""GPT2Config against transformers' GPT2Config, and every refusal by name."""

import ast
import json
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

import tvm_attn.config as config_module
from tvm_attn.config import ACTIVATIONS, PRESETS, GPT2Config, param_shapes
from tvm_attn.errors import ConfigError

FIELDS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_embd": 96, "n_head": 2, "n_layer": 3, "n_inner": 100, "n_positions": 33},
    {"activation_function": "relu", "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    {"bos_token_id": 3, "eos_token_id": None, "vocab_size": 1021},
    {"pad_token_id": 7},
]


@pytest.mark.parametrize("values", VARIANTS)
def test_reads_what_transformers_writes(values: dict[str, Any]) -> None:
    theirs = transformers.GPT2Config(**values)
    ours = GPT2Config.from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    for name in FIELDS:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.n_inner == (theirs.n_inner or 4 * theirs.n_embd)


@pytest.mark.parametrize("values", VARIANTS)
def test_transformers_reads_what_it_writes(values: dict[str, Any]) -> None:
    ours = GPT2Config(**values)
    theirs = transformers.GPT2Config.from_dict(json.loads(json.dumps(ours.to_dict())))
    for name in (*FIELDS, "n_inner"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert GPT2Config.from_dict(ours.to_dict()) == ours


def test_missing_keys_take_the_defaults_of_transformers() -> None:
    ours, theirs = GPT2Config.from_dict({}), transformers.GPT2Config()
    assert all(getattr(ours, name) == getattr(theirs, name) for name in FIELDS)


def test_training_keys_and_n_ctx_are_ignored() -> None:
    config = {"n_ctx": 7, "attn_pdrop": "x", "initializer_range": -1, "summary_type": None, "use_cache": False}
    assert GPT2Config.from_dict(config) == GPT2Config()


def test_aliases_are_read_and_may_repeat_but_not_contradict() -> None:
    aliases = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    expected = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32)
    assert GPT2Config.from_dict(aliases) == expected
    assert GPT2Config.from_dict({**aliases, "n_embd": 64}) == expected
    with pytest.raises(ConfigError, match=r"hidden_size \(64\) contradicts n_embd \(128\)"):
        GPT2Config.from_dict({**aliases, "n_embd": 128})


def test_is_frozen_and_hashable() -> None:
    config = GPT2Config()
    with pytest.raises(FrozenInstanceError):
        config.n_embd = 3  # type: ignore[misc]
    assert len({config, GPT2Config(), GPT2Config(n_layer=1)}) == 2


def test_activation_aliases_compute_the_same_function() -> None:
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    for name, aliases in ACTIVATIONS.items():
        for alias in aliases:
            assert GPT2Config(activation_function=alias).activation_function == name
            # gelu_fast has sqrt(2 / pi) to ten digits only; float32 rounds away far more than that.
            torch.testing.assert_close(ACT2FN[alias](x), ACT2FN[name](x), rtol=0, atol=1e-12)


def test_activations_that_differ_are_refused() -> None:
    known = {alias for aliases in ACTIVATIONS.values() for alias in aliases}
    others = set(ACT2FN.keys()) - known
    assert {"quick_gelu", "gelu_10", "relu2", "sigmoid"} <= others
    for name in others:
        with pytest.raises(ConfigError, match=f"activation_function is '{name}'; supported are gelu_new, "):
            GPT2Config(activation_function=name)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_token_ids(key: str) -> None:
    def read(value: object, vocab_size: int = 1021) -> object:
        return getattr(GPT2Config.from_dict({"vocab_size": vocab_size, key: value}), key)

    assert read(0) == 0
    assert read(1020) == 1020
    assert read([5]) == 5
    assert read(None) is None
    assert read(1021) is None  # outside the vocabulary: no such token
    assert getattr(GPT2Config(vocab_size=1021), key) is None
    assert read([]) is None
    for value in (-1, True, 1.0, "1", [None], [True], [-1], [[1]], {"1": 1}):
        with pytest.raises(ConfigError, match=key):
            read(value)


def test_several_end_tokens() -> None:
    def read(value: object) -> GPT2Config:
        return GPT2Config.from_dict({"vocab_size": 100, "eos_token_id": value})

    assert read([1, 2]).eos_token_id == read([1, 2]).eos_token_ids == (1, 2)
    assert read([1, 2, 1, 100]).eos_token_ids == (1, 2)
    assert read([5, 5]).eos_token_id == 5 and read(5).eos_token_ids == (5,)
    assert read([100, 7]).eos_token_id == 7
    assert read([]).eos_token_ids == read(None).eos_token_ids == read([100]).eos_token_ids == ()
    assert GPT2Config.from_dict(json.loads(json.dumps(read([1, 2]).to_dict()))) == read([1, 2])
    with pytest.raises(ConfigError, match="eos_token_id"):
        read([1, None])
    with pytest.raises(ConfigError, match="bos_token_id lists 2 tokens"):
        GPT2Config.from_dict({"bos_token_id": [1, 2]})
    assert GPT2Config.from_dict({"pad_token_id": -1}).pad_token_id is None
    assert GPT2Config.from_dict({"pad_token_id": 3}).pad_token_id == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gptj"}, "model_type is 'gptj'; only gpt2"),
        ({"model_type": None}, "model_type is None"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map"),
        ({"activation_function": "quick_gelu"}, "quick_gelu"),
        ({"activation_function": None}, "activation_function"),
        ({"activation_function": ["relu"]}, "activation_function"),
        ({"n_embd": 100, "n_head": 12}, r"n_embd \(100\) must be divisible by n_head \(12\)"),
        *[({size: 0}, size) for size in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")],
        *[({size: -3}, size) for size in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")],
        *[({size: True}, size) for size in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")],
        *[({size: 12.0}, size) for size in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")],
        *[({size: None}, size) for size in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")],
        ({"n_embd": "768"}, "n_embd must be a whole number, not '768'"),
        ({"n_embd": 2**31}, "n_embd must be at least 1 and fit in int32"),
        ({"vocab_size": 10**5000}, "vocab_size must be at least 1 and fit in int32"),
        ({"vocab_size": [[1] * 99] * 99}, "vocab_size must be a whole number"),
        ({"n_layer": 1025}, "n_layer is 1025"),
        ({"vocab_size": 2_796_203}, "n_embd x vocab_size"),
        ({"n_positions": 50_000}, "n_positions x vocab_size"),
        ({"n_embd": 27_000, "vocab_size": 10, "n_head": 1}, "n_embd x 3"),
        ({"n_inner": 2_796_203}, "n_embd x n_inner"),
        *[({"layer_norm_epsilon": e}, "layer_norm_epsilon") for e in (0, -1e-5, 1, "1e-5", True, None)],
        *[({"layer_norm_epsilon": float(e)}, "layer_norm_epsilon") for e in ("nan", "inf", "-inf")],
        ({"scale_attn_weights": 1}, "scale_attn_weights must be true or false, not 1"),
        ({"scale_attn_by_inverse_layer_idx": "false"}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": None}, "reorder_and_upcast_attn"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
    ],
)
def test_unsupported_or_malformed_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GPT2Config.from_dict(change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [[], None, "gpt2", 3])
def test_a_configuration_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="must be a JSON object"):
        GPT2Config.from_dict(value)


def test_falsy_unsupported_keys_and_tokenizer_code_are_harmless() -> None:
    harmless = {
        "add_cross_attention": False,
        "pruned_heads": {},
        "quantization_config": None,
        "auto_map": {"AutoTokenizer": ["tokenization.Own", None]},
    }
    assert GPT2Config.from_dict(harmless) == GPT2Config()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
def test_attention_scale_is_that_of_transformers(scale: bool, inverse: bool) -> None:
    values: dict[str, Any] = {
        "n_embd": 96,
        "n_head": 2,
        "scale_attn_weights": scale,
        "scale_attn_by_inverse_layer_idx": inverse,
    }
    config, theirs = GPT2Config(**values), transformers.GPT2Config(**values)
    assert config.head_dim == 48
    for layer in range(3):
        attention = transformers.models.gpt2.modeling_gpt2.GPT2Attention(theirs, layer_idx=layer)
        assert config.attention_scale(layer) == pytest.approx(attention.scaling, rel=1e-15)


@pytest.mark.parametrize("tied", [True, False])
def test_param_shapes_are_those_of_transformers(tied: bool) -> None:
    values: dict[str, Any] = {
        "vocab_size": 31,
        "n_positions": 7,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 20,
    }
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values, tie_word_embeddings=tied))
    theirs = {name.removeprefix("transformer."): tuple(p.shape) for name, p in model.named_parameters()}
    ours = param_shapes(GPT2Config(**values, tie_word_embeddings=tied))
    assert ours == theirs
    assert list(ours)[:4] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.ln_1.bias"]
    assert list(ours)[-1] == ("ln_f.bias" if tied else "lm_head.weight")


# Radford et al. 2019, table 2, corrected in OpenAI's repository: 124M, 355M, 774M and 1.5B parameters.
@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)]
)
def test_presets_have_the_published_sizes(name: str, millions: float) -> None:
    config = PRESETS[name]
    total = 0
    for shape in param_shapes(config).values():
        total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert total / 1e6 == pytest.approx(millions, abs=0.1)
    assert config.head_dim == 64


def test_imports_only_the_standard_library() -> None:
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported - {"tvm_attn.errors"} <= sys.stdlib_module_names | {"collections.abc"}
