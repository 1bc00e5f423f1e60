"""The C++ compiler that links libraries, chosen by the architecture that they are for."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from typing import Any

from tvm.support import cc

from tvm_attn.errors import CompileError, shorten

_PACKAGES = {"aarch64": "g++-aarch64-linux-gnu", "x86_64": "g++-x86-64-linux-gnu"}
"""Debian's cross compilers."""


def find_cxx(architecture: str) -> str:
    """The C++ compiler for an architecture, as `platform.machine()` names it.

    CXX is taken if it compiles for the architecture; otherwise g++ or clang++ for this machine's, and the cross
    compiler by its usual name for another.

    Raises:
        CompileError: there is none.
    """
    named = os.environ.get("CXX")
    if named and shutil.which(named) is None:
        raise CompileError(f"CXX is {shorten(named)}, and there is no such C++ compiler: set it to one, or unset it")
    if named and _compiles_for(named, architecture):
        return named
    native = architecture == platform.machine()
    names = ("g++", "clang++") if native else (f"{architecture}-linux-gnu-g++",)
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        package = "g++" if native else _PACKAGES.get(architecture, f"a cross compiler for {architecture}")
        what = "" if native else f" for {architecture}"
        raise CompileError(
            f"no C++ compiler{what} ({', '.join(names)}) to link the library: install {package}, or name one in CXX"
        )
    return found


def linking(architecture: str) -> Any:
    """The argument `fcompile` of `export_library` for an architecture.

    Raises:
        CompileError: there is no compiler.
    """
    return cc.cross_compiler(find_cxx(architecture))


def _compiles_for(compiler: str, architecture: str) -> bool:
    machine = _machine_of(shutil.which(compiler) or compiler)
    # A compiler that does not say, such as a wrapper, is what the user wants for this machine.
    return machine == architecture if machine else architecture == platform.machine()


@functools.cache
def _machine_of(compiler: str) -> str:
    """The architecture that a compiler says it compiles for; empty if it says nothing."""
    try:
        done = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("-")[0]
