"""Templates: how a device class computes the kernels of some families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx

from tvm_attn.kernels.base import Kernel


class Chooser(Protocol):
    """Makes a template's decisions."""

    def __call__(self, name: str, candidates: Sequence[int], default: int) -> int:
        """One of `candidates` for the decision `name`; `default`, a candidate too, if nothing is known."""
        ...


@dataclass(frozen=True)
class Template:
    """How a device class computes the kernels of some families.

    Attributes:
        name: e.g. "cpu.matmul"; with `version` it keys tuned records.
        version: raised when the meaning of a decision changes, which retires the records made before.
        families: the kernel families that it computes.
        apply: builds the kernel's scheduled function for a target; the chooser makes the decisions.
        activations: activation dtypes that it accepts; a kernel without such a field counts as float32.
    """

    name: str
    version: int
    families: tuple[str, ...]
    # Each function takes the kernel classes of its families, and the target class of its devices.
    apply: Callable[[Any, Any, Chooser], tirx.PrimFunc]
    activations: tuple[str, ...] = ("float32",)

    def takes(self, kernel: Kernel) -> bool:
        """Whether this template computes a kernel."""
        return kernel.family in self.families and activations_of(kernel) in self.activations


def activations_of(kernel: Kernel) -> str:
    """The dtype of the activations that a kernel reads or writes."""
    return getattr(kernel, "activations", "float32")
