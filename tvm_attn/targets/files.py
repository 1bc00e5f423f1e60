"""The files that describe targets: the user's own, which are read first, and those that come along."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import tomli_w

from tvm_attn._resources import data_dirs, user_dir
from tvm_attn.backends import BACKENDS
from tvm_attn.checks import one_of, problem
from tvm_attn.cli import writing
from tvm_attn.errors import TargetError, one_line, shorten
from tvm_attn.jsonfile import CONFIG_BYTES, read_text, shorten_path
from tvm_attn.targets.base import NAME, Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def user_folder() -> Path:
    """The folder of the user's own target files; it need not exist.

    Raises:
        TvmAttnError: this user has no home folder.
    """
    return user_dir("targets")


def names() -> list[str]:
    """The names of all targets, sorted."""
    return sorted(_files())


def read(name: str) -> Target:
    """The target of that name: the user's file, or else the one that comes along.

    Raises:
        TargetError: there is no such file, or it is malformed.
    """
    files = _files()
    if name not in files:
        known = sorted({"cpu", "vulkan", *files})
        near = difflib.get_close_matches(name[:100], known, 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise TargetError(f"unknown target {shorten(name)}; known targets: {', '.join(known)}{meant}")
    return read_file(files[name][0])


def read_all() -> list[Target]:
    """All targets, sorted by name. Leaves out malformed files, with a warning."""
    found = []
    for paths in _files().values():
        for path in paths:
            try:
                found.append(read_file(path))
                break
            except TargetError as error:
                warnings.warn(f"a target is left out: {error}", stacklevel=1)
    return sorted(found, key=lambda target: target.name)


def _files() -> dict[str, list[Path]]:
    """The files of each name; the first one counts."""
    found: dict[str, list[Path]] = {}
    for folder in data_dirs("targets"):
        try:
            entries = sorted(os.listdir(folder))
        except FileNotFoundError:
            continue
        except OSError as error:
            warnings.warn(f"no targets are read from {shorten_path(folder)}: {error.strerror}", stacklevel=1)
            continue
        for entry in entries:
            if entry.endswith(".toml"):
                found.setdefault(entry.removesuffix(".toml"), []).append(folder / entry)
    return found


def read_file(path: Path) -> Target:
    """The target that a file describes; its name is the file's without ".toml".

    Raises:
        TargetError: the file cannot be read, or it is malformed.
    """
    shown = shorten_path(path)
    try:
        table = tomllib.loads(read_text(path, CONFIG_BYTES, TargetError))
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{shown} is not valid TOML: {one_line(error)}") from None
    return from_table(table, path)


def from_table(table: dict[str, Any], path: Path) -> Target:
    """The target that the table of a file describes.

    Raises:
        TargetError: it is malformed.
    """
    shown = shorten_path(path)
    if not re.fullmatch(NAME, path.stem):
        raise TargetError(f"{shown}: name the file with letters, digits, '-', '_', '.' and '+', at most 100")
    device = table.get("device")
    known = device in BACKENDS if isinstance(device, str) else False
    target_class: type[Target] = import_module(f"tvm_attn.targets.{device}").TARGET_CLASS if known else Target
    rules = target_class.RULES | {"device": one_of(*BACKENDS)}
    if fault := problem(table, rules) or target_class.misfit(table):
        raise TargetError(f"{shown}: {fault}; targets/README.md lists what a target file holds")
    return target_class.from_table(path.stem, table, path)


def write(target: Target, path: Path) -> Target:
    """Writes a target file, completely or not at all, and makes its folder.

    Returns:
        The target under the name that the file gives it.

    Raises:
        TargetError: the target breaks a rule, or the file cannot be written.
    """
    table = target.to_table()
    # As a reader sees it: without tuples.
    written = from_table(tomllib.loads(tomli_w.dumps(table)), path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{shorten_path(path.parent)} cannot be made: {error.strerror}; name another file") from None
    with writing(path, TargetError) as file:
        file.write(tomli_w.dumps(table).encode())
    return written


def related(target: Target) -> list[Target]:
    """The targets whose tuned records may serve another one, the nearest first: what it is based on, generic ones,
    those for one processor."""
    others = [other for other in read_all() if other.name != target.name and other.device == target.device]
    based = [other for other in others if other.name == target.based_on]
    akin = [other for other in others if target.is_akin_to(other) and other not in based]
    return based + sorted(akin, key=lambda other: getattr(other, "processor", None) is not None)
