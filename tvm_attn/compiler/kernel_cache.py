"""Single kernels, compiled when they are first used and kept on disk for other processes.

A file's name holds everything that its code depends on, as a hash: the kernel, the target, the versions, the sources of
kernels and compiler, the tuned records. It also holds the hash of the content, because a damaged library must not be
loaded. Without a folder that belongs to this user alone, kernels are kept in memory only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm

import tvm_attn
from tvm_attn.compiler.single_kernel import compile_kernel
from tvm_attn.errors import ArtifactError, CompileError, one_line
from tvm_attn.jsonfile import read_bytes
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.base import label, shape_of
from tvm_attn.runtime.library import load_library
from tvm_attn.schedule import RecordBook, template_for
from tvm_attn.schedule.plan import plan
from tvm_attn.targets import Target

MOST_FILES = 512
"""Files in the folder; those that were not used for longest are removed beyond that."""
_LARGEST = 64 << 20
_QUIET_SECONDS = 2.0
"""Time after which compiling is reported."""

_lock = threading.Lock()
_loaded: dict[tuple[Kernel, str, Path | None], Any] = {}

Progress = Callable[[str], None]


def compiled_kernel(kernel: Kernel, target: Target, progress: Progress | None = None) -> Any:
    """The module (a tvm_ffi.Module) with a kernel's function "main"; for processors also "set_threads".

    The first use on a machine compiles for about a second, on CUDA for some seconds.

    Args:
        kernel: the kernel.
        target: the hardware.
        progress: called with a line if compiling takes long; by default it is printed on stderr.

    Raises:
        ScheduleError: the target cannot compute the kernel.
        CompileError: a compiler is missing, or fails.
    """
    key = kernel, target.name, target.file
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(kernel, target, progress or _say)
        return _loaded[key]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _load(kernel: Kernel, target: Target, progress: Progress) -> Any:
    folder, name = _folder(), _key(kernel, target)
    content = None if folder is None else _read(folder, name)
    if content is None:
        with _reported(f"compiling {label(kernel)} for {target.name}", progress):
            content = _compile(kernel, target)
        if folder is not None:
            _keep(folder, name, content)
    try:
        return load_library(np.frombuffer(content, np.uint8), f"{kernel.family}.so")
    except (OSError, RuntimeError) as error:
        raise CompileError(f"{label(kernel)} for {target.name} cannot be loaded: {one_line(error)}") from error


def _compile(kernel: Kernel, target: Target) -> bytes:
    function = plan(kernel, target, RecordBook.load(target)).function
    with tempfile.TemporaryDirectory(prefix="tvm-attn-") as scratch:
        library = Path(scratch) / "kernel.so"
        try:
            compile_kernel(function, target, library)
        except CompileError as error:
            raise CompileError(f"{label(kernel)}: {error}") from error
        return library.read_bytes()


@contextmanager
def _reported(message: str, progress: Progress) -> Iterator[None]:
    """Reports what goes on in the block, if that takes long."""
    timer = threading.Timer(_QUIET_SECONDS, progress, (f"{message} (once)",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _key(kernel: Kernel, target: Target) -> str:
    template = template_for(kernel, target)
    facts = {
        "kernel": shape_of(kernel),
        "target": target.identity,
        "versions": [tvm_attn.__version__, tvm.__version__],
        "compiler": os.environ.get("CXX"),
        "sources": _sources(),
        "records": [entry.record.to_line() for entry in RecordBook.load(target).entries(template, kernel)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """The hash of everything in this package that decides about a kernel's code."""
    package = Path(__file__).resolve().parents[1]
    files = [package / "quantization.py", package / "storage.py"]
    for name in ("kernels", "compiler", "schedule", "targets", "vulkan"):
        files += [path for path in sorted((package / name).rglob("*")) if path.suffix in (".py", ".cc", ".h")]
    result = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        result.update(f"{path.name} {len(content)}\n".encode() + content)
    return result.hexdigest()


# --- files ---


def _folder() -> Path | None:
    """The folder of compiled kernels, which only this user can write to; None if there is none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        place = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "tvm-attn" / "kernels"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
    except (OSError, RuntimeError):  # no home, a read-only disk
        return None
    private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return place if private else None


def _read(folder: Path, name: str) -> bytes | None:
    """The library of a key; None if there is none, or a damaged one, which is removed."""
    for path in folder.glob(f"{name}-*.so"):
        try:
            content = read_bytes(path, _LARGEST, ArtifactError)
        except ArtifactError:
            content = b""
        try:
            if path.name == _file_name(name, content):
                os.utime(path)
                return content
            path.unlink()
        except OSError:
            continue
    return None


def _keep(folder: Path, name: str, content: bytes) -> None:
    """Writes a library and makes room for it; a full disk only means that the next process compiles again."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, folder / _file_name(name, content))
        except BaseException:
            os.unlink(temporary)
            raise
        used = sorted((entry.stat().st_mtime, entry.path) for entry in os.scandir(folder) if entry.is_file())
        for _, path in used[: max(0, len(used) - MOST_FILES)]:
            os.unlink(path)
    except OSError:
        return


def _file_name(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.so"
