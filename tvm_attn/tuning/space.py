"""The decisions of a template for one kernel, as a search space and as traces of MetaSchedule.

A template builds its own function, from loops that depend on its decisions, so MetaSchedule cannot replay it from a
plain function of the kernel. A candidate is therefore a schedule that starts from the finished function. Its trace has
one `sample_categorical` per decision, in the order in which the template takes them, and nothing else.

What a template may choose can depend on its earlier choices, so a space is a tree: a node for each choice, a branch for
each of its candidates. Following a path means applying the template.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.template import Template
from tvm_attn.schedule import template_for
from tvm_attn.targets import Target


@dataclass(frozen=True)
class Choice:
    """One decision of a template, given the decisions before it."""

    name: str
    candidates: tuple[int, ...]
    default: int


class _Walk:
    """A chooser that takes the branch (an index of a candidate) that `pick` returns, and records each choice."""

    def __init__(self, pick: Callable[[tuple[int, ...], Choice], int]) -> None:
        self._pick = pick
        self.choices: list[Choice] = []
        self.indices: tuple[int, ...] = ()

    def __call__(self, name: str, candidates: Sequence[int], default: int) -> int:
        choice = Choice(name, tuple(candidates), default)
        index = self._pick(self.indices, choice)
        self.choices.append(choice)
        self.indices = (*self.indices, index)
        return choice.candidates[index]


@dataclass(frozen=True)
class Candidate:
    """A path through the space: its choices, an index into the candidates of each, and the function at its end."""

    choices: tuple[Choice, ...]
    indices: tuple[int, ...]
    function: tirx.PrimFunc

    @property
    def decisions(self) -> dict[str, int]:
        """The decisions by name."""
        return {choice.name: choice.candidates[index] for choice, index in zip(self.choices, self.indices, strict=True)}


@dataclass
class _Unexplored:
    """The branches of each node that have not been followed to their end."""

    left: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def at(self, path: tuple[int, ...], choice: Choice) -> list[int]:
        """The open branches of a node."""
        return self.left.setdefault(path, list(range(len(choice.candidates))))

    def close(self, path: tuple[int, ...]) -> None:
        """Removes a path that was followed, and every branch that has no other path left."""
        while path:
            path, branch = path[:-1], path[-1]
            if branch in self.left[path]:
                self.left[path].remove(branch)
            if self.left[path]:
                return

    @property
    def any(self) -> bool:
        """Whether any path is left."""
        return bool(self.left.get(()))


@dataclass(frozen=True)
class Space:
    """All decisions that a template can take for a kernel.

    Attributes:
        kernel, target, template: the kernel, the target, and the template that takes the decisions.
        choices: the choices, in the order in which the template asks if its defaults are taken.
        function: the function with the defaults.
    """

    kernel: Kernel
    target: Target
    template: Template
    choices: tuple[Choice, ...]
    function: tirx.PrimFunc

    @staticmethod
    def of(kernel: Kernel, target: Target) -> Space:
        """Asks the template which decisions it takes.

        Raises:
            ScheduleError: there is no template.
        """
        template = template_for(kernel, target)
        walk = _Walk(lambda path, choice: choice.candidates.index(choice.default))
        function = template.apply(kernel, target, walk)
        return Space(kernel, target, template, tuple(walk.choices), function)

    @property
    def size(self) -> int:
        """Number of combinations, including those that give the same function.

        It is an estimate if choices depend on earlier ones.
        """
        size = 1
        for choice in self.choices:
            size *= len(choice.candidates)
        return size

    @property
    def default(self) -> tuple[int, ...]:
        """The template's own decisions, as indices."""
        return tuple(choice.candidates.index(choice.default) for choice in self.choices)

    def at(self, indices: Sequence[int]) -> Candidate:
        """The candidate at the end of a path.

        Raises:
            ScheduleError: the decisions do not fit the kernel or the target.
        """
        return self._follow(lambda path, choice: indices[len(path)])

    def _follow(self, pick: Callable[[tuple[int, ...], Choice], int]) -> Candidate:
        walk = _Walk(pick)
        function = self.template.apply(self.kernel, self.target, walk)
        return Candidate(tuple(walk.choices), walk.indices, function)

    def candidates(self, limit: int) -> list[Candidate]:
        """At most `limit` candidates whose functions differ, the defaults first.

        If there are more, the others are a random sample. It is the same each time, and a larger limit only adds to it.
        Decisions that do not fit the kernel or the target are left out.
        """
        default = Candidate(self.choices, self.default, self.function)
        found, seen = [default], {tvm_ffi.structural_hash(default.function)}
        unexplored, generator = _Unexplored(), random.Random(0)
        for depth, choice in enumerate(self.choices):
            unexplored.at(default.indices[:depth], choice)
        unexplored.close(default.indices)
        path: tuple[int, ...] = ()

        def pick(before: tuple[int, ...], choice: Choice) -> int:
            nonlocal path
            branch = generator.choice(unexplored.at(before, choice))
            path = (*before, branch)
            return branch

        while unexplored.any and len(found) < limit:
            try:
                candidate = self._follow(pick)
            except ScheduleError:
                unexplored.close(path)
                continue
            unexplored.close(candidate.indices)
            identity = tvm_ffi.structural_hash(candidate.function)
            if identity not in seen:
                seen.add(identity)
                found.append(candidate)
        return found


def to_schedule(candidate: Candidate) -> s_tir.Schedule:
    """A candidate for MetaSchedule, with its decisions on the trace."""
    module = tvm.IRModule({"main": candidate.function.with_attr("global_symbol", "main")})
    result = s_tir.Schedule(module, enable_check=False)
    for choice, index in zip(candidate.choices, candidate.indices, strict=True):
        count = len(choice.candidates)
        result.sample_categorical(list(choice.candidates), [1.0 / count] * count, decision=index)
    return result


def indices_of(trace: s_tir.schedule.Trace) -> tuple[int, ...]:
    """The path that `to_schedule` put on a trace."""
    decisions = trace.decisions
    return tuple(int(decisions[instruction]) for instruction in trace.insts)
