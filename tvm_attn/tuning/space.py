"""The decisions of a template for one kernel, as a search space.

What a template may choose can depend on its earlier choices, so a space is a tree: a node for each choice, a branch for
each of its candidates. Following a path means applying the template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import tvm_ffi
from tvm import tirx

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


Pick = Callable[[tuple[int, ...], Choice], int]
"""Takes the path so far and the next choice, and returns the index of a candidate."""


class _Walk:
    """A chooser that takes the branch (an index of a candidate) that `pick` returns, and records each choice."""

    def __init__(self, pick: Pick) -> None:
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
        return math.prod(len(choice.candidates) for choice in self.choices)

    @property
    def default(self) -> tuple[int, ...]:
        """The template's own decisions, as indices."""
        return tuple(choice.candidates.index(choice.default) for choice in self.choices)

    def at(self, decisions: Mapping[str, int]) -> Candidate | None:
        """The candidate with given decisions, the defaults for all others; None if they do not fit the kernel."""

        def pick(path: tuple[int, ...], choice: Choice) -> int:
            value = decisions.get(choice.name, choice.default)
            return choice.candidates.index(value) if value in choice.candidates else -1

        try:
            candidate = self.follow(pick)
        except (ScheduleError, IndexError):
            return None
        return candidate if -1 not in candidate.indices else None

    def follow(self, pick: Pick) -> Candidate:
        """The candidate at the end of the path that `pick` takes.

        Raises:
            ScheduleError: the decisions do not fit the kernel or the target.
        """
        walk = _Walk(pick)
        function = self.template.apply(self.kernel, self.target, walk)
        return Candidate(tuple(walk.choices), walk.indices, function)


class Explorer:
    """Walks through the candidates of a space, each function once."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._unexplored, self._seen = _Unexplored(), set[int]()
        for depth, choice in enumerate(space.choices):
            self._unexplored.at(space.default[:depth], choice)

    def take(self, candidate: Candidate) -> bool:
        """Marks a candidate as taken; false if its function was taken before."""
        for depth, choice in enumerate(candidate.choices):
            self._unexplored.at(candidate.indices[:depth], choice)
        self._unexplored.close(candidate.indices)
        identity = tvm_ffi.structural_hash(candidate.function)
        fresh = identity not in self._seen
        self._seen.add(identity)
        return fresh

    def next(self, pick: Callable[[Choice, Sequence[int]], int]) -> Candidate | None:
        """The next candidate that was not taken, and takes it; None if there are no more.

        Args:
            pick: chooses one of the open branches, indices into the choice's candidates.
        """
        path: tuple[int, ...] = ()

        def follow(before: tuple[int, ...], choice: Choice) -> int:
            nonlocal path
            branch = pick(choice, self._unexplored.at(before, choice))
            path = (*before, branch)
            return branch

        while self._unexplored.any:
            try:
                candidate = self._space.follow(follow)
            except ScheduleError:
                self._unexplored.close(path)
                continue
            if self.take(candidate):
                return candidate
        return None
