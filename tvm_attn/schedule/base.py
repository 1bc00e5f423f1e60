"""Finds the template for a kernel and a target, and replays decisions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from tvm import tirx

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.template import Template, activations_of
from tvm_attn.targets import Target


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
            ScheduleError: the given decision is not one of the candidates.
        """
        value = self._decisions.get(name, default)
        if value not in candidates:
            raise ScheduleError(f"decision {name}={value} is not one of {list(candidates)}: the record does not fit")
        self.taken[name] = value
        return value


def templates_of(target: Target) -> tuple[Template, ...]:
    """The templates of a target's device class; if several take a kernel, the first one is used."""
    # Imports only one device class, because importing takes a while.
    templates: tuple[Template, ...] = importlib.import_module(f"tvm_attn.kernels.{target.KERNELS}").TEMPLATES
    return templates


def supports(kernel: Kernel, target: Target) -> bool:
    """Whether a target can compute a kernel: it needs a template and the dtypes that the kernel stores."""
    dtypes = {getattr(kernel, field, "float32").removesuffix("_pairs") for field in ("weights", "dtype", "cache_dtype")}
    stored = dtypes - {"float32", "int8", "int4"}
    return stored <= set(target.dtypes) and any(template.takes(kernel) for template in templates_of(target))


def template_for(kernel: Kernel, target: Target) -> Template:
    """The template of the target's device class for a kernel.

    Raises:
        ScheduleError: there is no template.
    """
    for template in templates_of(target):
        if template.takes(kernel):
            return template
    activations = activations_of(kernel)
    dtype = "" if activations == "float32" else f" with {activations} activations"
    raise ScheduleError(
        f"no schedule template for kernel {kernel.family!r}{dtype} on device class {target.device!r}; "
        "add one to tvm_attn/kernels/"
    )


def schedule(kernel: Kernel, target: Target, decisions: Mapping[str, int] | None = None) -> tirx.PrimFunc:
    """The scheduled TensorIR function of a kernel.

    Raises:
        ScheduleError: there is no template, or a decision is not a candidate.
    """
    return template_for(kernel, target).apply(kernel, target, FixedChooser(decisions))
