"""The hardware that tvm_attn compiles for: target files, and the one for this machine.

`targets/README.md` explains the keys; the module of each device class holds their rules.
"""

from __future__ import annotations

from pathlib import Path

from tvm_attn.errors import TargetError, shorten
from tvm_attn.targets.base import Peak, Target
from tvm_attn.targets.cpu import CpuTarget
from tvm_attn.targets.cuda import CudaTarget
from tvm_attn.targets.detection import detect, detect_cpu
from tvm_attn.targets.files import from_table, names, read, read_all, read_file, related, user_folder, write
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
    "detect",
    "detect_cpu",
    "from_table",
    "names",
    "read",
    "read_all",
    "related",
    "resolve",
    "resolve_all",
    "user_folder",
    "write",
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
