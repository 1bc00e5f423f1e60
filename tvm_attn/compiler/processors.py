"""What LLVM knows about processors: an unknown name or feature is refused before it prints hundreds of lines."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import tvm
from tvm.target import codegen

from tvm_attn.errors import shorten

_ALIASES = re.compile(r"i[3-6]86|amd64|arm64|armv\w+|thumbv\w+|ppc\w*")


def unknown(table: Mapping[str, Any]) -> str | None:
    """What LLVM does not know of a TVM target that TVM takes: architecture, processor or feature, in words; None if it
    knows everything."""
    triple, processor = table.get("mtriple"), table.get("mcpu")
    if triple is None:
        triple = str(codegen.llvm_get_system_triple())
    architecture = triple.partition("-")[0]
    architectures = [str(name) for name in codegen.llvm_get_targets()]
    if architecture not in architectures and not _ALIASES.fullmatch(architecture):
        return _refusal(f"tvm.mtriple is {shorten(triple)}; LLVM has no such architecture", architecture, architectures)
    names = processors(triple)
    if processor is not None and processor not in names:
        return _refusal(f"tvm.mcpu is {shorten(processor)}; LLVM has no such processor", processor, names)
    for flag in table.get("mattr", ()):
        feature = str(flag)[1:]
        if str(flag)[:1] not in ("+", "-") or not _has_feature(triple, feature):
            return _refusal(f"tvm.mattr has {shorten(flag)}; LLVM has no such feature", feature, _all_features(triple))
    return None


def _refusal(what: str, given: str, names: list[str]) -> str:
    near = difflib.get_close_matches(given[:100], names, 3)
    return what + (f"; the nearest: {', '.join(near)}" if near else "")


@cache
def processors(triple: str) -> list[str]:
    """LLVM's names of the processors of an architecture that it knows."""
    return [str(name) for name in codegen.llvm_get_cpu_archlist(_target(mtriple=triple))]


@cache
def features(triple: str, processor: str) -> frozenset[str]:
    """LLVM's names of the features of a processor."""
    return frozenset(str(name) for name in codegen.llvm_get_cpu_features(_target(mtriple=triple, mcpu=processor)))


@cache
def _all_features(triple: str) -> list[str]:
    return sorted({feature for name in processors(triple) for feature in features(triple, name)})


@cache
def _has_feature(triple: str, feature: str) -> bool:
    if feature in _all_features(triple):
        return True
    # Some are in no processor. LLVM turns on what it knows, and prints a line about the rest.
    with _silent_stderr():
        target = _target(mtriple=triple, mattr=[f"+{feature}"])
        return feature in {str(name) for name in codegen.llvm_get_cpu_features(target)}


def _target(**options: Any) -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", **options})


@contextmanager
def _silent_stderr() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
