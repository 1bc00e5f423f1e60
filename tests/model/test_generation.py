"""generation_config.json against transformers: which tokens end a text, and how it samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tvm_attn.config import GPT2Config
from tvm_attn.errors import CheckpointError, ConfigError
from tvm_attn.model.generation import read_generation_config
from tvm_attn.runtime.decoding import GenerationOptions

SIZES: dict[str, Any] = {"vocab_size": 300, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
CONFIG = GPT2Config(**SIZES, bos_token_id=298, eos_token_id=299)


def read(folder: Path, settings: object) -> tuple[GPT2Config, dict[str, Any], list[str]]:
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return read_generation_config(folder, CONFIG)


def as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).save_pretrained(folder)
    return folder


ENDS: list[Any] = [299, 55, [299, 55], [55], [], None, [55, 55]]


@pytest.mark.parametrize("in_config", [299, [299, 55], None], ids=repr)
@pytest.mark.parametrize("in_generation", [*ENDS, "no such key", "no such file"], ids=repr)
def test_end_tokens_are_those_of_transformers(checkpoint: Path, in_generation: Any, in_config: Any) -> None:
    config = {**CONFIG.to_dict(), "eos_token_id": in_config}
    (checkpoint / "config.json").write_text(json.dumps(config))
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({} if in_generation == "no such key" else {"eos_token_id": in_generation}))
    if in_generation == "no such file":
        path.unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = as_tuple(model.generation_config.eos_token_id)
    ours, options, notes = read_generation_config(checkpoint, GPT2Config.from_dict(config))
    assert ours.eos_token_ids == tuple(dict.fromkeys(expected))
    assert ours.bos_token_id == 298
    assert options == {}
    assert bool(notes) == (not expected and bool(as_tuple(in_config)))


def test_start_and_padding(tmp_path: Path) -> None:
    assert read(tmp_path, {"bos_token_id": 3, "pad_token_id": 4})[0] == GPT2Config(
        **SIZES, bos_token_id=3, pad_token_id=4, eos_token_id=None
    )
    assert read(tmp_path, {"bos_token_id": None, "pad_token_id": -1})[0].bos_token_id == 298
    assert read_generation_config(tmp_path / "nowhere", CONFIG) == (CONFIG, {}, [])


def test_ids_beyond_the_vocabulary_end_nothing(tmp_path: Path) -> None:
    config, _, notes = read(tmp_path, {"eos_token_id": [300, 7]})
    assert (config.eos_token_ids, notes) == ((7,), [])
    config, _, (note,) = read(tmp_path, {"eos_token_id": 300})
    assert config.eos_token_ids == ()
    assert "no token ends a text, as in transformers; config.json names 299" in note


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.1}, {}),  # nothing without do_sample
        ({"do_sample": False, "temperature": 0.5}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),  # transformers' default
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": None, "top_p": None}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1},
            {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1},
        ),
        ({"repetition_penalty": 1.3, "max_new_tokens": 9}, {"repetition_penalty": 1.3, "max_new_tokens": 9}),
        ({"min_new_tokens": 3}, {"min_new_tokens": 3}),
        ({"stop_strings": ["\n\n"], "use_cache": True, "max_length": 20}, {"stop": ["\n\n"]}),
    ],
)
def test_sampling_options(tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
    _, found, notes = read(tmp_path, {**settings, "eos_token_id": 1})
    assert found == options
    assert notes == []
    GenerationOptions(**found)
    if settings.get("do_sample"):  # what transformers makes of the same file
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
        defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
        expected = {name: default if (v := getattr(theirs, name)) is None else v for name, default in defaults.items()}
        assert {**defaults, "top_k": 0, **found} == expected


def test_settings_that_we_lack_are_named(tmp_path: Path) -> None:
    _, _, (note,) = read(tmp_path, {"eos_token_id": 1, "num_beams": 4, "suppress_tokens": [5], "typical_p": 1.0})
    assert note == "generation_config.json also sets num_beams, suppress_tokens, which tvm_attn does not have"
    assert read(tmp_path, transformers.GenerationConfig(eos_token_id=1).to_dict())[2] == []


@pytest.mark.parametrize("value", [True, -1, "1", 1.0, [1, None], [[1]], {"a": 1}, ["x" * 100_000]], ids=range(8))
def test_malformed_ids(tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id") as caught:
        read(tmp_path, {"eos_token_id": value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", ["[]", "5", "null", "{", ""])
def test_malformed_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not"):
        read_generation_config(tmp_path, CONFIG)
