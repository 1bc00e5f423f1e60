"""Checkpoints that transformers wrote are read back bit for bit; everything that can be wrong with one is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.errors import CheckpointError, ConfigError, TokenizerError
from tvm_attn.model.checkpoint import (
    CheckpointUnavailable,
    cast_params,
    open_checkpoint,
    random_params,
)

SIZES: dict[str, Any] = {"vocab_size": 67, "n_positions": 12, "n_embd": 24, "n_layer": 2, "n_head": 3}
CONFIG = GPT2Config(**SIZES)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

Tensors = dict[str, np.ndarray]


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of CONFIG with random parameters, as one file with the prefix `transformer.`."""
    write_config(tmp_path, CONFIG.to_dict())
    save_file({f"transformer.{name}": a for name, a in random_params(CONFIG)}, tmp_path / "model.safetensors")
    return tmp_path


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> dict[str, Any]:
    """Split the checkpoint of `folder` into two shards, and return its index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:10], names[10:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def refusal(folder: Path, error_type: type[Exception] = CheckpointError) -> str:
    """The one-line message with which reading `folder` to the end is refused."""
    with pytest.raises(error_type) as caught:
        list(open_checkpoint(folder).params())
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is error_type
    return message


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize(
    ("model_class", "tied"),
    [(transformers.GPT2LMHeadModel, True), (transformers.GPT2LMHeadModel, False), (transformers.GPT2Model, True)],
    ids=["tied head", "untied head", "no head, no prefix"],
)
def test_reads_what_transformers_saves(tmp_path: Path, dtype: str, sharded: bool, model_class: Any, tied: bool) -> None:
    values = {**SIZES, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = model_class(transformers.GPT2Config(**values)).to(DTYPES[dtype])
    model.save_pretrained(tmp_path, max_shard_size="8KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").is_file() != sharded

    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == GPT2Config(**values)
    assert checkpoint.source == str(tmp_path)
    params = list(checkpoint.params())
    assert [name for name, _ in params] == list(param_shapes(checkpoint.config))
    expected = {name.removeprefix("transformer."): p.detach() for name, p in model.named_parameters()}
    assert expected.keys() == dict(params).keys()
    for name, array in params:
        assert array.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
        wanted = expected[name]
        as_bytes = wanted.view(torch.int16).numpy() if dtype == "bfloat16" else wanted.numpy()
        assert array.shape == tuple(wanted.shape)
        assert array.tobytes() == as_bytes.tobytes(), name


def test_params_can_be_read_again_and_in_part(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert next(checkpoint.params())[0] == "wte.weight"
    for _ in range(2):
        for (name, array), (expected_name, expected) in zip(checkpoint.params(), random_params(CONFIG), strict=True):
            assert (name, *bits(array)) == (expected_name, *bits(expected))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_old_mask_buffers_are_ignored(folder: Path, prefix: str) -> None:
    def add_buffers(tensors: Tensors) -> None:
        for layer in range(CONFIG.n_layer):
            tensors[f"{prefix}h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.uint8))
            tensors[f"{prefix}h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)

    rewrite(folder, add_buffers)
    assert [name for name, _ in open_checkpoint(folder).params()] == list(param_shapes(CONFIG))


def test_a_stored_copy_of_a_tied_head_must_be_equal(folder: Path) -> None:
    def add_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    rewrite(folder, add_head)
    assert "lm_head.weight" not in dict(open_checkpoint(folder).params())
    rewrite(folder, lambda tensors: np.negative(tensors["lm_head.weight"][5], out=tensors["lm_head.weight"][5]))
    message = refusal(folder)
    assert "lm_head.weight" in message
    assert '"tie_word_embeddings": false' in message
    # The way out that the message names works.
    write_config(folder, {**CONFIG.to_dict(), "tie_word_embeddings": False})
    assert list(dict(open_checkpoint(folder).params()))[-1] == "lm_head.weight"
    write_config(folder, CONFIG.to_dict())
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((66, 24), np.float32)}))
    assert "lm_head.weight is (66, 24), expected (67, 24)" in refusal(folder)


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.2.ln_1.bias"] = np.zeros(24, np.float32)
        weight = tensors["transformer.h.0.attn.c_attn.weight"]
        tensors["transformer.h.0.attn.c_attn.weight"] = np.ascontiguousarray(weight.T)

    rewrite(folder, spoil)
    message = refusal(folder)
    assert "h.1.ln_2.bias (24,) is missing" in message
    assert "transformer.h.2.ln_1.bias is not a parameter of this GPT-2" in message
    assert "transformer.h.0.attn.c_attn.weight is (72, 24), expected (24, 72)" in message
    assert "more" not in message


def test_many_problems_are_counted(folder: Path) -> None:
    write_config(folder, {**CONFIG.to_dict(), "n_layer": 3})
    message = refusal(folder)
    assert message.count("is missing") == 4
    assert message.endswith("; and 8 more")


def test_a_tensor_with_and_without_prefix_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"ln_f.bias": np.zeros(24, np.float32)}))
    assert "ln_f.bias is there twice" in refusal(folder)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int32, "I32"), (np.int8, "I8"), (np.bool_, "BOOL"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")]
)
def test_other_dtypes_are_refused_by_name(folder: Path, dtype: Any, name: str) -> None:
    key = "transformer.h.1.mlp.c_fc.weight"
    rewrite(folder, lambda tensors: tensors.update({key: np.ones((24, 96), dtype)}))
    assert f"{key} is {name}, not one of F64, F32, F16, BF16" in refusal(folder)


def loaded_by_transformers(folder: Path) -> dict[str, np.ndarray]:
    model, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    return {name.removeprefix("transformer."): p.detach().numpy() for name, p in model.named_parameters()}


def test_only_the_tied_head_is_stored(folder: Path) -> None:
    """safetensors' `save_model` stores one of several tensors that share memory: of GPT-2's, the head."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    assert "transformer.wte.weight" not in load_file(folder / "model.safetensors")
    expected = loaded_by_transformers(folder)
    params = dict(open_checkpoint(folder).params())
    assert list(params) == list(param_shapes(CONFIG))
    for name, array in params.items():
        np.testing.assert_array_equal(array, expected[name])
    write_config(folder, {**CONFIG.to_dict(), "tie_word_embeddings": False})
    assert "wte.weight (67, 24) is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("model_class", "head"),
    [
        (transformers.GPT2ForSequenceClassification, "score.weight"),
        (transformers.GPT2ForTokenClassification, "classifier.weight"),
        (transformers.GPT2ForQuestionAnswering, "qa_outputs.weight"),
        (transformers.GPT2DoubleHeadsModel, "multiple_choice_head.summary.weight"),
    ],
)
def test_other_heads_are_left_out_with_a_note(tmp_path: Path, model_class: Any, head: str) -> None:
    torch.manual_seed(0)
    model = model_class(transformers.GPT2Config(**SIZES))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    (note,) = checkpoint.notes
    assert note.startswith("the checkpoint's other heads are left out: ") and head in note
    expected = loaded_by_transformers(tmp_path)
    for name, array in checkpoint.params():
        np.testing.assert_array_equal(array, expected[name])


def test_a_value_head_is_left_out_and_unknown_parts_of_the_model_are_not(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"v_head.summary.weight": np.ones((1, 24), np.float32)}))
    assert open_checkpoint(folder).notes == ("the checkpoint's other heads are left out: v_head.summary.weight",)
    for name in ("transformer.extra.weight", "h.0.crossattention.bias", "lm_head.bias", "transformer.v_head.weight"):
        rewrite(folder, lambda tensors, name=name: tensors.update({name: np.ones(24, np.float32)}))  # type: ignore[misc]
        assert f"{name} is not a parameter of this GPT-2" in refusal(folder)
        rewrite(folder, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rename", "cause"),
    [
        (lambda key: f"_orig_mod.{key}", "torch.compile"),
        (lambda key: f"module.{key}", "DataParallel"),
        (lambda key: f"module._orig_mod.{key.removeprefix('transformer.')}", "torch.compile"),
        (lambda key: key.replace("transformer.", "transformer._orig_mod."), "torch.compile"),
        (lambda key: key.replace(".attn.", "._fsdp_wrapped_module.attn."), "FSDP"),
    ],
)
def test_names_that_wrappers_of_pytorch_give(folder: Path, rename: Callable[[str], str], cause: str) -> None:
    expected = dict(open_checkpoint(folder).params())

    def wrap(tensors: Tensors) -> None:
        renamed = {rename(key): array for key, array in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    rewrite(folder, wrap)
    checkpoint = open_checkpoint(folder)
    assert any(note.endswith(f"in the tensors' names is left out: {cause} added it") for note in checkpoint.notes)
    for name, array in checkpoint.params():
        np.testing.assert_array_equal(array, expected[name])


def test_linear_layers_are_named_as_what_they_are(folder: Path) -> None:
    def transpose(tensors: Tensors) -> None:
        for key, array in tensors.items():
            if array.ndim == 2 and ".h." in key:
                tensors[key] = np.ascontiguousarray(array.T)

    rewrite(folder, transpose)
    assert "(24, 72) (stored as torch.nn.Linear stores it; GPT-2's Conv1D is the transpose)" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_refused_by_name(folder: Path, value: float, dtype: Any) -> None:
    key = "transformer.h.1.attn.c_proj.weight"

    def spoil(tensors: Tensors) -> None:
        tensors[key] = tensors[key].astype(dtype)
        tensors[key][23, 23] = value

    rewrite(folder, spoil)
    assert f"{key} in {folder / 'model.safetensors'} has NaN or infinite values" in refusal(folder)


def test_truncated_or_foreign_weight_files_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header = int.from_bytes(data[:8], "little")
    huge_header = (2**62).to_bytes(8, "little") + data[8:]
    for broken in (b"", data[:4], data[: header // 2], data[:-1], data + b"\0", huge_header, b"PK\x03\x04" * 99):
        file.write_bytes(broken)
        assert f"{file} is not a readable safetensors file (" in refusal(folder)


def test_config_must_exist_and_be_sound(folder: Path) -> None:
    path = folder / "config.json"
    for text in ("{", "", "\ufeff{}", "[" * 100_000, '{"n_embd": 1' + "0" * 5000 + "}"):
        path.write_text(text, encoding="utf-8")
        assert f"{path} is not valid JSON: " in refusal(folder)
    path.write_bytes(b'{"model_type": "\xff"}')
    assert f"{path} is not UTF-8 text: " in refusal(folder)
    path.write_text("[]", encoding="utf-8")
    assert refusal(folder, ConfigError) == f"{path}: the configuration must be a JSON object, not []"
    write_config(folder, {**CONFIG.to_dict(), "model_type": "llama"})
    assert refusal(folder, ConfigError) == f"{path}: model_type is 'llama'; only gpt2 is supported"
    path.unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "gpt2.pt", "model.ckpt"])
def test_pickles_are_refused_with_the_way_out(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert f"only as a pickle ({name}), which is never read" in message
    assert "safe_serialization=True" in message


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    message = refusal(folder)
    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    assert "save_pretrained" in message


def test_shards_are_read(folder: Path) -> None:
    shard(folder)
    for (name, array), (expected_name, expected) in zip(
        open_checkpoint(folder).params(), random_params(CONFIG), strict=True
    ):
        assert (name, *bits(array)) == (expected_name, *bits(expected))


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a.bin", ".safetensors", 3, None],
)
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, file: object) -> None:
    index = shard(folder)
    (folder.parent / "model.safetensors").write_bytes(b"out of the folder")
    index["weight_map"]["transformer.wte.weight"] = file
    write_index(folder, index)
    assert f"maps transformer.wte.weight to {file!r}, which is not the name of a safetensors file" in refusal(folder)


def test_an_index_must_be_sound(folder: Path) -> None:
    index = shard(folder)
    unsound: list[Any] = [[], {}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}]
    for broken in unsound:
        write_index(folder, broken)
        assert "has no weight_map" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    assert "is not valid JSON" in refusal(folder)

    wte, wpe = "transformer.wte.weight", "transformer.wpe.weight"
    write_index(folder, {"weight_map": {**index["weight_map"], wte: "model-00001-of-00002.safetensors"}})
    message = refusal(folder)
    assert f"{wte} is not in model-00001-of-00002.safetensors" in message
    assert f"{wte} is in model-00002-of-00002.safetensors but not listed" in message

    write_index(folder, {"weight_map": {key: file for key, file in index["weight_map"].items() if key != wpe}})
    assert f"{wpe} is in model-00002-of-00002.safetensors but not listed" in refusal(folder)

    write_index(folder, {"weight_map": {**index["weight_map"], "more": "model-00001-of-00002.safetensors"}})
    assert "more is not in model-00001-of-00002.safetensors" in refusal(folder)

    write_index(folder, index)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    index = shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    twin = next(key for key, file in index["weight_map"].items() if file != second.name)
    save_file({**tensors, twin: np.zeros(24, np.float32)}, second)
    assert f"{twin} is in {second.name} but not listed" in refusal(folder)


READ_FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", READ_FILES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_refused_at_once(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert "it is not a regular file" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_file_of_100_gib_is_refused_unread(folder: Path, name: str) -> None:
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(100 << 30)
    assert "is larger than 8 MiB" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [{"activation_function": "x" * 100_000}, {"n_layer": "\n" * 100_000}, {"eos_token_id": ["0"] * 100_000}],
    ids=range(3),
)
def test_messages_quote_no_more_than_a_little(folder: Path, change: dict[str, Any]) -> None:
    write_config(folder, {**CONFIG.to_dict(), **change})
    assert len(refusal(folder, ConfigError)) < 400


def test_messages_shorten_the_names_of_tensors(folder: Path) -> None:
    name = "transformer." + "x" * 100_000 + "\n"
    rewrite(folder, lambda tensors: tensors.update({name: np.ones(24, np.float32)}))
    assert len(refusal(folder)) < 4 * 250
    index = shard(folder)
    index["weight_map"] |= {name: "model-00001-of-00002.safetensors"}
    write_index(folder, index)
    assert len(refusal(folder)) < 4 * 250  # at most four tensors are named


def test_paths_that_cannot_be(folder: Path) -> None:
    for path in ("x" * 300, "/".join(["folder"] * 1000), str(folder / ("x" * 300)), "a\0b", Path("x" * 300), None, 5):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [".", "config.json", "model.safetensors", "generation_config.json"])
def test_no_permission(folder: Path, name: str) -> None:
    (folder / "generation_config.json").write_text("{}")
    (folder / name).chmod(0)
    try:
        assert "Permission denied" in refusal(folder)
    finally:
        (folder / name).chmod(0o700)


def test_places_that_are_no_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; pass the folder"):
        open_checkpoint(str(folder / "model.safetensors"))
    for nowhere in (
        folder / "nowhere",
        str(folder / "nowhere"),
        "a/b/c",
        Path("gpt2"),
        ".",
    ):  # a Path is never a preset
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(nowhere)
        assert not isinstance(caught.value, CheckpointUnavailable)


def test_hub_models_come_from_the_local_cache(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(cache)
    for model, repo_id in (("gpt2", "openai-community/gpt2"), ("some/model", "some/model")):
        with pytest.raises(CheckpointUnavailable, match=f"{repo_id} is not on this machine"):
            open_checkpoint(model)
        repo = cache / f"models--{repo_id.replace('/', '--')}"
        revision = "0" * 40
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(revision)
        (repo / "snapshots").mkdir()
        (repo / "snapshots" / revision).symlink_to(folder)
        checkpoint = open_checkpoint(model)
        assert checkpoint.source == f"{repo_id}@{revision}"
        assert checkpoint.config == CONFIG
        assert next(checkpoint.params())[0] == "wte.weight"


def test_a_folder_named_like_a_preset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "no cache"))
    monkeypatch.chdir(folder.parent)
    (folder.parent / "gpt2-xl").mkdir()
    with pytest.raises(CheckpointUnavailable):  # an artifact's folder, say: the name means the preset
        open_checkpoint("gpt2-xl")
    folder.rename(folder.parent / "gpt2-large")
    assert open_checkpoint("gpt2-large").source == "gpt2-large"


def test_tokenizer_must_fit_the_vocabulary(folder: Path) -> None:
    assert open_checkpoint(folder).tokenizer.text is None
    vocab = {chr(65 + token): token for token in range(CONFIG.vocab_size)}
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    assert open_checkpoint(folder).tokenizer.text is not None
    (folder / "vocab.json").write_text(json.dumps({**vocab, "zz": CONFIG.vocab_size}), encoding="utf-8")
    with pytest.raises(TokenizerError, match="the id 67, but the model's vocab_size is 67"):
        _ = open_checkpoint(folder).tokenizer


def test_random_params_have_the_scale_of_gpt2() -> None:
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4, tie_word_embeddings=False)
    params = dict(random_params(config))
    assert {name: array.shape for name, array in params.items()} == param_shapes(config)
    assert list(params) == list(param_shapes(config))
    for name, array in params.items():
        assert array.dtype == np.float32
        if array.ndim == 1:
            is_gain = ".ln_" in f".{name}" and name.endswith("weight")
            assert np.mean(array) == pytest.approx(1.0 if is_gain else 0.0, abs=0.05)
            assert np.std(array) == pytest.approx(0.1, rel=0.3)
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert np.std(array) == pytest.approx(expected, rel=0.03)


def test_random_params_depend_on_seed_and_name_only() -> None:
    params = dict(random_params(CONFIG, seed=1))
    longer = dict(random_params(GPT2Config(**{**SIZES, "n_positions": 13}), seed=1))
    other = dict(random_params(CONFIG, seed=2))
    seen = set()
    for name, array in params.items():
        if name != "wpe.weight":
            assert bits(array) == bits(longer[name])
        assert not np.array_equal(array, other[name])
        seen.add(bits(array))
    assert len(seen) == len(params)


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_cast_params_against_pytorch(source: str, target: str) -> None:
    from_torch = {name: torch.from_numpy(array).to(DTYPES[source]) for name, array in random_params(CONFIG)}
    to_numpy = {
        name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if source == "bfloat16" else tensor.numpy()
        for name, tensor in from_torch.items()
    }
    cast = dict(cast_params(to_numpy.items(), target))
    assert list(cast) == list(to_numpy)
    for name, array in cast.items():
        stored = target if array.ndim == 2 else "float32"
        assert array.dtype == (ml_dtypes.bfloat16 if stored == "bfloat16" else np.dtype(stored))
        np.testing.assert_array_equal(array.astype(np.float64), from_torch[name].to(DTYPES[stored]).double().numpy())


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [
        (65520.0, np.float32, "float16"),
        (-1e6, np.float32, "float16"),
        (3.4e38, np.float32, "bfloat16"),
        (1e39, np.float64, "float32"),
        (1e5, ml_dtypes.bfloat16, "float16"),
    ],
)
def test_cast_params_refuses_overflow_by_name(value: float, source: Any, target: str) -> None:
    matrix = np.zeros((3, 2), source)
    matrix[1, 1] = value
    with pytest.raises(CheckpointError, match=rf"^wpe.weight holds \S+, too large for {target}, .*; choose"):
        list(cast_params([("wpe.weight", matrix)], target))


@pytest.mark.parametrize(("source", "target"), [(np.float32, "float16"), (np.float32, "bfloat16"), (float, "float32")])
def test_cast_params_keeps_small_values_or_refuses(source: type, target: str) -> None:
    """Over all magnitudes: nothing is stored with an error beyond that of bfloat16 for values in its range."""
    matrix, refused = np.random.default_rng(0).standard_normal((64, 48)), []
    for exponent in range(10, -300 if source is float else -140, -1):
        exact = np.ldexp(matrix, exponent).astype(source).astype(np.float64)
        try:
            ((_, cast),) = cast_params([("wpe.weight", exact.astype(source))], target)
            error = np.square(cast.astype(np.float64) / exact.std() - exact / exact.std()).mean()
            assert error < 2.0**-18, exponent
        except CheckpointError as failure:
            message = "choose --dtype bfloat16 or float32" if target == "float16" else "choose another --dtype"
            assert f"too small for {target}" in str(failure) and message in str(failure)
            refused.append(exponent)
    assert refused and refused == list(range(refused[0], refused[-1] - 1, -1))
    zeros = np.zeros((2, 3), source)
    assert not dict(cast_params([("wpe.weight", zeros)], target))["wpe.weight"].any()
    mixed = np.array([[1.0, 1e-300]], source)  # one of them may vanish
    assert dict(cast_params([("wpe.weight", mixed)], target))["wpe.weight"][0, 0] == 1


def test_cast_params_keeps_the_largest_values_and_vectors() -> None:
    largest = np.full((1, 2), 65519.0, np.float32)  # rounds down to float16's largest
    vector = np.array([1e30], np.float32)
    cast = dict(cast_params([("wpe.weight", largest), ("ln_f.bias", vector)], "float16"))
    assert cast["wpe.weight"].tolist() == [[65504.0, 65504.0]]
    assert cast["ln_f.bias"] is vector
