"""The hardware that tvm_attn compiles for: target files, and the one for this machine.

`targets/README.md` explains the keys; the module of each device class holds their rules.
"""

from __future__ import annotations

import platform
from pathlib import Path

from tvm_attn._resources import resource_dir
from tvm_attn.errors import TargetError, shorten
from tvm_attn.runtime.machine import cpu_features
from tvm_attn.targets.base import Peak, Target
from tvm_attn.targets.cpu import CpuTarget
from tvm_attn.targets.cuda import CudaTarget
from tvm_attn.targets.files import names, read, read_all, read_file, related, user_folder
from tvm_attn.targets.gpu import GpuTarget
from tvm_attn.targets.vulkan import VulkanTarget

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
    "related",
    "resolve",
    "resolve_all",
    "user_folder",
]


def resolve(name: str) -> Target:
    """The target that `--target` names: "cpu" is this machine's processor, "vulkan" any Vulkan device, FILE.toml that
    file, anything else the name of a file in the user's folder or in `targets/`, including "cuda".

    Raises:
        TargetError: the target is unknown, there are several, or no file fits this machine.
    """
    if "," in name:
        raise TargetError(f"{shorten(name)} names several targets; name one of them")
    if name == "cpu":
        return detect_cpu()
    if name.endswith(".toml"):
        return read_file(Path(name))
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
    exact = sorted((target for target in fitting if target.processor == processor), key=_is_shipped)
    generic = sorted((target for target in fitting if target.processor is None), key=lambda target: target.rank)
    candidates = exact or generic[-1:]
    if not candidates:
        raise TargetError(f"no target file fits this {platform.machine()} machine; known: {', '.join(names())}")
    return candidates[0]


def _is_shipped(target: Target) -> bool:
    return target.file is not None and target.file.parent == resource_dir("targets")
