"""Whole models on a Vulkan device (Mesa's llvmpipe will do), against PyTorch and transformers."""

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import GPT2LMHeadModel

import tvm_attn
from tvm_attn import inventory, targets
from tvm_attn.compiler.build import Built, build
from tvm_attn.compiler.verification import prompt_lengths
from tvm_attn.config import GPT2Config
from tvm_attn.errors import ArtifactError, DeviceError
from tvm_attn.model.checkpoint import random_params
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.model import Model
from tvm_attn.vulkan import devices, statistics

OBSTACLE = device_class("vulkan").obstacle()
pytestmark = [
    pytest.mark.skipif(OBSTACLE is not None, reason=f"Vulkan: {OBSTACLE}"),
    pytest.mark.usefixtures("one_torch_thread"),
]

PROMPT = "Return the number of characters in the string, where"
SMALL = GPT2Config(vocab_size=300, n_positions=40, n_embd=64, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)


def skip_unless_it_runs(dtype: str, quant: str) -> None:
    """`build` only notes that it could not check a library."""
    generic = targets.read("vulkan-generic")
    assert isinstance(generic, targets.GpuTarget)
    if reason := inventory.obstacle(generic, dtype, quant):
        pytest.skip(reason)


@pytest.fixture(scope="module", params=["float32", "float16"])
def built(request: pytest.FixtureRequest, demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The demo model for the processor and for Vulkan in one artifact; `build` checks both and raises."""
    skip_unless_it_runs(request.param, "none")
    return build(demo_model_dir, "cpu,vulkan", request.param, out=tmp_path_factory.mktemp("demo") / "artifact")


@pytest.fixture(scope="module")
def ours(built: Built) -> Model:
    return tvm_attn.load(built.folder, "vulkan:0")


@pytest.fixture(scope="module")
def theirs(built: Built, demo_model_dir: Path) -> GPT2LMHeadModel:
    """In float32, on the weights as they are stored."""
    model = GPT2LMHeadModel.from_pretrained(demo_model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    stored = getattr(torch, json.loads((built.folder / "manifest.json").read_bytes())["dtype"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(stored).float())
    return model


def checkpoint(folder: Path, config: GPT2Config) -> Path:
    save_file(dict(random_params(config)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def test_every_function_was_checked_on_both_devices(built: Built) -> None:
    on_cpu, on_vulkan = built.reports.values()
    assert on_cpu is not None and on_vulkan is not None
    expected = [(check.function, check.case) for check in on_cpu.checks]
    assert [(check.function, check.case) for check in on_vulkan.checks] == expected
    assert {function for function, _ in expected} == {"logits", "prefill", "decode", "decode_one"}
    assert len(expected) > 2 * len(prompt_lengths(256))
    libraries = json.loads((built.folder / "manifest.json").read_bytes())["libraries"]
    assert [library["device"] for library in libraries] == ["cpu", "vulkan"]
    assert len(list(built.folder.glob("params"))) == 1


def test_greedy_tokens_are_those_of_transformers(ours: Model, theirs: GPT2LMHeadModel) -> None:
    assert ours.device == "vulkan:0" and ours.tokenizer is not None
    ids = ours.tokenizer.encode(PROMPT)
    found = ours.generate(ids, max_new_tokens=48, stop_token_ids=[]).token_ids
    prompt = torch.tensor([ids])
    options = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(ids) :].tolist()
    assert list(found[: len(expected)]) == expected


def test_a_batch_gives_what_single_runs_give(ours: Model) -> None:
    """Eleven rows: more than a group, so that the last groups of prefill and decode are padded."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, ours.config.vocab_size, length).tolist() for length in (1, 9, 30, 2, 64, 5, 17, 3)]
    batch = ours.generate(prompts, max_new_tokens=6)
    singles = [ours.generate(prompt, max_new_tokens=6) for prompt in prompts]
    assert [completion.token_ids for completion in batch] == [completion.token_ids for completion in singles]


def test_generate_in_a_process_without_the_compiler(built: Built, ours: Model) -> None:
    arguments = [str(built.folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--device", "vulkan:0", "--json"]
    command = [sys.executable, "-m", "tvm_attn.generate", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Vulkan validation:" not in done.stderr
    result = json.loads(done.stdout)
    assert result["token_ids"] == list(ours.generate(PROMPT, max_new_tokens=12).token_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 39, "n_head": 3, "n_inner": 71, "vocab_size": 67, "tie_word_embeddings": False},
        {"n_embd": 4, "n_head": 4, "n_inner": 1, "vocab_size": 5, "n_positions": 7},
        {"n_embd": 80, "n_head": 1, "activation_function": "relu", "scale_attn_weights": False},
        {"n_embd": 60, "n_head": 3, "n_inner": 40, "n_positions": 45, "activation_function": "gelu"},
    ],
    ids=["odd sizes", "smallest", "one head of 80", "heads of 20"],
)
def test_other_shapes(changes: dict[str, Any], tmp_path: Path) -> None:
    """`build` compares every function with PyTorch and raises where one disagrees."""
    config = replace(SMALL, **{"n_inner": 4 * changes["n_embd"], **changes})
    built = build(checkpoint(tmp_path, config), "vulkan", out=tmp_path / "artifact")
    report = built.reports["vulkan-generic"]
    assert report is not None and all(check.passed for check in report.checks)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized(quant: str, tmp_path: Path) -> None:
    skip_unless_it_runs("float16", quant)
    built = build(checkpoint(tmp_path, SMALL), "vulkan", "float16", quant, out=tmp_path / "artifact")
    report = built.reports["vulkan-generic"]
    assert report is not None and all(check.passed for check in report.checks)


def test_target_with_subgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a target file that says how large this device's subgroups are."""
    size, generic = devices()[0]["limits"]["subgroup_size"], targets.resolve("vulkan")
    known = replace(generic, subgroup=size, tvm=generic.tvm | {"thread_warp_size": size})  # type: ignore[call-arg]
    monkeypatch.setattr(targets, "resolve", lambda name: known)
    built = build(checkpoint(tmp_path, SMALL), "vulkan", out=tmp_path / "artifact")
    report = built.reports[known.name]
    assert report is not None and all(check.passed for check in report.checks)
    assert f'"subgroup_size":{size}'.encode() in (built.folder / f"lib-{known.name}.so").read_bytes()


@pytest.mark.slow
def test_ten_thousand_decode_steps_leak_nothing(tmp_path: Path) -> None:
    """Uploads of the inputs, a layer and the head, the choice of the token and its way back, in few submissions."""
    config = replace(SMALL, vocab_size=96, n_embd=32, n_inner=64)
    built = build(checkpoint(tmp_path, config), "vulkan", out=tmp_path / "artifact", verify=False)
    engine = tvm_attn.load(built.folder, "vulkan:0", max_batch=1).engine
    slots, token_ids = np.zeros(1, np.int32), np.ones(1, np.int32)

    def decode(steps: int) -> dict[str, int]:
        nonlocal token_ids
        for step in range(steps):
            position = np.array([step % config.n_positions], np.int32)
            token_ids = engine.decode(token_ids, slots, position).argmax()
        gc.collect()
        return statistics()

    before = decode(config.n_positions)
    after = decode(10_000)
    for name in ("allocated_bytes", "allocated_peak_bytes", "allocations", "reserved_bytes", "blocks"):
        assert after[name] == before[name], name
    assert after["submissions"] - before["submissions"] <= 3 * 10_000
    assert after["operations"] - before["operations"] <= 17 * 10_000


def test_devices_that_are_not_there(built: Built, demo_artifact: Path) -> None:
    with pytest.raises(DeviceError, match=r"^device vulkan:99: there is no device vulkan:99; "):
        tvm_attn.load(built.folder, "vulkan:99")
    with pytest.raises(ArtifactError, match="holds no library for 'vulkan'"):
        tvm_attn.load(demo_artifact, "vulkan:0")


def test_automatic_device(built: Built, tmp_path: Path) -> None:
    """A software renderer is no better than the processor, and better than nothing."""
    assert tvm_attn.load(built.folder).device in ("cpu", "vulkan:0")
    only = build(checkpoint(tmp_path, SMALL), "vulkan", out=tmp_path / "artifact", verify=False)
    assert tvm_attn.load(only.folder).device == "vulkan:0"
