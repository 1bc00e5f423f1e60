"""A real server on a free loopback port, over the demo model, for all tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

import tvm_attn
from tests.serving.servers import SLOTS, Running, serving
from tvm_attn.runtime.model import Model


@pytest.fixture(scope="session")
def model(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, device="cpu", max_batch=SLOTS)


@pytest.fixture(scope="session")
def running(model: Model) -> Iterator[Running]:
    with serving(model) as found:
        yield found


@pytest.fixture
def new_model(demo_artifact: Path) -> Callable[..., Model]:
    """Loads a model of its own for a test that closes its scheduler or fills its queue."""
    return lambda **options: tvm_attn.load(demo_artifact, device="cpu", **options)


@pytest.fixture(scope="session")
def url(running: Running) -> str:
    return running.url


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as found:
        yield found
