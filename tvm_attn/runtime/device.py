"""The device that a model runs on: reading its name, finding it, and choosing one.

Functions import TVM when they are called: how it is imported is for `tvm_attn.runtime.tvm_import` to say.
"""

from __future__ import annotations

import re

from tvm_attn.errors import DeviceError, shorten
from tvm_attn.runtime import cuda
from tvm_attn.runtime.artifact import Artifact, Library

GPU_KINDS = ("cuda", "vulkan")
"""Device classes beside the processor, in the order in which "auto" tries them."""


def parse_device(name: str) -> tuple[str, int] | None:
    """Kind and index of a device's name, e.g. ("vulkan", 0) of "vulkan:0" or "vulkan"; None for "auto".

    Raises:
        DeviceError: it is none of auto, cpu, cuda[:INDEX], vulkan[:INDEX].
    """
    if isinstance(name, str) and name == "auto":
        return None
    pattern = r"(cpu|cuda|vulkan)(?::(\d{1,3}))?"
    found = re.fullmatch(pattern, name, re.ASCII) if isinstance(name, str) else None
    if not found or (found[1] == "cpu" and int(found[2] or 0)):
        raise DeviceError(f"unknown device {shorten(name)}; use auto, cpu, cuda:0 or vulkan:0")
    return found[1], int(found[2] or 0)


def obstacle(kind: str, index: int = 0) -> str | None:
    """Why a device cannot be used, in words; None where it can."""
    if kind == "cpu":
        return None
    if kind == "cuda":
        return cuda.obstacle(index)
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is None:
        return f"the {kind} runtime is missing"
    if not tvm.runtime.device(kind, index).exist:
        return f"there is no device {kind}:{index}"
    return None


def is_software(kind: str, index: int = 0) -> bool:
    """Whether a device that exists is a program on the processor, such as Mesa's llvmpipe."""
    import tvm

    name = str(tvm.runtime.device(kind, index).device_name).lower()
    return "llvmpipe" in name or "swiftshader" in name


def choose_device(artifact: Artifact, name: str) -> tuple[Library, str, int]:
    """The library to run, and the kind and index of the device to run it on.

    "auto" is the first GPU that the artifact has a library for, else the processor; a software renderer is taken only
    where there is no library for the processor.

    Raises:
        ArtifactError: the artifact has no library that can run here.
        DeviceError: the device is unknown, or absent.
    """
    chosen = parse_device(name) or _automatic(artifact)
    kind, index = chosen
    library = artifact.library(kind)  # what the artifact lacks comes before what the machine lacks
    if reason := obstacle(kind, index):
        raise DeviceError(f"device {kind}:{index}: {reason}; tvm-attn devices lists what this machine has")
    if kind == "cuda":
        library = artifact.library(kind, cuda.capability(index))
    return library, kind, index


def _automatic(artifact: Artifact) -> tuple[str, int]:
    present = [kind for kind in GPU_KINDS if _is_usable(artifact, kind)]
    real = [kind for kind in present if not is_software(kind)]
    if real:
        return real[0], 0
    return (present[0], 0) if present and not _is_usable(artifact, "cpu") else ("cpu", 0)


def _is_usable(artifact: Artifact, kind: str) -> bool:
    """Whether the first device of a kind is there and the artifact has a library that it can run."""
    libraries = [library for library in artifact.libraries if library.device == kind]
    if not libraries or obstacle(kind) is not None:
        return False
    capability = cuda.capability(0) if kind == "cuda" else None
    return any(library.obstacle(capability) is None for library in libraries)
