"""Running an artifact needs only TVM's runtime: PyTorch and TVM's compiler are not loaded, and nothing is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tvm_attn

PROMPT, TOKENS = "Return the", 12

# What a process has loaded, printed as its last line of output.
LOADED = """
import json, sys
with open("/proc/self/maps") as maps:
    libraries = sorted({line.split("/")[-1].strip() for line in maps if ".so" in line})
print(json.dumps({"modules": sorted(sys.modules), "libraries": libraries, "result": result}))
"""
GENERATE = f"""
import sys, tvm_attn
model = tvm_attn.load(sys.argv[1])
completion = model.generate({PROMPT!r}, max_new_tokens={TOKENS})
result = {{"text": completion.text, "logits": model.logits([[1, 2, 3]]).sum(dtype=float)}}
"""


def run(code: str, artifact: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TVM_USE_RUNTIME_LIB"} | environment
    command = [sys.executable, "-c", code, str(artifact)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def loaded(line: str) -> tuple[set[str], str, Any]:
    """Top-level modules, libraries as one text, and the result."""
    state = json.loads(line)
    return {name.partition(".")[0] for name in state["modules"]}, " ".join(state["libraries"]), state["result"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_generating_needs_the_runtime_only(demo_artifact: Path) -> None:
    done = run(GENERATE + LOADED, demo_artifact, TVM_USE_RUNTIME_LIB="1")
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    modules, libraries, result = loaded(line)
    assert {"tvm", "tvm_ffi", "numpy", "tokenizers"} <= modules
    assert not modules & {"torch", "transformers", "scipy", "safetensors", "huggingface_hub", "rich"}
    assert "libtvm_runtime" in libraries
    assert "libtvm_compiler" not in libraries and "libtorch" not in libraries and "LLVM" not in libraries
    # The same numbers as in a process that has the compiler.
    model = tvm_attn.load(demo_artifact)
    assert result["text"] == model.generate(PROMPT, max_new_tokens=TOKENS).text
    assert result["logits"] == pytest.approx(model.logits([[1, 2, 3]]).sum(dtype=float), rel=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_generate_command_chooses_the_runtime(demo_artifact: Path) -> None:
    code = f"""
import sys
from tvm_attn import generate
result = generate.main([sys.argv[1], "--prompt", {PROMPT!r}, "--max-new-tokens", "{TOKENS}"])
print()
"""
    done = run(code + LOADED, demo_artifact)
    *text, line = done.stdout.splitlines()
    modules, libraries, result = loaded(line)
    assert result == 0
    assert "\n".join(text).startswith(PROMPT)
    assert "torch" not in modules
    assert "libtvm_runtime" in libraries and "libtvm_compiler" not in libraries
    assert "warning" not in done.stderr.lower()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tvm_attn; print(sorted({'tvm', 'tvm_ffi', 'numpy', 'torch', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["devices", "build --target cuda", "kernels --target cuda", "tune --target cpu"])
def test_commands_without_the_compiler_work_or_say_so(command: str) -> None:
    """As in a bundle; errors about devices name the command that lists them."""
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    arguments = [sys.executable, "-m", "tvm_attn", *command.split()]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    if command == "devices":
        assert done.returncode == 0 and "cpu: " in done.stdout and done.stderr == ""
    else:
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: this needs TVM's compiler, and only its runtime is loaded")


def test_measuring_without_the_compiler_leaves_out_the_limits(demo_artifact: Path) -> None:
    code = """
import sys
from tvm_attn.benchmark.session import _limits
result = _limits("cpu", 1, "float32", lambda message, share: None)
"""
    *_, line = run(code + LOADED, demo_artifact, TVM_USE_RUNTIME_LIB="1").stdout.splitlines()
    assert loaded(line)[2] is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_again_and_again_takes_no_more_memory(demo_artifact: Path) -> None:
    code = """
import gc, mmap, sys, tvm_attn

def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE / 2**20

result = []
for _ in range(24):
    model = tvm_attn.load(sys.argv[1])
    model.generate([1, 2, 3], max_new_tokens=2)
    del model
    gc.collect()
    result.append(megabytes())
"""
    *_, line = run(code + LOADED, demo_artifact, TVM_USE_RUNTIME_LIB="1").stdout.splitlines()
    used = loaded(line)[2]
    assert min(used[-4:]) - min(used[4:8]) < 8  # the model has 6 MB of parameters, its library 1 MB
