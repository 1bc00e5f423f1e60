"""Which C++ compiler links for an architecture."""

import os
import platform
import shutil
import struct
from pathlib import Path

import pytest

from tvm_attn.compiler import linker
from tvm_attn.compiler.build import build
from tvm_attn.compiler.linker import find_cxx
from tvm_attn.errors import CompileError
from tvm_attn.model.weights import open_weights

HERE = platform.machine()
PATH = os.environ.get("PATH", "")
OTHER = "aarch64" if HERE != "aarch64" else "x86_64"


@pytest.fixture(autouse=True)
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty search path, and no compiler in the environment."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    linker._machine_of.cache_clear()


def add(folder: Path, name: str, machine: str | None) -> str:
    """A program of that name that says what it compiles for."""
    path = folder / name
    answer = f'[ "$1" = -dumpmachine ] && echo {machine}-linux-gnu' if machine else "exit 1"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    os.chmod(path, 0o755)
    return str(path)


def test_this_machines_compiler(tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"no C\+\+ compiler \(g\+\+, clang\+\+\) .*install g\+\+, or name one in CXX"
    ):
        find_cxx(HERE)
    add(tmp_path, "clang++", HERE)
    assert find_cxx(HERE) == "clang++"
    add(tmp_path, "g++", HERE)
    assert find_cxx(HERE) == "g++"


def test_the_cross_compiler_by_its_usual_name(tmp_path: Path) -> None:
    add(tmp_path, "g++", HERE)
    with pytest.raises(CompileError, match=rf"no C\+\+ compiler for {OTHER} .*-linux-gnu.*name one in CXX"):
        find_cxx(OTHER)
    add(tmp_path, f"{OTHER}-linux-gnu-g++", OTHER)
    assert find_cxx(OTHER) == f"{OTHER}-linux-gnu-g++"
    assert find_cxx(HERE) == "g++"


def test_a_named_compiler_links_what_it_compiles_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, "g++", HERE)
    mine = add(tmp_path, "my-compiler", OTHER)
    monkeypatch.setenv("CXX", mine)
    assert find_cxx(OTHER) == mine
    assert find_cxx(HERE) == "g++"
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(CompileError, match=r"CXX is .* there is no such"):
        find_cxx(HERE)


@pytest.mark.slow
def test_a_library_for_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", PATH)
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs g++-aarch64-linux-gnu")
    for dtype, quant in (("float32", "none"), ("bfloat16", "int8")):
        out = tmp_path / quant
        built = build(open_weights("demo"), "cpu-aarch64", dtype, quant, out)
        library = (out / "lib-cpu-aarch64.so").read_bytes()
        # e_ident says ELF with 64 bits, e_machine EM_AARCH64.
        assert library[:5] == b"\x7fELF\x02"
        assert struct.unpack_from("<H", library, 18) == (183,)
        assert platform.machine() == "aarch64" or any("compiled but not checked" in note for note in built.notes)


def test_a_compiler_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = add(tmp_path, "wrapper", None)
    monkeypatch.setenv("CXX", wrapper)
    assert find_cxx(HERE) == wrapper
    with pytest.raises(CompileError, match="no C"):
        find_cxx(OTHER)
