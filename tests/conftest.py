"""Settings and fixtures that every test shares. The environment is set before anything imports TVM or transformers."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tvm_attn.runtime.machine import usable_cores  # after the settings above, which libraries read at import

# TVM alone would use half of the hardware threads; it reads this once, when its thread pool starts.
os.environ.setdefault("TVM_NUM_THREADS", str(usable_cores()))

# A first call compiles, so deadlines mean nothing; in CI the examples are the same in every run.
settings.register_profile("tvm_attn", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tvm_attn")


@functools.cache
def _cuda_device_exists() -> bool:
    import tvm

    return bool(tvm.cuda(0).exist)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _cuda_device_exists():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The bundled demo checkpoint: config.json, model.safetensors, tokenizer.json."""
    return Path(__file__).parents[1] / "models" / "demo"


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For small models, which only wait for further threads, and TVM's threads with them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_artifact(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model compiled for this machine, float32. Nobody writes into it: a test that alters one copies it."""
    from tvm_attn.compiler.build import build

    folder = tmp_path_factory.mktemp("demo") / "artifact"
    build(demo_model_dir, target="cpu", out=folder, verify=False)
    return folder
