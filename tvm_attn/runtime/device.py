"""The device that a model runs on: parsing its name, and choosing one."""

from __future__ import annotations

import re

from tvm_attn.backends import BACKENDS
from tvm_attn.errors import DeviceError, shorten
from tvm_attn.runtime.artifact import Artifact, Library
from tvm_attn.runtime.devices import device_class


def parse_device(name: str) -> tuple[str, int] | None:
    """Kind and index of a device name, e.g. ("vulkan", 0) for "vulkan:0" or "vulkan"; None for "auto".

    Raises:
        DeviceError: the name is none of auto, cpu, cuda[:INDEX], vulkan[:INDEX].
    """
    if isinstance(name, str) and name == "auto":
        return None
    pattern = rf"({'|'.join(BACKENDS)})(?::(\d{{1,3}}))?"
    found = re.fullmatch(pattern, name, re.ASCII) if isinstance(name, str) else None
    if not found or (found[1] == "cpu" and int(found[2] or 0)):
        raise DeviceError(f"unknown device {shorten(name)}; use auto, cpu, cuda:0 or vulkan:0")
    return found[1], int(found[2] or 0)


def choose_device(artifact: Artifact, name: str) -> tuple[Library, str, int]:
    """The library to run, and the kind and index of the device to run it on.

    "auto" is the first GPU that the artifact has a library for, else the CPU; a software renderer is taken only if
    there is no library for the CPU.

    Raises:
        ArtifactError: the artifact has no library that can run here.
        DeviceError: the device is unknown or absent.
    """
    kind, index = parse_device(name) or _automatic(artifact)
    chosen = device_class(kind)
    artifact.library(kind)  # say what the artifact lacks before what the machine lacks
    if reason := chosen.obstacle(index):
        raise DeviceError(f"device {kind}:{index}: {reason}; tvm-attn devices lists what this machine has")
    return artifact.library(kind, chosen.capability(index)), kind, index


def _automatic(artifact: Artifact) -> tuple[str, int]:
    usable = [kind for kind in BACKENDS if kind != "cpu" and _is_usable(artifact, kind)]
    real = [kind for kind in usable if not device_class(kind).is_software()]
    if real:
        return real[0], 0
    return (usable[0], 0) if usable and not _is_usable(artifact, "cpu") else ("cpu", 0)


def _is_usable(artifact: Artifact, kind: str) -> bool:
    """Whether the first device of a kind exists and the artifact has a library that it can run."""
    libraries = [library for library in artifact.libraries if library.device == kind]
    if not libraries or device_class(kind).obstacle() is not None:
        return False
    capability = device_class(kind).capability()
    return any(library.obstacle(capability) is None for library in libraries)
