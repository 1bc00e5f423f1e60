"""The template protocol, and finding the template for a kernel and a target."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Kernel
from tvm_attn.targets import Target


class Chooser(Protocol):
    """Takes a template's decisions."""

    def __call__(self, name: str, candidates: Sequence[int], default: int) -> int:
        """One of `candidates` for the decision `name`; `default` (a candidate) where nothing is known."""
        ...


@dataclass(frozen=True)
class Template:
    """How a device class computes the kernels of some families.

    Attributes:
        name: e.g. "cpu.matmul"; with `version` it keys tuned records.
        version: raised when the meaning of a decision changes, which retires the records made before.
        families: the kernel families that it schedules.
        apply: builds the kernel's scheduled function for a target, its decisions taken by the chooser.
    """

    name: str
    version: int
    families: tuple[str, ...]
    # Each function takes the kernel classes of its families, and the target class of its devices.
    apply: Callable[[Any, Any, Chooser], tirx.PrimFunc]


class FixedChooser:
    """Replays given decisions, and takes the default of every other.

    Attributes:
        taken: every decision that was asked for, with its value.
    """

    def __init__(self, decisions: Mapping[str, int] | None = None) -> None:
        self._decisions = dict(decisions or {})
        self.taken: dict[str, int] = {}

    def __call__(self, name: str, candidates: Sequence[int], default: int) -> int:
        """See `Chooser`.

        Raises:
            ScheduleError: the given decision is none of the candidates.
        """
        value = self._decisions.get(name, default)
        if value not in candidates:
            raise ScheduleError(f"decision {name}={value} is none of {list(candidates)}: the record does not fit")
        self.taken[name] = value
        return value


_MODULES = {"cpu": "cpu", "cuda": "cuda", "vulkan": "gpu"}


def template_for(kernel: Kernel, target: Target) -> Template:
    """The template of the target's device class for a kernel's family.

    Raises:
        ScheduleError: there is none.
    """
    # Templates import the functions of this module, and those of one device class are enough.
    if target.device in _MODULES:
        module = importlib.import_module(f"tvm_attn.schedule.{_MODULES[target.device]}")
        for template in module.TEMPLATES:
            if kernel.family in template.families:
                return template
    raise ScheduleError(
        f"no schedule template for kernel {kernel.family!r} on device class {target.device!r}; "
        "add one to tvm_attn/schedule/"
    )


def schedule(kernel: Kernel, target: Target, decisions: Mapping[str, int] | None = None) -> tirx.PrimFunc:
    """The scheduled TensorIR function of a kernel.

    Raises:
        ScheduleError: no template, or a decision that is not a candidate.
    """
    return template_for(kernel, target).apply(kernel, target, FixedChooser(decisions))
