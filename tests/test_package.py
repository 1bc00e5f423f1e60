"""The distribution: what the wheel holds, and that it works away from the source tree."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tvm_attn
from tvm_attn._resources import resource_dir
from tvm_attn.errors import TvmAttnError

ROOT = Path(__file__).parents[1]
DATA_FOLDERS = ("targets", "schedules", "models/demo")
VULKAN_RUNTIME = "tvm_attn/vulkan/libtvm_attn_vulkan.so"
VULKAN_SOURCES = "tvm_attn/vulkan/src/"


def run(*command: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command away from the source tree and require its exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def files_under(folder: str) -> set[str]:
    """The files of a folder of the source tree, relative to its root, less Python's caches."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree. The build writes nothing into the tree and fetches nothing."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=folder)
    (built,) = folder.glob("tvm_attn-*.whl")
    return built


@pytest.fixture(scope="module")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh virtual environment that holds the wheel and sees this environment's dependencies."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *options, wheel, cwd=venv.parent)
    # Appended after the new environment's own packages, and without the .pth file of an editable install there.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    outer = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (site_packages / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    return python


def test_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    # An editable install puts the runtime into the tree; the wheel holds one of its own.
    expected = {path for path in files_under("tvm_attn") if not path.startswith((VULKAN_RUNTIME, VULKAN_SOURCES))}
    for folder in DATA_FOLDERS:
        data = files_under(folder)
        assert data, f"{folder} is empty"
        expected |= {f"tvm_attn/_data/{path}" for path in data}
    assert held - {VULKAN_RUNTIME} == expected


def test_wheel_holds_the_vulkan_runtime(wheel: Path, tmp_path: Path) -> None:
    if not (shutil.which("cmake") and Path("/usr/include/vulkan/vulkan_core.h").is_file()):
        pytest.skip("what the Vulkan runtime is built with is missing: install cmake and libvulkan-dev")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(VULKAN_RUNTIME, tmp_path)
    # A platform's wheel, for every Python; the library is bound to TVM, not to libvulkan.
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert not wheel.name.endswith("-any.whl")
    needed = run("readelf", "-d", library, cwd=tmp_path).stdout
    assert "[libtvm_runtime.so]" in needed
    assert "[libtvm_ffi.so]" in needed
    assert "libvulkan" not in needed


def test_wheel_without_the_tools_has_no_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build goes on and says so; pip shows it with -v."""
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ("-v", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", tmp_path)
    done = run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=tmp_path)
    assert "built without the Vulkan runtime: missing cmake" in done.stdout + done.stderr
    (built,) = tmp_path.glob("tvm_attn-*-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        assert VULKAN_RUNTIME not in archive.namelist()


@pytest.mark.parametrize("runtime_only", ["0", "1"])
def test_installed_wheel_registers_the_vulkan_backend(
    wheel: Path, installed_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime_only: str
) -> None:
    """`import tvm` is enough, with the compiler and without; nothing of the code generator is imported."""
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", runtime_only)
    code = """
import sys
import tvm
from tvm_ffi import get_global_func
names = ("target.build.vulkan", "device_api.vulkan", "ffi.Module.load_from_bytes.vulkan", "runtime.timer.vulkan")
print(*(get_global_func(name, allow_missing=True) is not None for name in names))
print(tvm.base._RUNTIME_ONLY, "tvm_attn.vulkan" in sys.modules, "tvm_attn.vulkan.codegen" in sys.modules)
"""
    registered, modules = run(installed_python, "-c", code, cwd=tmp_path).stdout.splitlines()
    with zipfile.ZipFile(wheel) as archive:
        built = VULKAN_RUNTIME in archive.namelist()
    assert registered.split() == ["True", *[str(built)] * 3]
    assert modules.split() == [str(runtime_only == "1"), "True", "False"]


def test_the_package_needs_nothing_beside_it() -> None:
    """benchmarks/ and tests/ are in no wheel."""
    for path in files_under("tvm_attn"):
        if path.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {name.partition(".")[0] for name in names} & {"benchmarks", "tests", "models"}, path


def test_installed_wheel_has_one_command(installed_python: Path, tmp_path: Path) -> None:
    script = installed_python.with_name("tvm-attn")
    page = run(script, "--help", cwd=tmp_path).stdout
    assert page == run(installed_python, "-m", "tvm_attn", cwd=tmp_path).stdout
    assert run(script, "--version", cwd=tmp_path).stdout == f"tvm-attn {tvm_attn.__version__}\n"
    line = run(installed_python, "-c", "import tvm_attn, benchmarks", cwd=tmp_path, status=1).stderr.splitlines()[-1]
    assert line == "ModuleNotFoundError: No module named 'benchmarks'"
    compare = run(script, "bench", "dist/x", "--against", "torch", cwd=tmp_path, status=2).stderr
    assert "from a checkout of the sources: python -m benchmarks.compare dist/x --against torch" in compare


@pytest.mark.slow
def test_installed_wheel_builds_and_generates(installed_python: Path, tmp_path: Path) -> None:
    code = "import tvm_attn, tvm_attn._resources as r; print(tvm_attn.__file__); print(r.resource_dir('models/demo'))"
    package, demo = map(Path, run(installed_python, "-c", code, cwd=tmp_path).stdout.splitlines())
    venv = installed_python.parents[1]
    assert package.is_relative_to(venv)
    assert demo.is_relative_to(venv)

    artifact = tmp_path / "artifact"
    script = installed_python.with_name("tvm-attn")
    built = run(script, "build", "--model", demo, "--target", "cpu", "--out", artifact, cwd=tmp_path)
    prompt = "Return the"
    generated = run(script, "generate", artifact, "--prompt", prompt, "--max-new-tokens", "5", cwd=tmp_path)

    assert generated.stdout.startswith(prompt)
    assert len(generated.stdout.strip()) > len(prompt)
    for done in (built, generated):
        assert "warning" not in done.stderr.lower()


@pytest.mark.parametrize("name", DATA_FOLDERS)
def test_a_checkout_uses_its_own_data(name: str) -> None:
    assert resource_dir(name) == ROOT / name


def test_missing_data_folder_is_named() -> None:
    with pytest.raises(TvmAttnError, match=r"data folder .*nowhere is missing: .*reinstall"):
        resource_dir("nowhere")
