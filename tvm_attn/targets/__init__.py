"""The hardware that tvm_attn compiles for: reads `targets/*.toml`, and finds the file for this machine.

`targets/README.md` explains the keys; the module of each device class holds their rules.
"""

from __future__ import annotations

import platform
import sys
import warnings
from importlib import import_module
from pathlib import Path

from tvm_attn._resources import resource_dir
from tvm_attn.backends import BACKENDS
from tvm_attn.checks import one_of, problem
from tvm_attn.errors import TargetError, one_line, shorten
from tvm_attn.jsonfile import CONFIG_BYTES, read_text, shorten_path
from tvm_attn.runtime.machine import cpu_features
from tvm_attn.targets.base import Peak, Target
from tvm_attn.targets.cpu import CpuTarget
from tvm_attn.targets.cuda import CudaTarget
from tvm_attn.targets.gpu import GpuTarget
from tvm_attn.targets.vulkan import VulkanTarget

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CpuTarget",
    "CudaTarget",
    "GpuTarget",
    "Peak",
    "Target",
    "VulkanTarget",
    "check_names",
    "detect_cpu",
    "names",
    "read",
    "read_all",
    "resolve",
    "resolve_all",
]


def names() -> list[str]:
    """The names of all targets, sorted."""
    return sorted(path.stem for path in resource_dir("targets").glob("*.toml"))


def read(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: there is no such file, or it is malformed.
    """
    if name not in names():
        known = ", ".join(sorted({"cpu", "vulkan", *names()}))
        raise TargetError(f"unknown target {shorten(name)}; known targets: {known}")
    return _read_file(resource_dir("targets") / f"{name}.toml")


def read_all() -> list[Target]:
    """All targets, sorted by name. Leaves out malformed files, with a warning."""
    found = []
    for name in names():
        try:
            found.append(read(name))
        except TargetError as error:
            warnings.warn(f"a target is left out: {error}", stacklevel=1)
    return found


def _read_file(path: Path) -> Target:
    try:
        table = tomllib.loads(read_text(path, CONFIG_BYTES, TargetError))
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{shorten_path(path)} is not valid TOML: {one_line(error)}") from None
    device = table.get("device")
    known = device in BACKENDS if isinstance(device, str) else False
    target_class: type[Target] = import_module(f"{__name__}.{device}").TARGET_CLASS if known else Target
    rules = target_class.RULES | {"device": one_of(*BACKENDS)}
    if fault := problem(table, rules) or target_class.misfit(table):
        raise TargetError(f"{shorten_path(path)}: {fault}; targets/README.md lists what a target file holds")
    return target_class.from_table(path.stem, table)


def resolve(name: str) -> Target:
    """The target that `--target` names: "cpu" is this machine's processor, "vulkan" any Vulkan device, anything else
    the name of a file, including "cuda".

    Raises:
        TargetError: the target is unknown, there are several, or no file fits this machine.
    """
    if "," in name:
        raise TargetError(f"{shorten(name)} names several targets; name one of them")
    if name == "cpu":
        return detect_cpu()
    return read("vulkan-generic" if name == "vulkan" else name)


def resolve_all(names: str, dtype: str) -> list[Target]:
    """The targets of a build, from names separated by commas.

    "cuda" brings "cuda-sm90" along, which has Hopper's own instructions, for dtypes that tensor cores multiply.

    Raises:
        TargetError: as in `resolve`.
    """
    wanted = [name.strip() for name in names.split(",")]
    if "cuda" in wanted and "cuda-sm90" not in wanted and dtype != "float32":
        wanted.append("cuda-sm90")
    return [resolve(name) for name in wanted]


def check_names(names: str) -> list[Target]:
    """Reads the targets that `--target` names, separated by commas, as far as possible without importing TVM.

    Returns:
        All targets except "cpu".

    Raises:
        TargetError: one is unknown or named twice, or its file is malformed.
    """
    wanted = [name.strip() for name in names.split(",")]
    found = [resolve(name) for name in wanted if name != "cpu"]  # "cpu" needs LLVM, which detects the processor
    if len(set(wanted)) != len(wanted):
        raise TargetError("a target is named twice")
    return found


def detect_cpu() -> CpuTarget:
    """The target for this machine's processor: the file made for it, or else the widest generic one that fits.

    Raises:
        TargetError: no file fits.
    """
    from tvm.target.codegen import llvm_get_system_cpu

    processor = llvm_get_system_cpu()
    fitting = [target for target in read_all() if isinstance(target, CpuTarget) and not target.missing(cpu_features())]
    exact = [target for target in fitting if target.processor == processor]
    generic = sorted((target for target in fitting if target.processor is None), key=lambda target: target.rank)
    candidates = exact or generic[-1:]
    if not candidates:
        raise TargetError(f"no file in targets/ fits this {platform.machine()} machine; known: {', '.join(names())}")
    return candidates[0]
