"""Libraries are loaded by content: what was checked is what runs, whatever is at the path by then."""

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import tvm_attn
from tvm_attn.compiler.build import build
from tvm_attn.config import GPT2Config
from tvm_attn.model.checkpoint import random_params
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.library import load_library

CONFIG = GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=1, n_head=2, eos_token_id=299)
IDS = np.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[GPT2Config, int, Path]]:
    """Two models that differ in weights, an end token, and what their libraries compute."""
    made = []
    for seed, config in enumerate([CONFIG, replace(CONFIG, eos_token_id=7, activation_function="relu")]):
        folder = tmp_path_factory.mktemp("checkpoint")
        save_file(dict(random_params(config, seed)), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        made.append((config, seed, folder))
    return made


@pytest.fixture(scope="module")
def artifacts(checkpoints: list[tuple[GPT2Config, int, Path]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("artifacts")
    for _, seed, folder in checkpoints:
        build(folder, target="cpu", out=place / str(seed), verify=False)
    return [place / str(seed) for _, seed, _ in checkpoints]


def expected(config: GPT2Config, seed: int) -> np.ndarray:
    return Reference(config, dict(random_params(config, seed)), "float64").logits(IDS)


@pytest.mark.parametrize("how", ["a folder in its place", "files in the same folder", "the same file, written over"])
def test_an_artifact_that_was_built_again_is_the_one_that_is_loaded(
    how: str, checkpoints: list[tuple[GPT2Config, int, Path]], artifacts: list[Path], tmp_path: Path
) -> None:
    """Several times in one process, at one path; models that were loaded earlier do not change."""
    folder, models = tmp_path / "artifact", []
    for turn in range(4):
        source = artifacts[turn % 2]
        if how == "a folder in its place" and folder.exists():
            shutil.rmtree(folder)
        for file in filter(Path.is_file, source.rglob("*")):
            place = folder / file.relative_to(source)
            place.parent.mkdir(exist_ok=True, parents=True)
            if how == "files in the same folder":
                place.unlink(missing_ok=True)
            place.write_bytes(file.read_bytes())
        models.append(tvm_attn.load(folder))
        assert models[-1].config.eos_token_id == checkpoints[turn % 2][0].eos_token_id
    shutil.rmtree(folder)
    for turn, model in enumerate(models):
        config, seed, _ = checkpoints[turn % 2]
        np.testing.assert_allclose(model.logits(IDS), expected(config, seed), atol=1e-4)


def test_a_library_that_is_exchanged_after_it_was_checked(
    checkpoints: list[tuple[GPT2Config, int, Path]],
    artifacts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(artifacts[0], tmp_path / "artifact"))
    (library,), (other,) = folder.glob("*.so"), artifacts[1].glob("*.so")

    def exchanged(content: np.ndarray, name: str) -> object:
        shutil.copy(other, library)
        return load_library(content, name)

    monkeypatch.setattr("tvm_attn.runtime.engine.load_library", exchanged)
    config, seed, _ = checkpoints[0]
    np.testing.assert_allclose(tvm_attn.load(folder).logits(IDS), expected(config, seed), atol=1e-4)


def test_one_content_is_loaded_once(artifacts: list[Path]) -> None:
    """Neither mappings nor descriptors grow with the number of loads."""

    def resources() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return maps.count("memfd:lib-"), len(os.listdir("/proc/self/fd"))

    tvm_attn.load(artifacts[0])
    before = resources()
    for _ in range(20):
        tvm_attn.load(artifacts[0])
    assert resources() == before


def test_files_that_are_no_library(artifacts: list[Path]) -> None:
    (file,) = artifacts[0].glob("*.so")
    content = np.fromfile(file, np.uint8)
    for wrong in (content[:0], content[:100], np.zeros(5000, np.uint8)):
        with pytest.raises(RuntimeError, match=r"lib-mine\.so") as caught:
            load_library(wrong.copy(), "lib-mine.so")
        assert "/proc" not in str(caught.value)
    assert load_library(content, "n" * 1000).implements_function("vm_load_executable", query_imports=True)


CODE = """
import os, sys
import numpy as np
import tvm_attn
for place in ("TMPDIR", "TEMP", "TMP"):
    os.environ[place] = "/nowhere"
print(tvm_attn.load(sys.argv[1]).logits(np.arange(4)[None]).shape)
"""


def test_no_temporary_folder_is_needed(artifacts: list[Path], tmp_path: Path) -> None:
    """A read-only container, or one whose /tmp is mounted noexec."""
    command = [sys.executable, "-c", CODE, str(artifacts[0])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "(1, 4, 300)\n", done.stderr
