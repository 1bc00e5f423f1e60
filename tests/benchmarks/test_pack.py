"""The bundle for machines without TVM: packed, unpacked, and run by a Python that has only NumPy."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_attn
from benchmarks import pack, pack_run
from benchmarks.restore import restore_params
from tvm_attn.compiler.artifact import packed_first, write_manifest, write_params
from tvm_attn.errors import ArtifactError, BenchmarkError
from tvm_attn.model.checkpoint import RANDOM_SOURCE, random_params
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.vulkan import LIBRARY

PROMPT = "Return the"


@pytest.fixture(scope="module")
def random_artifact(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's library with random weights."""
    folder = tmp_path_factory.mktemp("random") / "random"
    shutil.copytree(demo_artifact, folder)
    shutil.rmtree(folder / "params")
    write_params(folder, packed_first(random_params(Artifact(demo_artifact).config)))
    write_manifest(folder, json.loads((folder / "manifest.json").read_bytes()) | {"weights": RANDOM_SOURCE})
    return folder


@pytest.fixture(scope="module")
def bundle(demo_artifact: Path, random_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked bundle with both artifacts."""
    folder = tmp_path_factory.mktemp("bundle")
    archive = folder / "packed" / "tvm-attn.tar"  # compressing takes seconds
    arguments = [str(demo_artifact), str(random_artifact), "--out", str(archive), "--limit", "100"]
    assert pack.main(arguments) == 0
    assert list(archive.parent.iterdir()) == [archive]
    with tarfile.open(archive) as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    archive.unlink()
    return folder / pack.TOP


@pytest.fixture(scope="module")
def numpy_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A separate Python that has NumPy and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    installed = Path(np.__file__).parent
    for source in (installed, installed.with_name("numpy.libs")):
        if source.is_dir():
            (packages / source.name).symlink_to(source)
    return folder / "bin" / "python"


def _run(python: Path, bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(bundle / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin:/bin"}, cwd="/")


def test_a_bundle_holds_every_module(bundle: Path) -> None:
    package = Path(tvm_attn.__file__).parent
    assert (bundle / "benchmarks" / "gpu").is_dir() and not (bundle / "benchmarks" / "pack.py").exists()
    packed = {path.relative_to(bundle / "tvm_attn") for path in (bundle / "tvm_attn").rglob("*.py")}
    assert packed == {path.relative_to(package) for path in package.rglob("*.py")}


def test_generating_in_a_bundle_needs_numpy_alone(bundle: Path, numpy_python: Path, demo_artifact: Path) -> None:
    done = _run(numpy_python, bundle, "-m", "tvm_attn.generate", "artifacts/artifact", "--prompt", PROMPT)
    assert done.returncode == 0, done.stderr
    assert "making the parameters of artifacts/random" in done.stderr
    assert "not bit for bit" not in done.stderr
    expected = tvm_attn.load(demo_artifact, device="cpu").generate(PROMPT, max_new_tokens=64).text
    assert done.stdout.startswith(PROMPT) and expected[:60] in done.stdout


def test_random_parameters_are_made_anew(bundle: Path, numpy_python: Path, random_artifact: Path) -> None:
    code = "import sys, json, tvm_attn; model = tvm_attn.load('artifacts/random', 'cpu'); import tvm.base; "
    code += "print(json.dumps([model.logits([[1, 2, 3]])[0, -1, :9].tolist(), tvm.base._RUNTIME_ONLY, sys.prefix]))"
    done = _run(numpy_python, bundle, "-c", code)
    assert done.returncode == 0, done.stderr
    logits, runtime_only, prefix = json.loads(done.stdout)
    assert runtime_only and Path(prefix) == numpy_python.parents[1]
    wanted = tvm_attn.load(random_artifact, "cpu").logits([[1, 2, 3]])[0, -1, :9]
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)


def test_checking_and_measuring_need_the_runtime_alone() -> None:
    code = """
from tvm_attn import bench, verify
from tvm_attn.benchmark import report, session
from benchmarks import restore
from benchmarks.gpu import cases, models, parts, systems, timing
from tvm_attn.compiler import verification
with open("/proc/self/maps") as maps:
    assert "libtvm_runtime" in (text := maps.read()) and "libtvm_compiler" not in text
"""
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


def test_commands_say_what_a_machine_lacks(bundle: Path, numpy_python: Path) -> None:
    done = _run(numpy_python, bundle, "-m", "tvm_attn.verify", "artifacts/artifact", "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs PyTorch" in done.stderr
    facts = json.loads((bundle / "bundle.json").read_text())
    assert "serves CPython 3.7" in pack_run._problem({**facts, "pythons": ["3.7"]})
    assert "is for linux-m68k" in pack_run._problem({**facts, "platform": "linux-m68k"})
    assert pack_run._problem(facts) == ""


def test_packages_that_the_machine_has_are_its_own() -> None:
    facts = {"extra": {"rich": "rich", "one": "no_such_module", "two": "no_such_package.module"}}
    paths = pack_run.environment(facts, {"PYTHONPATH": "/given"})["PYTHONPATH"].split(":")
    assert [path.removeprefix(str(pack_run.ROOT)) for path in paths] == [
        "",
        "/site",
        "/extra/one",
        "/extra/two",
        "/given",
    ]


def test_a_bundle_has_neither_the_compiler_nor_parameters_that_can_be_made(bundle: Path) -> None:
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*")}
    assert {"run.py", "site/tvm/lib/libtvm_runtime.so", "tvm_attn/runtime/engine.py", "docs/cuda.md"} <= names
    assert not any("libtvm_compiler" in name or name.endswith("/3rdparty") for name in names)
    (described,) = (bundle / "site").glob("tvm_attn-*.dist-info")
    assert "tvm_attn_vulkan = tvm_attn.vulkan:autoload" in (described / "entry_points.txt").read_text()
    assert (bundle / "tvm_attn/vulkan" / LIBRARY.name).exists() == LIBRARY.exists()
    packed = json.loads((bundle / "bundle.json").read_text())["artifacts"]
    assert packed == [{"name": "artifact", "parameters": "packed"}, {"name": "random", "parameters": "restored"}]


def test_an_archive_above_the_limit_is_refused_with_the_sizes(tmp_path: Path) -> None:
    (tmp_path / "top" / "artifacts" / "large").mkdir(parents=True)
    (tmp_path / "top" / "artifacts" / "large" / "lib.so").write_bytes(np.random.default_rng(0).bytes(2**20))
    with pytest.raises(BenchmarkError, match=r"1\.0 MiB, more than 0\.5; uncompressed: artifacts/large 1\.0"):
        pack.write_archive(tmp_path / "top", tmp_path / "out.tar.xz", 0.5, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["top"]


def test_wheels_of_another_python_are_needed(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"has no wheel of apache_tvm_ffi .* for Python 3\.99"):
        pack.collect_packages(tmp_path / "top", ("3.99",), tmp_path, tmp_path)


def test_other_bits_change_the_manifest_and_nothing_else(
    random_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(random_artifact, tmp_path / "random")
    assert not restore_params(folder).written
    shutil.rmtree(folder / "params")

    def altered(config: Any) -> Any:
        for name, array in random_params(config):
            yield name, array + np.float32(1e-3) if name == "wpe.weight" else array

    before = Artifact(folder).manifest
    monkeypatch.setattr("benchmarks.restore.random_params", altered)
    restored = restore_params(folder)
    assert restored.written and restored.different and all(name.startswith("params/") for name in restored.different)
    after = Artifact(folder)
    for name in after.manifest["files"]:
        after.read(name)
    kept = {name for name in before["files"] if before["files"][name] == after.manifest["files"][name]}
    assert set(before["files"]) - kept == set(restored.different)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in random_artifact.iterdir())


def test_weights_of_a_checkpoint_cannot_be_made(demo_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo_artifact, tmp_path / "demo")
    shutil.rmtree(folder / "params")
    with pytest.raises(ArtifactError, match="only their checkpoint can give"):
        restore_params(folder)
