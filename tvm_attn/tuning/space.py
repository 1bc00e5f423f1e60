"""The decisions of a template for one kernel, as a space that can be searched, and as traces of MetaSchedule.

A template builds its own function, often from a kernel with other tile sizes, so MetaSchedule cannot replay it from the
kernel's plain function. A candidate is therefore a schedule that starts from the finished function; its trace has one
`sample_categorical` a decision, in the order in which the template takes them, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_attn.kernels import PortableKernel
from tvm_attn.schedule import Template, schedule, template_for
from tvm_attn.targets import Target


@dataclass(frozen=True)
class Choice:
    """One decision of a template."""

    name: str
    candidates: tuple[int, ...]
    default: int


class _Recorder:
    """Takes every default, and notes what was asked."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []

    def __call__(self, name: str, candidates: Sequence[int], default: int) -> int:
        self.choices.append(Choice(name, tuple(candidates), default))
        return default


@dataclass(frozen=True)
class Candidate:
    """Decisions, one index into its candidates a choice, and the function they give."""

    indices: tuple[int, ...]
    function: tirx.PrimFunc


@dataclass(frozen=True)
class Space:
    """All decisions that a template can take for a kernel.

    Attributes:
        kernel, target, template: whose decisions they are.
        choices: in the order in which the template asks, its defaults taken.
        function: the function with the defaults.
    """

    kernel: PortableKernel
    target: Target
    template: Template
    choices: tuple[Choice, ...]
    function: tirx.PrimFunc

    @staticmethod
    def of(kernel: PortableKernel, target: Target) -> Space:
        """Asks the template which decisions it takes.

        Raises:
            ScheduleError: there is no template.
        """
        template, recorder = template_for(kernel, target), _Recorder()
        function = template.apply(kernel, target, recorder)
        return Space(kernel, target, template, tuple(recorder.choices), function)

    @property
    def size(self) -> int:
        """Number of combinations, those included that give the same function."""
        size = 1
        for choice in self.choices:
            size *= len(choice.candidates)
        return size

    @property
    def default(self) -> tuple[int, ...]:
        """The template's own decisions, as indices."""
        return tuple(choice.candidates.index(choice.default) for choice in self.choices)

    def decisions(self, indices: Sequence[int]) -> dict[str, int]:
        """The decisions by name."""
        return {choice.name: choice.candidates[index] for choice, index in zip(self.choices, indices, strict=True)}

    def candidates(self, limit: int) -> list[Candidate]:
        """At most `limit` candidates whose functions differ, the defaults first.

        Where there are more than that, the others are a random sample: the same one each time, and a larger limit only
        adds to it.
        """
        combinations = list(product(*(range(len(choice.candidates)) for choice in self.choices)))
        combinations.remove(self.default)
        if len(combinations) >= limit:
            random.Random(0).shuffle(combinations)
        found: list[Candidate] = []
        seen: set[int] = set()
        for indices in [self.default, *combinations]:
            if len(found) == limit:
                break
            function = schedule(self.kernel, self.target, self.decisions(indices))
            identity = tvm_ffi.structural_hash(function)
            if identity not in seen:
                seen.add(identity)
                found.append(Candidate(indices, function))
        return found

    def to_schedule(self, candidate: Candidate) -> s_tir.Schedule:
        """A candidate for MetaSchedule, its decisions on the trace."""
        module = tvm.IRModule({"main": candidate.function.with_attr("global_symbol", "main")})
        result = s_tir.Schedule(module, enable_check=False)
        for choice, index in zip(self.choices, candidate.indices, strict=True):
            count = len(choice.candidates)
            result.sample_categorical(list(choice.candidates), [1.0 / count] * count, decision=index)
        return result


def indices_of(trace: s_tir.schedule.Trace) -> tuple[int, ...]:
    """The decisions that `Space.to_schedule` put on a trace."""
    decisions = trace.decisions
    return tuple(int(decisions[instruction]) for instruction in trace.insts)
