"""Settings and fixtures that all tests share. The environment is set before anything imports TVM or transformers."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test reads the user's own targets and records; a fixture below sees to it that none writes them.
os.environ["XDG_DATA_HOME"] = os.path.join(tempfile.gettempdir(), f"tvm-attn-tests-{os.getpid()}")

from tvm_attn.runtime.machine import usable_cores  # after the settings above, which libraries read at import

_USER_DATA = Path(os.environ["XDG_DATA_HOME"])

# A shell starts background jobs with this signal ignored, and they pass that on. Tests interrupt what they run.
signal.signal(signal.SIGINT, signal.default_int_handler)

# TVM would otherwise use half of the hardware threads; it reads this once, when its thread pool starts.
os.environ.setdefault("TVM_NUM_THREADS", str(usable_cores()))

# Vulkan's validation layer, including synchronization, watches every test if it is installed. The runtime reads this
# when the first device is used; processes that tests start inherit it.
_LAYERS = (Path("/usr/share/vulkan/explicit_layer.d"), Path("/etc/vulkan/explicit_layer.d"))
if any(file for folder in _LAYERS for file in folder.glob("*khronos_validation*")):
    os.environ.setdefault("TVM_ATTN_VULKAN_VALIDATE", "1")

# A first call compiles, so deadlines mean nothing; in CI the examples are the same in every run.
settings.register_profile("tvm_attn", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tvm_attn")


@functools.cache
def _cuda_device_exists() -> bool:
    import tvm  # noqa: F401  (its CUDA runtime is loaded into it)

    from tvm_attn.runtime.devices import cuda

    return cuda.obstacle(0) is None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker("gpu") and not _cuda_device_exists():
        pytest.skip("needs a CUDA device")
    with _skip_what_the_device_lacks():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _skip_what_the_device_lacks():
        yield


@contextmanager
def _skip_what_the_device_lacks() -> Iterator[None]:
    """Skips a test of a kernel that needs more than vulkan:0 has, according to the runtime.
    `tests/vulkan/test_needs.py` tests which kernels need nothing.
    """
    try:
        yield
    except Exception as error:
        if lacking := re.match(r"vulkan:0 \(.*\) lacks .*(?=, which )", str(error)):
            pytest.skip(lacking[0])
        raise


@pytest.fixture(autouse=True)
def the_users_folder_stays_empty() -> Iterator[None]:
    """Fails a test that writes targets or records for all later tests to find."""
    yield
    written = [str(file) for file in _USER_DATA.rglob("*")]
    shutil.rmtree(_USER_DATA, ignore_errors=True)
    assert not written, written


def _validation() -> tuple[int, list[str]]:
    """How many messages Vulkan's validation layer has issued in this process, and the first of them."""
    if "tvm_ffi" not in sys.modules:
        return 0, []
    function = sys.modules["tvm_ffi"].get_global_func("tvm_attn.vulkan.validation", allow_missing=True)
    report = {"count": 0, "messages": []} if function is None else json.loads(function())
    return report["count"], report["messages"]


@pytest.fixture(autouse=True)
def vulkan_validation_stays_silent() -> Iterator[None]:
    """Fails a test during which the validation layer issued a message."""
    before, _ = _validation()
    yield
    after, messages = _validation()
    assert after == before, messages[before:]


_said_in_workers: list[str] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A hook of pytest-xdist: collects what the hook below leaves in a worker."""
    _said_in_workers.extend(getattr(node, "workeroutput", {}).get("vulkan_validation", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run in which the validation layer issued a message, even between tests."""
    _, messages = _validation()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["vulkan_validation"] = messages
    elif messages := [*messages, *_said_in_workers]:
        print(f"\nVulkan validation: {len(messages)} messages, the first: {messages[0]}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# The environment's own validator is newer than most distributions' validators, which lack cooperative matrices.
_PACKAGED = f"{sysconfig.get_path('platlib')}/cmeel.prefix/bin"
_SPIRV_VAL = shutil.which("spirv-val", path=_PACKAGED) or shutil.which("spirv-val")


@pytest.fixture(scope="session")
def check_spirv(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], None]:
    """check_spirv(code) fails if spirv-val rejects a module for Vulkan 1.3. Skips if spirv-val is missing."""
    if _SPIRV_VAL is None:
        pytest.skip("no spirv-val: install spirv-tools")
    path = tmp_path_factory.mktemp("spirv") / "kernel.spv"
    command = [_SPIRV_VAL, "--target-env", "vulkan1.3", "--scalar-block-layout", str(path)]
    version = subprocess.run([_SPIRV_VAL, "--version"], capture_output=True, text=True, check=True).stdout
    old = version < "SPIRV-Tools v2023.4"  # the first one with SPV_KHR_cooperative_matrix
    passed: set[bytes] = set()

    def check(code: bytes) -> None:
        if code in passed or (old and b"SPV_KHR_cooperative_matrix" in code):
            return
        path.write_bytes(code)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        passed.add(code)

    return check


@pytest.fixture(scope="session", autouse=True)
def every_spirv_module_is_valid(request: pytest.FixtureRequest) -> Iterator[None]:
    """Wraps the code generator: no test runs a Vulkan kernel that the validator rejects."""
    if _SPIRV_VAL is None:
        yield
        return
    from tvm_attn.vulkan.codegen import build

    check = request.getfixturevalue("check_spirv")
    globals_: dict[str, Any] = build.__globals__
    emit, parse = globals_["emit"], globals_["parse"]

    def checked(mod: Any) -> bytes:
        blob: bytes = emit(mod)
        for _, code in parse(blob):
            check(code)
        return blob

    globals_["emit"] = checked
    yield
    globals_["emit"] = emit


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The bundled demo checkpoint: config.json, model.safetensors, tokenizer.json."""
    return Path(__file__).parents[1] / "models" / "demo"


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For small models, where more threads only wait, and TVM's threads with them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_artifact(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model compiled for this machine, float32. Nobody writes to it: a test that changes it makes a copy."""
    from tvm_attn.compiler.build import build

    folder = tmp_path_factory.mktemp("demo") / "artifact"
    build(demo_model_dir, target="cpu", out=folder, verify=False)
    return folder
