"""`python -m benchmarks.gpu` without a GPU: processes, budgets, ratios, tables, and parts on the processor."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.compare import check_same_model, parse_peer
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, figures, models, parts, systems, timing
from benchmarks.gpu.kernel_library import INDEX, KernelLibrary
from benchmarks.gpu.kernel_library_build import Timed, write_kernel_library
from benchmarks.gpu.parts import Part, Settings
from benchmarks.gpu.peer import GpuPeer
from benchmarks.gpu.processes import first_error, run_child
from benchmarks.gpu.systems import TorchGpuSystem
from benchmarks.gpu.torch_model import TorchModel
from benchmarks.peers.client import PeerUnavailable
from tvm_attn.benchmark import system
from tvm_attn.benchmark.ours import CompiledSystem
from tvm_attn.benchmark.system import Case as Call
from tvm_attn.benchmark.system import prompts
from tvm_attn.config import GPT2Config
from tvm_attn.errors import BenchmarkError
from tvm_attn.kernels import Argmax, LayerNorm
from tvm_attn.model.checkpoint import random_params
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.tensors import normalised_error

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = GPT2Config(vocab_size=101, n_positions=40, n_embd=48, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ---- processes ----


def test_a_child_that_crashes_leaves_what_it_printed() -> None:
    seen: list[dict[str, Any]] = []
    code = "import os; print('{\"a\": 1}', flush=True); print('chatter', flush=True); print('[1]'); "
    outcome = run_child(python(code + "print('{\"a\": 2}', flush=True); os.abort()"), 30, seen.append)
    assert outcome.entries == seen == [{"a": 1}, {"a": 2}]
    assert outcome.error is not None and "SIGABRT" in outcome.error


def test_a_child_says_why_it_failed_or_that_it_went_well() -> None:
    assert (
        run_child(python("raise ValueError('no such thing')"), 30).error == "ValueError: no such thing (exit status 1)"
    )
    assert run_child(python("print('{}')"), 30).error is None


def test_the_error_of_a_child_is_the_one_that_ended_it() -> None:
    """After a fault on a device, freeing what lies on it aborts the process."""
    code = """
import os
from benchmarks.gpu.processes import emit_all

class Tensor:
    def __del__(self):
        os.abort()

def entries():
    tensor = Tensor()
    yield {"a": 1}
    raise RuntimeError("CUDA: an illegal memory access\\nwas encountered")

emit_all(entries())
"""
    outcome = run_child(python(code), 30)
    assert outcome.entries == [{"a": 1}]
    assert outcome.error == "RuntimeError: CUDA: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("Traceback:\n  File 1\nValueError: first\n\nDuring handling:\nKeyError: second\nAborted", "ValueError: first"),
        (
            "chatter\ntvm.error.InternalError: CUDA: illegal\nterminate called\n",
            "tvm.error.InternalError: CUDA: illegal",
        ),
        ("note\nerror: no device\nmore", "error: no device"),
        ("terminate called\n  what():  CUDA: misaligned\nAborted", "what():  CUDA: misaligned"),
        ("one\ntwo\n", "two"),
        ("", "no message"),
    ],
)
def test_the_first_error_of_a_log_is_its_cause(log: str, error: str) -> None:
    assert first_error(log) == error


def test_a_child_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    grandchild = f"import time, pathlib\nwhile True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.02)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); "
    outcome = run_child(python(code + "print('{\"a\": 1}', flush=True); time.sleep(60)"), 1.0)
    assert outcome.error == "stopped after 1 s" and outcome.entries == [{"a": 1}]
    time.sleep(0.1)
    beat.unlink(missing_ok=True)
    time.sleep(0.2)
    assert not beat.exists()


# ---- parts ----


def test_parts_after_one_that_fails_run_until_time_is_over() -> None:
    codes = {
        "first": "print('{\"passed\": true}')",
        "slow": "import time; print('{\"passed\": true}', flush=True); time.sleep(60)",
        "broken": "1 / 0",
        "last": "print('{}')",
    }
    planned = [Part(name, 1.0 if name == "slow" else 20.0) for name in codes]
    told: list[str] = []
    result = parts.run_parts(planned, lambda part, limit: python(codes[part.name]), 60.0, told.append)
    assert [part["error"] for part in result.values()] == [
        None,
        "stopped after 1 s",
        "ZeroDivisionError: division by zero (exit status 1)",
        None,
    ]
    assert result["slow"]["entries"] == [{"passed": True}] and len(told) == 4
    late = parts.run_parts(planned, lambda part, limit: python(codes[part.name]), 4.0)
    assert {part["error"] for part in late.values()} == {"left out: no time was left"}


@pytest.mark.parametrize(
    ("error", "entries", "correctness", "failed"),
    [
        (None, [{"passed": True}, {"value": 1}], True, False),
        (None, [{"passed": False}], True, True),
        ("stopped after 1 s", [], True, True),
        ("stopped after 1 s", [{"passed": False}], False, False),
    ],
)
def test_a_run_fails_where_something_is_not_right(
    error: str | None, entries: list[dict[str, Any]], correctness: bool, failed: bool
) -> None:
    assert parts.has_failed({"part": {"error": error, "entries": entries, "correctness": correctness}}) is failed


def test_correctness_comes_first_and_all_parts_fit_eight_minutes(
    demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parts.artifacts_of(demo_artifact.parent) == []  # it has no library for a GPU
    assert parts.artifacts_of(tmp_path / "absent") == []
    monkeypatch.setattr(parts, "has_library", lambda artifact, device: True)
    (tmp_path / "kernels.json").write_text("{}")
    settings = Settings("cuda:0", tmp_path, tmp_path, quick=False)
    planned = parts.plan(settings, [Artifact(demo_artifact)], sanitize=True)
    names = [part.name for part in planned]
    checks = ["kernels", "check:artifact"]
    assert names == ["device", *checks, "products", "attention", "model:artifact", "vulkan:artifact", "sanitize"]
    assert [part.name for part in planned if part.correctness] == [*checks, "vulkan:artifact", "sanitize"]
    assert gpu.SECONDS < 480


# ---- kernels on the processor ----


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels") / "kernels"
    chosen = [*list(LayerNorm.cases())[:2], next(Argmax.cases())]
    write_kernel_library("cpu", folder, cases=chosen, timed=[Timed("norm", chosen[0].kernel)])
    return folder


def test_a_kernel_library_keeps_cases(kernel_folder: Path) -> None:
    library = KernelLibrary(kernel_folder)
    case = list(LayerNorm.cases())[1]
    stored = library.cases[1]
    assert stored.kernel["family"] == "layer_norm" and stored.name == case.name and stored.nmse == case.nmse
    arrays = {stored.inputs: case.inputs, stored.outputs: case.outputs, stored.expected: case.expected}
    for keys, wanted in arrays.items():
        for given, array in zip(library.arrays(keys), wanted, strict=True):
            assert given.dtype == (array.dtype if keys is not stored.expected else np.float32)
            np.testing.assert_array_equal(given, array.astype(given.dtype))
    assert library.timed_function("norm")[1]["width"] == next(LayerNorm.cases()).kernel.width
    with pytest.raises(BenchmarkError, match="no kernel for bread"):
        library.timed_function("bread")
    with pytest.raises(BenchmarkError, match="holds no kernels"):
        KernelLibrary(kernel_folder.parent)


_EMULATED = """
import sys
from pathlib import Path
from unittest import mock
from tests.cuda.emulation import device
from benchmarks.gpu import kernel_library_build as build
from benchmarks.gpu.devices import tvm_device
from benchmarks.gpu.kernel_library import KernelLibrary
from tvm_attn.kernels import LayerNorm, QKVLinear

def first(family):
    return next(case for case in family.cases() if case.kernel.activations != "float32")

cases = [first(LayerNorm), first(QKVLinear)]  # the second one has a result among its inputs
with mock.patch.object(build, "compile_fatbin", lambda source, images: source.encode()):
    build.write_kernel_library("cuda-sm80", Path(sys.argv[1]), cases=cases, timed=[])
device.install()
library, cuda0 = KernelLibrary(Path(sys.argv[1])), tvm_device("cuda:0")
results = [library.check(case, cuda0) for case in library.cases]
assert len(results) == 2 and all(result.passed for result in results), results
"""


@pytest.mark.slow
def test_cases_of_a_library_for_cuda_run_on_the_emulated_device(tmp_path: Path) -> None:
    # The device stays installed, so use a separate process.
    command = [sys.executable, "-c", _EMULATED, str(tmp_path / "kernels")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_cases_run_and_one_that_dies_is_named(
    kernel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = cases.run_cases(kernel_folder, "cpu", 60.0)
    assert [result.passed for result in results] == [True, True, True]
    index = json.loads((kernel_folder / INDEX).read_text())
    index["cases"][0]["nmse"] = -1.0
    index["cases"][1]["function"] = "no_such_kernel"
    for path in kernel_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    results = cases.run_cases(tmp_path, "cpu", 60.0)
    assert [result.passed for result in results] == [False, False, True]
    assert results[0].nmse >= 0 and math.isnan(results[1].nmse)
    assert "layer_norm" in results[1].name and "no_such_kernel" in results[1].name
    assert cases.run_cases(tmp_path, "cpu", 0.0) == []
    monkeypatch.setattr(cases, "MOST_CRASHES", 2)
    results = cases.run_cases(kernel_folder, "cuda:99", 60.0)
    assert len(results) == 2 and all("device cuda:99" in result.name for result in results)


def test_sanitizer_verdicts(kernel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport os, sys\ni = sys.argv.index({sys.executable!r})\n")
    with tool.open("a") as file:
        file.write("print('========= COMPUTE-SANITIZER')\nassert sys.argv[1] == '--tool'\n")
        file.write("if sys.argv[2] == 'racecheck': sys.exit('found 3 hazards')\nos.execv(sys.argv[i], sys.argv[i:])\n")
    tool.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(tool))
    verdicts = cases.sanitize(kernel_folder, "cpu", 60.0)
    assert verdicts == {"memcheck": "0 errors in 3 cases", "racecheck": "found 3 hazards (exit status 1)"}
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert all("not installed" in verdict for verdict in cases.sanitize(kernel_folder, "cpu", 60.0).values())


# ---- PyTorch systems ----


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return dict(random_params(SMALL))


def test_the_torch_model_is_gpt2(weights: dict[str, np.ndarray]) -> None:
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 12)).astype(np.int32)
    expected = Reference(SMALL, weights, "float64").logits(ids)
    model = TorchModel(SMALL, weights.items(), "float32", "cpu", max_batch=3)
    assert normalised_error(model.prefill(model.ids(ids)).numpy(), expected[:, -1]) < 1e-10
    model.prefill(model.ids(ids[:, :8]))
    for position in range(8, 12):
        logits = model.decode(model.ids(ids[:, position]), position)
        assert normalised_error(logits.numpy(), expected[:, position]) < 1e-10
    model.prefill(model.ids(ids[:, :8]))
    with torch.inference_mode():
        stepped = model.step(model.ids(ids[:, 8]), torch.tensor([8]), 32)
    assert normalised_error(stepped.numpy(), expected[:, 8]) < 1e-10


def test_decode_is_timed_at_growing_positions(weights: dict[str, np.ndarray]) -> None:
    system = TorchGpuSystem(TorchModel(SMALL, weights.items(), "float32", "cpu", 2), "float32", "PyTorch", False)
    positions: list[tuple[int, tuple[int, ...]]] = []
    decode = system.decode

    def watched(token_ids: np.ndarray, context: int) -> Any:
        positions.append((context, tuple(token_ids)))
        return decode(token_ids, context)

    system.decode = watched  # type: ignore[method-assign]
    call = Call("decode", 30, 2)
    system.fill(call)
    assert len(system.time(call, 0.0)) == 10
    assert [position for position, _ in positions] == [*range(30, 40)] * 2
    reference = Reference(SMALL, weights)
    ids = prompts(call, SMALL.vocab_size)
    for (_, fed), (_, chosen) in pairwise(positions[:10]):
        ids = np.concatenate([ids, np.array(fed)[:, None]], 1)
        assert tuple(reference.logits(ids)[:, -1].argmax(-1)) == chosen


def test_models_are_compared_with_peers_in_turns(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(systems.GPU_PEERS, "wrong", None)  # type: ignore[arg-type]
    monkeypatch.setattr(system, "_RUN", 3)
    calls = [Call("decode", 20, 2), Call("prefill", 30)]
    first, *entries = models.measure(demo_artifact, "cpu", calls, ["torch", "transformers", "wrong"], None, 0.0)
    assert list(first["failed"]) == ["wrong"]
    assert [entry["phase"] for entry in entries] == ["decode", "prefill"]
    for entry in entries:
        assert set(entry["seconds"]) == {"tvm_attn", "torch", "transformers"} and not entry["failed"]
        for name, ratio in entry["of"].items():
            assert ratio == pytest.approx(entry["seconds"][name] / entry["seconds"]["tvm_attn"])
        count = 2 if entry["phase"] == "decode" else 30
        assert entry["tokens_per_second"]["tvm_attn"] == pytest.approx(count / entry["seconds"]["tvm_attn"])


def test_graphs_and_loading_are_checked(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_TOKENS", 3)
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "1")
    graphs = list(models.compare_graph(demo_artifact, "cpu"))
    assert [(entry["same"], entry["sequences"], entry["passed"]) for entry in graphs] == [
        *((1, 1, True), (3, 3, True), (22, 22, True))
    ]
    (entry,) = models.measure_load(demo_artifact, "cpu", runs=1)
    assert 0 < entry["load_seconds"] < entry["first_token_seconds"] < entry["process_seconds"]


class FakeLibrary:
    """Layers computed by PyTorch, in place of kernels."""

    kernels: ClassVar[dict[str, dict[str, Any]]] = {
        "qkv": {"family": "qkv_linear", "in_features": 32, "out_features": 96, "heads": 2, "context": 8},
        "mlp in": {"family": "linear", "in_features": 32, "out_features": 24, "activation": "gelu_new"},
        "mlp out": {"family": "residual_linear", "in_features": 32, "out_features": 24},
        "head": {"family": "head", "in_features": 32, "out_features": 24},
        "attention": {"heads": 2, "head_dim": 16, "context": 24, "scale": 0.25},
    }

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong

    def timed_function(self, purpose: str) -> tuple[Any, dict[str, Any]]:
        kernel = {"rows": 8, "dtype": "float16", "activations": "float16", "family": "", **self.kernels[purpose]}
        return lambda *tensors: self._call(kernel, *map(torch.from_dlpack, tensors)), kernel

    def _call(self, kernel: dict[str, Any], *tensors: torch.Tensor) -> None:
        out = tensors[-1]
        if "heads" in kernel and kernel["family"] == "":
            q, cache = tensors[0].reshape(-1, kernel["context"], 2, 16).transpose(1, 2).float(), tensors[1].float()
            result = torch.nn.functional.scaled_dot_product_attention(
                q, cache[:, 0], cache[:, 1], is_causal=True, scale=kernel["scale"]
            )
            out.copy_(result.transpose(1, 2).reshape(out.shape))
        else:
            product = tensors[0].float() @ tensors[1][:, :, 0].float().T
            if kernel["family"] != "head":
                product += tensors[2]
            if kernel["family"] == "linear":
                product = torch.nn.functional.gelu(product, approximate="tanh")
            if kernel["family"] == "residual_linear":
                product += tensors[3]
            if kernel["family"] == "qkv_linear":
                slots, places, cache = (tensor for tensor in tensors[3:6])
                parts_ = product[..., 32:].reshape(-1, 2, kernel["heads"], 16)
                cache[slots.flatten().long(), :, :, places.flatten().long()] = parts_.to(cache.dtype)
                product = product[..., :32]
            out.copy_(product)
        if self.wrong:
            out[0, 0, 0] += 30


@pytest.fixture
def short_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "in_turns", lambda clock, calls: {name: 0.5 * (i + 1) for i, name in enumerate(calls)})
    purposes = ("qkv", "mlp in", "mlp out", "head")
    monkeypatch.setattr(timing, "products", lambda quick: [timing.Product(purpose, 24) for purpose in purposes])


@pytest.mark.usefixtures("short_clock")
@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_are_checked_before_they_are_timed(wrong: bool) -> None:
    library: Any = FakeLibrary(wrong)
    entries = [*timing.compare_products(library, "cpu", False), *timing.compare_attention(library, "cpu", (1, 2))]
    assert len(entries) == 6
    for entry in entries:
        assert entry["passed"] is not wrong, entry
    product, attention = entries[0], entries[-1]
    assert product["of_cublas"] == 2.0 and product["of_torch"] == 3.0
    assert product["tflops"] == pytest.approx(2 * 24 * 32 * 96 / 0.5 / 1e12)
    # PyTorch has a flash backend for processors, but no cuDNN.
    assert attention["of"]["flash"] == 2.0 and "cudnn" in attention["missing"]
    assert attention["tflops"]["ours"] == pytest.approx(4 * 2 * 2 * 16 * 24 * 25 / 2 / 0.5 / 1e12)


# ---- figures, tables, the command ----


def entries() -> Iterator[dict[str, Any]]:
    """A run with round figures."""
    yield {"what": "device", "name": "Some GPU"}
    yield {"what": "kernel", "nmse": math.nan, "passed": True}
    product = {"what": "product", "dtype": "float16", "m": 8192, "k": 8192, "n": 8192, "tflops": 440.0}
    product |= {"cublas_tflops": 800.0, "of_cublas": 0.55, "of_torch": 0.56}
    yield {**product, "purpose": "matmul 8192 float16"}
    yield {**product, "purpose": "matmul 8192 bfloat16", "m": 1024}
    yield {**product, "purpose": "head", "m": 1024, "of_cublas": 0.79}
    yield {"what": "attention", "batch": 1, "tflops": {"ours": 200.0, "flash": 190.0}, "of": {"flash": 200 / 190}}
    model = {"what": "model", "artifact": "gpt2", "phase": "decode", "dtype": "float16", "quantization": "none"}
    model |= {"device": "cuda"}
    model |= {"tokens": 128, "batch": 1, "parameters": 124e6, "of_limit": 0.5, "seconds": {"tvm_attn": 1.7e-4}}
    yield {**model, "tokens_per_second": {"tvm_attn": 5882.0}, "of": {"torch": 4.0, "transformers": 2.9}}
    yield {**model, "device": "vulkan", "tokens_per_second": {"tvm_attn": 9000.0}, "of": {"cuda:0": 0.5}}
    yield {**model, "tokens": 1000, "tokens_per_second": {"tvm_attn": 4000.0}, "of": {}}
    yield {
        **model,
        "parameters": 1558e6,
        "of_limit": 0.6,
        "tokens_per_second": {"tvm_attn": 900.0},
        "of": {"torch": 3.5},
    }
    load = {"what": "load", "parameters": 124e6, "dtype": "float16", "quantization": "none"}
    yield {**load, "first_token_seconds": 2.5}
    yield {**load, "first_token_seconds": 1.5}


def test_figures_stand_beside_what_was_reached() -> None:
    results = {(f["work"], f["unit"]): f for f in (figure.result(list(entries())) for figure in figures.FIGURES)}
    reached = {key: (figure["reached"], figure["met"]) for key, figure in results.items()}
    assert reached["matmul 8192^3, float16", "of cuBLAS"] == (0.55, True)
    assert reached["matmul 8192^3, bfloat16", "of cuBLAS"] == (None, None)  # the product is too small
    assert reached["head of 124M, 1024 rows", "of cuBLAS"] == (0.79, False)
    assert reached["causal attention, 12 heads x 1024, batch 1", "of SDPA flash"][1] is True
    assert reached["causal attention, 12 heads x 1024, batch 16", "of SDPA flash"] == (None, None)
    assert reached["decode 124M, float16, batch 1", "tokens/s"] == (5882.0, True)
    assert reached["decode 124M, float16, batch 1", "x eager"] == (2.9, False)
    assert reached["decode 1.5B, float16, batch 1", "of bandwidth"] == (0.6, True)
    assert reached["decode 124M, float16, batch 64", "tokens/s"] == (None, None)
    assert reached["load of 124M to the first token", "s"] == (1.5, True)


def test_the_command_prints_and_writes_what_its_parts_found(
    kernel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [json.dumps(entry) for entry in entries()]  # NaN as Python writes it
    lines = {"device": found[:1], "kernels": found[1:2], "products": found[2:], "attention": []}

    def command(args: Any, part: str, limit: float) -> list[str]:
        return python(
            f"print({chr(10).join(lines[part])!r})" + ("; raise SystemExit('lost')" if part == "attention" else "")
        )

    monkeypatch.setattr(gpu, "_command", command)
    path = tmp_path / "results" / "gpu.json"
    path.parent.mkdir()
    arguments = ["--artifacts", str(tmp_path), "--kernels", str(kernel_folder), "--json", str(path)]
    assert gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "passed in" in printed and "not measured" in printed and "lost (exit status 1)" in printed
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["device"] == {"what": "device", "name": "Some GPU"} and written["failed"] is False
    assert written["parts"]["kernels"]["entries"] == [{"what": "kernel", "nmse": None, "passed": True}]
    assert [figure["met"] for figure in written["figures"]].count(True) == 6
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]
    lines["kernels"] = [json.dumps({"what": "kernel", "passed": False})]
    assert gpu.main([*arguments, "--only", "kernels"]) == 1
    assert list(json.loads(path.read_text())["parts"]) == ["kernels"]


def test_parts_run_in_the_command_itself(kernel_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", "kernels", "--seconds", "60", "--device", "cpu"]
    outcome = run_child([*command, "--kernels", str(kernel_folder), "--artifacts", str(tmp_path)], 60)
    assert outcome.error is None
    assert [entry["passed"] for entry in outcome.entries] == [True] * 4
    assert outcome.entries[-1] == {"what": "kernels", "ran": 3, "cases": 3, "passed": True}


def test_no_device_is_one_line(kernel_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cuda:99", "--kernels", str(kernel_folder), "--artifacts", str(tmp_path)]
    assert gpu.main([*arguments, "--json", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: device cuda:99: ")
    assert not (tmp_path / "gpu.json").exists()


_SLOW = """
import json, sys, time
from benchmarks.gpu import __main__ as gpu, parts

def command(args, part, limit):
    code = "import time; print('{\\"passed\\": true}', flush=True); time.sleep(60 * (sys.argv[1] == 'slow'))"
    return [sys.executable, "-c", "import sys; " + code, part]

gpu._command = command
parts.plan = lambda *_: [parts.Part("quick", 30, True), parts.Part("slow", 60)]
sys.exit(gpu.main(["--json", sys.argv[1], "--artifacts", sys.argv[1] + ".none", "--kernels", sys.argv[1] + ".none"]))
"""


def test_what_was_measured_is_written_when_the_command_is_terminated(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    process = subprocess.Popen([*python(_SLOW), str(path)], stdout=subprocess.PIPE, text=True)

    def written() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text())["parts"] if path.is_file() else {}
        return found

    while not written().get("slow", {}).get("entries"):  # written before the part ends
        assert process.poll() is None
        time.sleep(0.05)
    assert written()["quick"]["error"] is None
    process.terminate()
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 143
    assert "terminated in" in printed and "Figures to reach" in printed
    assert written()["slow"]["error"] == "interrupted" and written()["slow"]["entries"] == [{"passed": True}]


def test_nothing_to_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--artifacts", str(tmp_path), "--kernels", str(tmp_path)]) == 2
    assert "neither artifacts for CUDA" in capsys.readouterr().err


def test_tables_fit_their_width() -> None:
    part = {"error": None, "seconds": 1.0, "entries": list(entries()), "correctness": True}
    result = gpu.summary({"all": part}, False, 1.0)
    console = Console(width=160)
    with console.capture() as capture:
        for table in figures.tables(result):
            console.print(table)
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["head", "float16", "1024", "8192", "8192", "440", "800", "0.79", "0.56"] in lines
    assert ["1", "flash", "190", "1.05"] in lines
    assert ["gpt2", "cuda", "decode", "128", "x", "1", "tvm_attn", "0.170", "5882", "-", "0.50"] in lines


def test_peers_on_cuda_are_pytorch() -> None:
    assert parse_peer("torch-graph", "int8", "cuda:0") == ("torch-graph", "float16")
    assert parse_peer("torch:bfloat16", "float16", "cuda:0") == ("torch", "bfloat16")
    for wrong in ("llamacpp", "torch:int8"):
        with pytest.raises(BenchmarkError):
            parse_peer(wrong, "float16", "cuda:0")


def test_a_peer_on_the_same_device_is_the_same_model(demo_artifact: Path) -> None:
    ours = CompiledSystem(demo_artifact, 1, 2)
    peer = GpuPeer("torch", "float32", ours)
    assert check_same_model("torch", ours, peer).agreement.nmse < 1e-9
    call = Call("decode", 250, 2)
    peer.fill(call)
    assert len(peer.time(call, 0.0)) >= 2
    with pytest.raises(PeerUnavailable, match="torch-graph: "):
        GpuPeer("torch-graph", "float32", ours).logits(np.arange(5, dtype=np.int32))
