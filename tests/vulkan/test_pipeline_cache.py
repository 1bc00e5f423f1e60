"""The driver's pipeline cache on disk: whatever takes its place, kernels run and nothing else is touched."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import resource, tvm, numpy as np, tvm_ffi
from tvm_attn import vulkan as backend
backend.autoload()
x = tvm.runtime.tensor(np.ones(64, "float32"), tvm.vulkan(0))
module = tvm_ffi.get_global_func("tvm_attn.vulkan.create_module")(open({path!r}, "rb").read())
module["axpy"](x, x, x, 64, 2.0, 1, 64)
{before}
assert x.numpy().sum() == 192
"""


@pytest.fixture
def program(pack: Callable[..., bytes], axpy_record: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    """program(before="") is code that runs a kernel, does `before`, and waits, which saves the pipeline."""
    path = tmp_path / "axpy"
    path.write_bytes(pack(axpy_record))
    return lambda before="": PROGRAM.format(path=str(path), before=before)


@pytest.fixture
def use(
    vulkan: Any, program: Callable[..., str], run_python: Callable[..., Any], tmp_path: Path
) -> Callable[..., None]:
    """use(before="") runs the program in a process whose cache is in `tmp_path / "cache"`."""

    def run(before: str = "") -> None:
        done = run_python(program(before), XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tvm_attn" / "vulkan"


@pytest.fixture
def cache(use: Callable[..., None], folder: Path) -> Path:
    """A file that one process has written."""
    use()
    (path,) = folder.iterdir()
    assert path.read_bytes().startswith(b"TVMATTNC")
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    return path


@pytest.mark.parametrize("damage", ["short", "zeros", "last byte", "long", "empty", "huge"])
def test_a_damaged_file_is_ignored_and_replaced(cache: Path, use: Callable[..., None], damage: str) -> None:
    data = cache.read_bytes()
    damaged = {
        "short": data[:-1],
        "zeros": bytes(len(data)),
        "last byte": data[:-1] + bytes([data[-1] ^ 0xFF]),
        "long": data + b"x",
        "empty": b"",
        "huge": data[:8] + b"\xff" * 7 + b"\x0f" + data[16:],  # a length that is too large
    }[damage]
    cache.write_bytes(damaged)
    use()
    assert list(cache.parent.iterdir()) == [cache]
    assert cache.read_bytes() != damaged
    assert cache.read_bytes().startswith(b"TVMATTNC")


def _link(cache: Path, victim: Path) -> None:
    cache.unlink()
    cache.symlink_to(victim)


def _links_for_every_process(cache: Path, victim: Path) -> None:
    """At the paths of temporary files, if those were named after the cache and the process's number."""
    cache.unlink()
    for process in range(os.getpid(), os.getpid() + 5000):
        Path(f"{cache}.{process}").symlink_to(victim)


def _fifo(cache: Path, victim: Path) -> None:
    cache.unlink()
    os.mkfifo(cache)


def _folder(cache: Path, victim: Path) -> None:
    cache.unlink()
    (cache / "inside").mkdir(parents=True)


def _writable_by_all(cache: Path, victim: Path) -> None:
    cache.unlink()
    cache.parent.chmod(0o777)


@pytest.mark.parametrize("prepare", [_link, _links_for_every_process, _fifo, _folder, _writable_by_all])
def test_nothing_else_is_read_or_written(
    cache: Path, use: Callable[..., None], prepare: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    prepare(cache, victim)
    before = {path.name for path in cache.parent.iterdir()}
    use()
    assert victim.read_text() == "as it was"
    if prepare in (_folder, _writable_by_all):
        assert {path.name for path in cache.parent.iterdir()} == before  # no cache, and nothing in its place
    else:
        assert {path.name for path in cache.parent.iterdir()} == before | {cache.name}
        assert cache.is_file() and not cache.is_symlink()


def test_a_full_disk_leaves_the_old_file(cache: Path, use: Callable[..., None]) -> None:
    cache.write_bytes(b"damaged, so that a new one would be written")
    use("resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))")
    assert list(cache.parent.iterdir()) == [cache]
    assert cache.read_bytes().startswith(b"damaged")


def test_what_a_killed_process_left_is_removed_later(cache: Path, use: Callable[..., None]) -> None:
    data = cache.read_bytes()
    old, new, other = (Path(f"{cache}{suffix}") for suffix in (".AbCdEf", ".GhIjKl", "-other"))
    for path in (old, new, other):
        path.write_bytes(data[:100])
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    cache.write_bytes(b"")
    use()
    assert set(cache.parent.iterdir()) == {cache, new, other}


def test_several_processes_at_once(vulkan: Any, program: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TVM_USE_RUNTIME_LIB": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    processes = [subprocess.Popen([sys.executable, "-c", program()], env=environment) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    (path,) = folder.iterdir()
    assert path.read_bytes().startswith(b"TVMATTNC")
