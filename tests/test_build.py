"""The build and verify commands: how they end, what they print, and `tvm_attn.build` as a function."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tvm_attn
from tvm_attn import build, generate, targets, verify
from tvm_attn.compiler import build as building
from tvm_attn.compiler import verification
from tvm_attn.compiler.verification import Bounds
from tvm_attn.config import GPT2Config
from tvm_attn.errors import CheckpointError, CompileError, TargetError
from tvm_attn.model import weights
from tvm_attn.model.checkpoint import CheckpointUnavailable
from tvm_attn.runtime.artifact import Artifact

TINY = GPT2Config(vocab_size=60, n_positions=9, n_embd=16, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None)


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing else was printed."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def ready_library(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler hands out the library that the demo artifact has, which saves seconds."""
    (library,) = demo_artifact.glob("*.so")
    monkeypatch.setattr(
        building, "compile_program", lambda program, target, path, *_: shutil.copy(library, path) and {}
    )


# --- arguments ---


@pytest.mark.parametrize("command", [build, verify])
def test_help(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    name = command.__name__.split(".")[-1]
    assert printed.out.startswith(f"usage: tvm-attn {name}")
    assert printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--target"),
        (["--target", "cpu", "--dtype", "float8"], "'float8'"),
        (["--target", "cpu", "--quant", "int2"], "'int2'"),
        (["--target", "cpu", "--frobnicate"], "--frobnicate"),
    ],
)
def test_misused_options(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(arguments) == 2
    line = error_line(capsys)
    assert named in line and line.endswith("; see tvm-attn build --help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--target", "cpu-8086"],
            f"unknown target 'cpu-8086'; known targets: {', '.join(sorted({'cpu', 'vulkan', *targets.names()}))}",
        ),
        (["--target", ""], "unknown target ''"),
        (["--target", "../targets/cpu-x86-64"], "unknown target '../targets/cpu-x86-64'"),
        (["--target", "cpu-x86-64, cpu-x86-64"], "named twice"),
        (["--target", "cpu,"], "unknown target ''"),
        (["--target", "cpu", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--target", "cpu", "--model", "nobody/nothing"], "nobody/nothing"),
        (["--target", "cpu", "--model", "gpt3"], "gpt3"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build.main(arguments) == 2
    assert message in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_dtype_that_the_target_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    only = replace(targets.detect_cpu(), dtypes=("float32",))
    monkeypatch.setattr(targets, "resolve", lambda name: only)
    with pytest.raises(TargetError, match=f"'bfloat16' is not available for {only.name}; available: float32"):
        tvm_attn.build("demo", "cpu", "bfloat16")


@pytest.mark.parametrize("quant", ["int2", "", None])
def test_unknown_quantization(quant: Any) -> None:
    with pytest.raises(TargetError, match=r"quantization .* is not available; available: none"):
        tvm_attn.build("demo", "cpu", quant=quant)


# --- the compiler ---


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "/bin/false"])
def test_no_cxx_compiler_that_works(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setitem(weights.PRESETS, "gpt2", TINY)
    with pytest.raises(CompileError) as error:
        tvm_attn.build("gpt2", "cpu", out=tmp_path / "artifact", random_weights=True)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def unavailable(model: Any, **_options: Any) -> None:
    raise CheckpointUnavailable(f"{model} is not on this machine;\nget it with a network")


def test_published_size_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails, says how to go on, and touches nothing; random weights are taken when they are asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "open_checkpoint", unavailable)
    monkeypatch.setitem(weights.PRESETS, "gpt2-xl", TINY)
    assert build.main(["--model", "gpt2-xl", "--target", "cpu"]) == 2
    assert error_line(capsys).endswith("get it with a network; or measure its speed with --random-weights")
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointUnavailable):
        tvm_attn.build("somebody/something", "cpu")


def test_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled and checked, in dist/MODEL-random; before it begins a note says what they are good for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "open_checkpoint", unavailable)
    monkeypatch.setitem(weights.PRESETS, "gpt2-xl", TINY)
    assert build.main(["--model", "gpt2-xl", "--target", "cpu", "--random-weights"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("note: random weights: ") and "no tokenizer" in printed.err.splitlines()[0]
    assert printed.out.splitlines()[-1].startswith("built dist/gpt2-xl-random (random weights, seed 0, float32) in ")
    artifact = Artifact(tmp_path / "dist" / "gpt2-xl-random")
    assert artifact.config == TINY
    assert artifact.tokenizer_json() is None
    model = tvm_attn.load(artifact.folder)
    assert len(model.generate([1, 2], max_new_tokens=3).token_ids) == 3
    assert generate.main(["dist/gpt2-xl-random", "--prompt", "text"]) == 2
    assert "--prompt-ids 1,2,3" in error_line(capsys)


def test_random_weights_of_a_folder_take_its_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()), encoding="utf-8")
    opened = weights.open_weights(tmp_path, random=True)
    assert opened.config == TINY and opened.checkpoint is None
    with pytest.raises(CheckpointError, match="neither a folder nor one of gpt2, gpt2-medium"):
        weights.open_weights("somebody/something", random=True)


def test_a_checkpoint_without_a_tokenizer_is_noted(
    ready_library: None, demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(demo_model_dir / name, tmp_path)
    arguments = ["--model", str(tmp_path), "--target", "cpu", "--out", str(tmp_path / "artifact"), "--no-verify"]
    assert build.main(arguments) == 0
    assert capsys.readouterr().err.startswith("note: the checkpoint has no tokenizer")


def test_what_a_checkpoint_says_of_generation(ready_library: None, demo_model_dir: Path, tmp_path: Path) -> None:
    """End tokens become the artifact's, sampling is recorded for whom asks, and what is left out is noted."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in demo_model_dir.iterdir():
        if file.name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / file.name).symlink_to(file)
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    settings = {"eos_token_id": [end, 55], "do_sample": True, "temperature": 0.5, "num_beams": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 2048}))
    built = tvm_attn.build(folder, "cpu", out=tmp_path / "out", verify=False)
    assert built.notes[0] == "generation_config.json also sets num_beams, which tvm_attn does not have"
    assert "no embedding for ('[PAD]')" in built.notes[1]
    artifact = Artifact(tmp_path / "out")
    assert artifact.config.eos_token_ids == (end, 55)
    assert artifact.generation == {"temperature": 0.5, "top_k": 50}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "temperature": -1}))
    built = tvm_attn.build(folder, "cpu", out=tmp_path / "out", verify=False)
    assert "sampling settings of generation_config.json are left out: temperature is -1" in built.notes[2]
    assert Artifact(tmp_path / "out").generation == {}
    # Code is compiled for no particular tokens: the other model's library runs here.
    model = tvm_attn.load(tmp_path / "out")
    assert (model.config.eos_token_ids, model.generation_config) == ((end, 55), {})


@pytest.mark.parametrize(("model", "name"), [(".", "checkpoint"), ("..", "deep"), ("../checkpoint/", "checkpoint")])
def test_default_folder_has_the_checkpoints_name(
    model: str, name: str, ready_library: None, demo_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "checkpoint"
    folder.mkdir(parents=True)
    for file in demo_model_dir.iterdir():
        (folder if name == "checkpoint" else folder.parent).joinpath(file.name).symlink_to(file)
    monkeypatch.chdir(folder)
    assert tvm_attn.build(model, "cpu", verify=False).folder == Path("dist") / name
    assert (folder / "dist" / name / "manifest.json").is_file()


def test_demo_can_be_built_beside_an_artifact_of_its_name(
    ready_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert tvm_attn.build("demo", "cpu", out="demo", verify=False).folder == Path("demo")


def test_checkpoint_as_old_ones_are(
    ready_library: None, demo_model_dir: Path, demo_artifact: Path, tmp_path: Path
) -> None:
    """Shards, the prefix, mask buffers, vocab.json and merges.txt: the same artifact comes out."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(demo_model_dir / "config.json", folder)
    bpe = json.loads((demo_model_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe["merges"]), "utf-8")
    tensors = load_file(demo_model_dir / "model.safetensors")
    tensors = {f"transformer.{name.removeprefix('transformer.')}": array for name, array in tensors.items()}
    mask = np.tril(np.ones((1, 1, 256, 256), np.float32))
    tensors |= {f"transformer.h.{layer}.attn.bias": mask for layer in range(6)}
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    built = tvm_attn.build(folder, "cpu", out=tmp_path / "artifact", verify=False)
    assert built.notes == ()
    shard = "params/params_shard_0.bin"
    assert (built.folder / shard).read_bytes() == (demo_artifact / shard).read_bytes()
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.8, "seed": 1}
    assert tvm_attn.load(built.folder).generate("Return the", **options) == tvm_attn.load(demo_artifact).generate(
        "Return the", **options
    )


# --- output ---


def test_json_of_a_real_process(demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but one line of JSON, neither warnings nor progress."""
    out = tmp_path / "artifact"
    done = python("-m", "tvm_attn.build", "--model", demo_model_dir, "--target", "cpu", "--out", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["artifact"] == str(out)
    assert result["weights"] == str(demo_model_dir)
    assert result["seconds"] > 0
    assert result["notes"] == []
    ((target, report),) = result["verification"].items()
    assert target == targets.detect_cpu().name
    assert all(check["passed"] for check in report["checks"])

    assert verify.main([str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [(check["function"], check["case"]) for check in again["checks"]] == [
        (check["function"], check["case"]) for check in report["checks"]
    ]


def test_tables(ready_library: None, demo_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "artifact"
    assert build.main(["--model", str(demo_model_dir), "--target", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert {"reading the checkpoint", "writing the parameters"} <= set(printed.err.splitlines())
    lines = printed.out.splitlines()
    assert lines[0].strip() == f"{targets.detect_cpu().name} against PyTorch"
    assert sum(line.rstrip().endswith(" ok") for line in lines) == 18
    assert not any("FAILED" in line for line in lines)
    assert any(line.startswith("bounds: NMSE 1e-11, max abs / RMS 1e-04; PyTorch's own") for line in lines)
    assert lines[-1].startswith(f"built {out} ({demo_model_dir}, float32) in ")
    assert verify.main([str(out)]) == 0
    again = capsys.readouterr()
    assert "checking logits, 7 tokens" in again.err.splitlines()
    assert sum(line.rstrip().endswith(" ok") for line in again.out.splitlines()) == 18


def test_without_verification(
    ready_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    out = tmp_path / "artifact"
    assert build.main(["--model", "demo", "--target", "cpu", "--out", str(out), "--no-verify", "--json"]) == 0
    (verification_result,) = json.loads(capsys.readouterr().out)["verification"].values()
    assert verification_result is None
    assert json.loads((out / "manifest.json").read_bytes())["libraries"][0]["verification"] is None


def test_without_pytorch(
    ready_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A build goes on and tells that nothing was checked; the verify command cannot."""
    monkeypatch.setitem(sys.modules, "torch", None)
    out = tmp_path / "artifact"
    assert build.main(["--model", "demo", "--target", "cpu", "--out", str(out)]) == 0
    assert "note: not checked" in capsys.readouterr().err
    assert verify.main([str(out)]) == 2
    assert "pip install torch" in error_line(capsys)


# --- verify ---


def test_verify_of_a_library_that_is_out_of_bounds(
    demo_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is printed all the same, and shows which."""
    monkeypatch.setitem(verification.BOUNDS, "float32", Bounds(nmse=1e-11, max_abs=0.0))
    assert verify.main([str(demo_artifact)]) == 2
    printed = capsys.readouterr()
    assert sum(line.rstrip().endswith("FAILED") for line in printed.out.splitlines()) == 18
    line = printed.err.splitlines()[-1]
    assert line.startswith(f"error: {demo_artifact} disagrees with PyTorch in 18 of 18 checks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/nowhere/at/all"], "no such folder: /nowhere/at/all"),
        (["DEMO", "--device", "tpu"], "unknown device 'tpu'"),
        (["DEMO", "--device", "cuda:0"], f"build it again with --target {targets.detect_cpu().name},cuda"),
    ],
)
def test_verify_errors_are_one_line(
    options: list[str], message: str, demo_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(demo_artifact) if option == "DEMO" else option for option in options]) == 2
    assert message in error_line(capsys)


# --- the function ---


@pytest.mark.parametrize(
    "imports",
    [
        "import tvm_attn",
        "import tvm_attn, tvm_attn.build",
        "import tvm_attn.build, tvm_attn",
        "import tvm_attn; from tvm_attn import build; assert tvm_attn.build is build",
        "from tvm_attn.build import main; import tvm_attn",
    ],
)
def test_the_command_module_is_callable(imports: str) -> None:
    done = python("-c", f"{imports}; print(callable(tvm_attn.build), hasattr(tvm_attn.build, 'main'))")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "True True\n")


def test_calling_the_command_module_builds() -> None:
    code = """
import tvm_attn

def attempt():
    try:
        tvm_attn.build(model="demo", target="cpu-8086")
    except tvm_attn.TvmAttnError as error:
        print(type(error).__name__)

attempt()
import tvm_attn.build
attempt()
from tvm_attn.compiler.build import build
attempt()
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["TargetError"] * 3


def test_the_function_returns_what_was_built(ready_library: None, demo_model_dir: Path, tmp_path: Path) -> None:
    told: list[str] = []
    built = tvm_attn.build(model=demo_model_dir, target="cpu", out=tmp_path / "artifact", progress=told.append)
    assert built.folder == tmp_path / "artifact"
    assert built.source == str(demo_model_dir)
    assert built.notes == ()
    (report,) = built.reports.values()
    assert report is not None
    report.raise_if_failed("lib")
    assert told[0] == "reading the checkpoint"
    assert any(line.startswith("compiling for") for line in told)
