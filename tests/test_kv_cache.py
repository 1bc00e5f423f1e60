"""Models with a KV cache in int8: against references in float64, on every device that is present."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tvm_attn
from tests.kernels import devices
from tvm_attn import targets
from tvm_attn.compiler.devices import layout_for
from tvm_attn.compiler.verification import BOUNDS, Bounds
from tvm_attn.config import PRESETS, param_shapes
from tvm_attn.errors import ConfigError, TargetError, VerificationError
from tvm_attn.model.layout import check_types
from tvm_attn.model.reference import Reference, RoundedReference
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.memory import memory_needs
from tvm_attn.runtime.model import Model

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CONTEXT = 256


def targets_here() -> Iterator[str]:
    yield "cpu"
    if devices.vulkan_devices():
        yield "vulkan"


@pytest.fixture(scope="module", params=list(targets_here()))
def folder(request: pytest.FixtureRequest, demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "artifact"
    # The build checks every function against PyTorch.
    tvm_attn.build(demo_model_dir, target=request.param, out=out, kv="int8", verify=request.param == "cpu")
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    (library,) = Artifact(folder).libraries
    return tvm_attn.load(folder, library.device, max_batch=3)


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.square(actual - expected).sum() / np.square(expected).sum())


def test_logits_are_those_of_keys_and_values_in_8_bits(model: Model, folder: Path) -> None:
    artifact = Artifact(folder)
    params = {name: artifact.parameters.read(name) for name in param_shapes(artifact.config)}
    ids = np.random.default_rng(0).integers(0, artifact.config.vocab_size, (1, CONTEXT))
    exact = Reference(artifact.config, params, "float64").logits(ids)
    rounded = RoundedReference(artifact.config, params, "float64", cache="int8").logits(ids)
    actual = model.logits(ids)
    assert nmse(actual, exact) <= BOUNDS["int8 cache"].nmse
    # Float32 sums move a few values over the border between two steps, which a reference with the same steps shows.
    assert nmse(actual, rounded) <= nmse(rounded, exact) / 4
    # A token computed from the cache sees what the prompt saw.
    engine = model.engine
    engine.prefill([ids[0, :100].astype(np.int32)], [1])
    last = engine.decode(ids[0, 100:101].astype(np.int32), np.array([1], np.int32), np.array([100], np.int32)).numpy()
    assert nmse(last[0], rounded[0, 100]) <= BOUNDS["int8 cache"].nmse / 10


def test_attention_and_scores(model: Model, folder: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 2048, 40).tolist()
    weights = model.attention(ids)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    (scored,) = model.score([ids])
    logits = model.logits([ids])[0].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(39), ids[1:]]
    np.testing.assert_allclose([x for x in scored.token_logprobs if x is not None], expected, atol=1e-3)


def test_a_prefix_in_the_cache_changes_nothing(model: Model) -> None:
    prompt = np.random.default_rng(2).integers(0, 2048, 70).tolist()
    first = model.generate(prompt, max_new_tokens=12).token_ids
    assert model.generate(prompt, max_new_tokens=12).token_ids == first
    batch = model.generate([prompt, prompt[:5], prompt[:33]], max_new_tokens=12)
    assert batch[0].token_ids == first


def test_the_manifest_says_what_it_costs(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["kv"] == "int8" and manifest["dtype"] == "float32"
    (library,) = manifest["libraries"]
    if library["device"] == "cpu":
        assert 0 < library["accuracy"]["kl_divergence"] < 1e-3 and library["accuracy"]["top1"] > 0.99


def test_memory_of_a_slot(folder: Path) -> None:
    artifact = Artifact(folder)
    config = artifact.config
    needs = memory_needs(artifact, artifact.libraries[0], 1)
    assert needs.cache_slot == 2 * config.n_layer * config.n_head * config.n_positions * (config.head_dim + 4)


def test_what_is_refused() -> None:
    with pytest.raises(TargetError, match="'int4' is not available; available: int8"):
        check_types(targets.read("cpu-x86-64"), "float32", "none", "int4")
    with pytest.raises(TargetError, match="int8 is not available for cuda-sm90; build without --kv"):
        tvm_attn.build(target="cuda-sm90", dtype="float16", kv="int8")
    odd = replace(PRESETS["gpt2"], n_embd=42, n_head=3)
    with pytest.raises(ConfigError, match="multiples of 4 dimensions; these have 14"):
        layout_for(odd, targets.read("cpu-x86-64"), "float32", "none", "int8")


def test_a_model_that_needs_more_bits_is_told_so(
    demo_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo model does not, so the bound is moved below what 8 bits reach."""
    monkeypatch.setitem(BOUNDS, "int8 cache", Bounds(nmse=1e-9, max_abs=1e-1))
    with pytest.raises(
        VerificationError, match="a KV cache in int8 is too coarse for this model: build it without --kv"
    ):
        tvm_attn.build(demo_model_dir, target="cpu", out=tmp_path / "out", kv="int8")
    assert not (tmp_path / "out").exists()
