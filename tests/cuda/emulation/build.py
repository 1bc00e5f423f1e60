"""Compiles the emulation and the kernels that it runs."""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .translate import INCLUDE, EmulationError, translate

_HERE = Path(__file__).parent
_BUILD = Path(__file__).parents[3] / "build" / "cuda_emulation"
_COMPILER = "g++"  # other compilers lack some of the flags
_RUNTIME_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-Wall", "-Wextra")
_OPTIMIZED = (
    "scheduler.cc",
    "matrix.cc",
    "races.cc",
    "warpgroup.cc",
)  # called by kernels; for the other files, TVM's headers take most of the time
_KERNEL_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-fno-strict-aliasing", "-w")
# Without optimization, and with the address sanitizer's checks as calls, compiling takes a third of the time of -O1,
# and running a case hardly longer.
_CHECKS = {
    # Uninitialised local variables hold a pattern, which is NaN as float16 and huge as float32.
    "memory": (
        "-O0", "-fsanitize=address,alignment,bounds,integer-divide-by-zero", "-fno-sanitize-recover=all",
        "-fsanitize-sections=emulated_shared", "-ftrivial-auto-var-init=pattern",
        "--param", "asan-instrumentation-with-call-threshold=0",
    ),
    "races": ("-O0", "-fsanitize=thread", "-ftrivial-auto-var-init=pattern"),
}  # fmt: skip


def _run(*commands: Sequence[str | Path]) -> None:
    """Runs compilers in parallel."""
    if shutil.which(_COMPILER) is None:
        raise EmulationError("the emulation needs g++, which is not installed")
    processes = [
        subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True) for command in commands
    ]
    reports = [process.communicate()[1] for process in processes]
    for process, report in zip(processes, reports, strict=True):
        if process.returncode != 0:
            errors = [line for line in report.splitlines() if "error" in line or "undefined" in line]
            raise EmulationError("\n".join(["the C++ compiler refuses the source:", *errors[:8]]))


@functools.cache
def folder() -> Path:
    """A folder for this process, removed when it ends."""
    path = Path(tempfile.mkdtemp(prefix="cuda_emulation_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@functools.cache
def runtime() -> Path:
    """A folder with `libemulation.so` (the scheduler and the device), `runner`, and the headers, precompiled.

    It is in `build/` and is compiled again when its sources change.
    """
    sources = sorted([Path(__file__), *_HERE.glob("*.cc"), *_HERE.glob("*.h"), *INCLUDE.glob("*.h")])
    packages = [_package(name) for name in ("tvm", "tvm_ffi")]
    state = [str(packages), _COMPILER, *(source.read_text() for source in sources)]
    path = _BUILD / hashlib.sha256("\0".join(state).encode()).hexdigest()[:16]
    if path.exists():
        return path
    _BUILD.mkdir(parents=True, exist_ok=True)
    for old in sorted(_BUILD.iterdir(), key=lambda folder: folder.stat().st_mtime)[:-3]:
        shutil.rmtree(old, ignore_errors=True)
    made = Path(tempfile.mkdtemp(dir=_BUILD))
    for checks in _CHECKS:
        (made / checks).mkdir()
    tvm = [flag for package in packages for flag in (f"-L{package}/lib", f"-Wl,-rpath,{package}/lib")]
    tvm += ["-ltvm_runtime", "-ltvm_ffi", "-ldl"]
    compiler: list[str | Path] = [
        _COMPILER,
        *_RUNTIME_FLAGS,
        *(flag for package in packages for flag in ("-isystem", f"{package}/include")),
    ]
    header: list[str | Path] = [_COMPILER, *_KERNEL_FLAGS, "-x", "c++-header", INCLUDE / "cuda_emulation.h"]
    parts = [*_OPTIMIZED, "device.cc", "module.cc", "runner.cc"]
    objects = [made / part.replace(".cc", ".o") for part in parts]
    levels = ["-O2" if part in _OPTIMIZED else "-O0" for part in parts]
    _run(
        *([*header, *flags, "-o", made / checks / "cuda_emulation.h.gch"] for checks, flags in _CHECKS.items()),
        *(
            [*compiler, level, "-c", _HERE / part, "-o", o]
            for part, o, level in zip(parts, objects, levels, strict=True)
        ),
    )
    *library, main = objects
    _run([*compiler, "-shared", *library, "-o", made / "libemulation.so", *tvm])
    local = [f"-L{made}", "-Wl,--no-as-needed", "-lemulation", "-Wl,-rpath,$ORIGIN"]
    _run([*compiler, "-fsanitize=address", main, "-o", made / "runner", *local, *tvm])
    try:
        made.rename(path)
    except OSError:  # another process finished first
        shutil.rmtree(made)
    return path


def compile_kernels(source: str, checks: str | None) -> Path:
    """The shared library of the kernels in CUDA source; equal sources give the same library.

    Args:
        source: the CUDA source.
        checks: the checks: a key of `_CHECKS`, for the runner, or None, for any process.
    """
    text = translate(source)
    name = hashlib.sha256(f"{checks}{text}".encode()).hexdigest()[:16]
    library = folder() / f"{name}.so"
    if not library.exists():
        code = library.with_suffix(".cc")
        code.write_text(text)
        made = library.with_suffix(f".{os.getpid()}.so")
        flags = ["-Og"] if checks is None else [*_CHECKS[checks], f"-I{runtime() / checks}"]
        objects = made.with_suffix(".o")
        _run([_COMPILER, *_KERNEL_FLAGS, *flags, f"-I{INCLUDE}", "-c", code, "-o", objects])
        # The functions that the thread sanitizer's code calls are in races.cc, not in that sanitizer's library.
        _run([_COMPILER, *(flags if checks == "memory" else ()), "-shared", objects, "-o", made])
        objects.unlink()
        made.rename(library)
    return library
