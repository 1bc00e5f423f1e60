"""What a graph computes, as far as GPT-2 needs it: weighted sums of elements of a few kinds of tensors.

A graph is followed with concrete sizes and concrete numbers for everything that does not depend on the weights: shapes,
positions and masks are constants. Everything else is a `Term`. Each of its elements is a sum of scale * element + shift
where the elements belong to `Atom`s: tensors that a matrix product, a normalization or a softmax made. So reshaping,
splitting, joining and transposing only move the numbers of elements around, and scales, biases and masks of every form
end up in `scale` and `shift`. How an exporter writes them does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from tvm_attn.onnx.constants import MAX_ELEMENTS, Unsupported

Array = np.ndarray
Function = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Const:
    """A constant.

    Attributes:
        array: its values.
        marks: if these are the token ids of a graph's input, the number of the token at each place.
        source: then, the input's name.
    """

    array: Array
    marks: Array | None = None
    source: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(eq=False)
class Atom:
    """A tensor whose elements terms refer to.

    Attributes:
        node: what made it, for messages.
        shape: in a fixed order: (tokens, features) unless the class says otherwise.
        start: the number of its first element.
    """

    node: str
    shape: tuple[int, ...]
    start: int = field(default=-1, init=False)

    def place(self, local: Array) -> tuple[Array, Array]:
        """Token and feature of elements."""
        return local // self.shape[-1], local % self.shape[-1]


@dataclass(eq=False)
class Table(Atom):
    """Rows of a constant matrix: one for each token, or, if `rows` is set, those of that range of positions."""

    weight: Array
    source: str = ""
    rows: bool = False


@dataclass(eq=False)
class Past(Atom):
    """A past key or value, in the shape of the graph's input."""

    name: str


@dataclass(eq=False)
class Linear(Atom):
    """x @ weight + bias."""

    x: Term
    weight: Array
    bias: Array | None


@dataclass(eq=False)
class Mean(Atom):
    """The mean of x for each token, (tokens, 1)."""

    x: Term


@dataclass(eq=False)
class Centered(Atom):
    """x minus its mean."""

    x: Term


@dataclass(eq=False)
class Variance(Atom):
    """The mean of the squares of centered values, (tokens, 1)."""

    centered: Centered


@dataclass(eq=False)
class Norm(Atom):
    """x minus its mean, divided by sqrt(variance + epsilon)."""

    x: Term
    epsilon: float


@dataclass(eq=False)
class Pointwise(Atom):
    """A function of each element of another atom, whose shape and order it has."""

    root: Atom
    function: Function

    def place(self, local: Array) -> tuple[Array, Array]:
        return self.root.place(local)


@dataclass(eq=False)
class Scores(Atom):
    """Products of queries (groups, T, D) and keys (groups, S, D): (groups, T, S)."""

    q: Term
    k: Term


@dataclass(eq=False)
class Weights(Atom):
    """softmax(scores * scale + shift), (groups, T, S)."""

    scores: Scores
    scale: Array
    shift: Array


@dataclass(eq=False)
class Context(Atom):
    """weights @ v, (groups, T, F); `tokens` are those of the queries, (groups, T)."""

    weights: Weights
    v: Term
    tokens: Array
    heads: int

    def place(self, local: Array) -> tuple[Array, Array]:
        groups, rows, features = np.unravel_index(local, self.shape)
        return self.tokens[groups, rows], groups % self.heads * self.shape[2] + features


@dataclass(frozen=True, eq=False)
class Part:
    """One summand of a term: numbers of elements, -1 for none, and their factors (None: 1), broadcast to `ids`."""

    ids: Array
    scale: Array | None = None


@dataclass(frozen=True, eq=False)
class Term:
    """A sum of parts plus `shift` (None: 0), which broadcasts to `shape`."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    shift: Array | None = None

    @cached_property
    def plain(self) -> bool:
        """Whether it is one part without scale and shift."""
        return len(self.parts) == 1 and self.parts[0].scale is None and self.shift is None


class Space:
    """All atoms of a graph, and the algebra of terms."""

    def __init__(self) -> None:
        self.atoms: list[Atom] = []
        self._starts: list[int] = []
        self._next = 0

    def add(self, atom: Atom) -> Any:
        """Gives an atom its numbers, and returns it."""
        if any(size < 0 for size in atom.shape) or prod(atom.shape) > MAX_ELEMENTS:
            raise Unsupported(f"a tensor of shape {atom.shape} is too large; export the model with symbolic sizes")
        atom.start = self._next
        self._next += prod(atom.shape)
        self.atoms.append(atom)
        self._starts.append(atom.start)
        return atom

    def atom(self, number: int) -> Atom:
        """The atom that an element belongs to."""
        return self.atoms[int(np.searchsorted(self._starts, number, "right")) - 1]

    def of(self, part: Part) -> Atom | None:
        """The atom of a part; None if it has elements of several, or gaps."""
        if not part.ids.size:
            return None
        low, high = int(part.ids.min()), int(part.ids.max())
        if low < 0:
            return None
        atom = self.atom(low)
        return atom if high < atom.start + prod(atom.shape) else None

    def whole(self, atom: Atom) -> Term:
        """All of an atom, in its shape."""
        ids = np.arange(atom.start, atom.start + prod(atom.shape)).reshape(atom.shape)
        return Term(atom.shape, (Part(ids),))

    def rows(self, atom: Atom, tokens: Array, features: int) -> Term:
        """The rows of an atom (tokens, features) that belong to tokens of any arrangement."""
        ids = atom.start + tokens[..., None] * features + np.arange(features)
        return Term(ids.shape, (Part(ids),))

    def placed(self, part: Part) -> tuple[Atom, Array, Array] | None:
        """Atom, tokens (...,) and features (F,) of a part whose last axis holds features; None if it is not such."""
        atom = self.of(part)
        if atom is None or part.ids.ndim == 0:
            return None
        tokens, features = atom.place(part.ids - atom.start)
        first, columns = tokens[..., 0], features.reshape(-1, features.shape[-1])[0]
        if (tokens != first[..., None]).any() or (features != columns).any():
            return None
        return atom, first, columns

    def row_tokens(self, part: Part) -> Array | None:
        """The token of each row of the last axis; None if a row has elements of several tokens or atoms."""
        atom = self.of(part)
        if atom is None or not part.ids.ndim:
            return None
        tokens, _ = atom.place(part.ids - atom.start)
        return tokens[..., 0] if (tokens == tokens[..., :1]).all() else None

    # Moving elements.

    def view(self, term: Term, move: Callable[[Array], Array]) -> Term:
        """A term whose elements are moved, repeated or left out as `move` does with an array of its shape."""
        index = move(np.arange(prod(term.shape)).reshape(term.shape))
        if index.size > MAX_ELEMENTS:
            raise Unsupported("its result is too large")

        def moved(array: Array | None) -> Array | None:
            if array is None or array.size == 1:
                return array
            return np.broadcast_to(array, term.shape).reshape(-1)[index]

        parts = tuple(
            Part(np.broadcast_to(part.ids, term.shape).reshape(-1)[index], moved(part.scale)) for part in term.parts
        )
        return Term(index.shape, parts, moved(term.shift))

    def joined(self, values: Sequence[Term | Const], join: Callable[[list[Array]], Array]) -> Term:
        """A term made of the elements of several values, in the way that `join` arranges arrays of their shapes."""
        starts = np.cumsum([0, *(prod(value.shape) for value in values)])
        index = join(
            [start + np.arange(prod(v.shape)).reshape(v.shape) for start, v in zip(starts, values, strict=False)]
        )
        terms = [value for value in values if isinstance(value, Term)]
        if any(len(term.parts) != 1 for term in terms):
            raise Unsupported("it joins sums, which GPT-2 does not")

        def gathered(pick: Callable[[Term | Const], Array]) -> Array:
            flat = [np.broadcast_to(pick(value), value.shape).reshape(-1) for value in values]
            result: Array = np.concatenate(flat)[index]
            return result

        def ids(value: Term | Const) -> Array:
            return value.parts[0].ids if isinstance(value, Term) else np.array(-1)

        def scale(value: Term | Const) -> Array:
            found = value.parts[0].scale if isinstance(value, Term) else None
            return np.array(1, np.float32) if found is None else found

        def shift(value: Term | Const) -> Array:
            found = value.shift if isinstance(value, Term) else value.array
            return np.array(0, np.float32) if found is None else found

        scaled = any(term.parts[0].scale is not None for term in terms)
        shifted = any(term.shift is not None if isinstance(term, Term) else bool(term.array.size) for term in values)
        part = Part(gathered(ids), gathered(scale) if scaled else None)
        return Term(index.shape, (part,), gathered(shift) if shifted else None)

    # Arithmetic.

    def times(self, term: Term, factor: Array) -> Term:
        """A term times a constant."""
        factor = widened(factor)
        shape = np.broadcast_shapes(term.shape, factor.shape)
        if factor.size and (factor == 1).all() and shape == term.shape:
            return term
        parts = tuple(Part(_spread(p.ids, shape), factor if p.scale is None else p.scale * factor) for p in term.parts)
        return Term(shape, parts, None if term.shift is None else term.shift * factor)

    def plus(self, term: Term, shift: Array) -> Term:
        """A term plus a constant; the bias of a matrix product becomes part of it."""
        shift = widened(shift)
        shape = np.broadcast_shapes(term.shape, shift.shape)
        if not shift.any() and shape == term.shape:
            return term
        if shape == term.shape and (biased := self._biased(term, shift)) is not None:
            return biased
        parts = tuple(Part(_spread(part.ids, shape), part.scale) for part in term.parts)
        return Term(shape, parts, shift if term.shift is None else term.shift + shift)

    def _biased(self, term: Term, shift: Array) -> Term | None:
        """The term with the bias added to the newest of its matrix products that has none."""
        bias = shift.reshape(-1)
        if term.shape[-1:] != bias.shape or term.shift is not None:
            return None
        for index in reversed(range(len(term.parts))):
            part = term.parts[index]
            placed = self.placed(part) if part.scale is None else None
            linear, _, columns = placed or (None, None, np.empty(0))
            if not isinstance(linear, Linear) or linear.bias is not None:
                continue
            if not np.array_equal(columns, np.arange(linear.shape[1])):
                continue
            new = self.add(Linear(linear.node, linear.shape, linear.x, linear.weight, bias))
            parts = [*term.parts]
            parts[index] = Part(part.ids - linear.start + new.start)
            return Term(term.shape, tuple(parts))
        return None

    def sum(self, a: Term, b: Term, node: str) -> Term:
        """a + b."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        if prod(shape) > MAX_ELEMENTS:
            raise Unsupported("its result is too large")
        parts = tuple(Part(_spread(part.ids, shape), part.scale) for part in (*a.parts, *b.parts))
        shift = b.shift if a.shift is None else a.shift if b.shift is None else a.shift + b.shift
        total = Term(shape, parts, shift)
        return self._centered(total, node) or total

    def _centered(self, term: Term, node: str) -> Term | None:
        """x minus its mean, if the term is that."""
        for part in term.parts:
            atom = self.of(part)
            if isinstance(atom, Mean) and part.scale is not None and (part.scale == -1).all():
                rest = Term(term.shape, tuple(p for p in term.parts if p is not part), term.shift)
                tokens, _ = atom.place(part.ids - atom.start)
                if self.same(rest, atom.x):
                    new = self.add(Centered(node, (atom.shape[0], term.shape[-1]), atom.x))
                    return self.rows(new, tokens[..., 0], term.shape[-1])
        return None

    def same(self, a: Term, b: Term) -> bool:
        """Whether two terms are the same sum."""
        if a.shape != b.shape or len(a.parts) != len(b.parts) or not _equal(a.shift, b.shift):
            return False
        left = sorted(a.parts, key=_first)
        right = sorted(b.parts, key=_first)
        return all(np.array_equal(p.ids, q.ids) and _equal(p.scale, q.scale) for p, q in zip(left, right, strict=True))

    def pointwise(self, term: Term) -> tuple[Atom, Array, Function] | None:
        """Atom, elements and function, if the term is a function of each element of one atom."""
        root: Atom | None = None
        places: Array | None = None
        functions: list[tuple[float, Function]] = []
        for part in term.parts:
            atom, factor = self.of(part), scalar(part.scale, 1)
            if atom is None or factor is None:
                return None
            local = part.ids - atom.start
            inner: Function = atom.function if isinstance(atom, Pointwise) else _identity
            atom = atom.root if isinstance(atom, Pointwise) else atom
            if places is not None and (atom is not root or not np.array_equal(places, local)):
                return None
            root, places = atom, local
            functions.append((factor, inner))
        shift = scalar(term.shift, 0)
        if root is None or places is None or shift is None:
            return None

        def total(z: Array) -> Array:
            result = np.full(np.shape(z), shift)
            for factor, function in functions:
                result = result + factor * function(z)
            return result

        return root, places, total

    def apply(self, term: Term, function: Function, node: str) -> Term:
        """A function of each element."""
        found = self.pointwise(term)
        if found is None:
            raise Unsupported("it applies a function to a sum that GPT-2 does not apply one to")
        root, places, inner = found
        new = self.add(Pointwise(node, root.shape, root, lambda z: function(inner(z))))
        return Term(term.shape, (Part(places + new.start),))

    def product(self, a: Term, b: Term, node: str, divide: bool = False) -> Term:
        """a * b or a / b of two terms: a normalization, or functions of the same elements."""
        if (normal := self._normalized(a, b, node, divide)) is not None:
            return normal
        if not divide and (normal := self._normalized(b, a, node, False)) is not None:
            return normal
        left, right = self.pointwise(a), self.pointwise(b)
        if left is None or right is None or left[0] is not right[0] or not np.array_equal(left[1], right[1]):
            raise Unsupported("it multiplies two tensors that GPT-2 does not multiply")
        f, g = left[2], right[2]
        new = self.add(
            Pointwise(node, left[0].shape, left[0], (lambda z: f(z) / g(z)) if divide else (lambda z: f(z) * g(z)))
        )
        return Term(a.shape, (Part(left[1] + new.start),))

    def _normalized(self, a: Term, b: Term, node: str, divide: bool) -> Term | None:
        """Centered values divided by their standard deviation."""
        atom = self.of(a.parts[0]) if a.plain else None
        found = self.pointwise(b)
        if not isinstance(atom, Centered) or found is None or not isinstance(found[0], Variance):
            return None
        if found[0].centered is not atom:
            return None
        numbers = np.array([0.0, 1.0, 100.0])
        with np.errstate(all="ignore"):
            rates = found[2](numbers)
            rates = 1 / rates if divide else rates
            epsilon = float(rates[0]) ** -2
        if not 0 < epsilon < 1 or not np.allclose(rates, (numbers + epsilon) ** -0.5, rtol=1e-6):
            raise Unsupported("it scales centered values by something else than their standard deviation")
        new = self.add(Norm(node, atom.shape, atom.x, shortest(epsilon)))
        return Term(a.shape, (Part(a.parts[0].ids - atom.start + new.start),))

    def mean(self, term: Term, node: str) -> Term:
        """The mean over the last axis, which stays with size 1."""
        found = self.pointwise(term)
        atom, places, function = found or (None, np.empty(0), _identity)
        if isinstance(atom, Centered):
            numbers = np.array([2.0, -3.0, 0.5])
            tokens = places[..., 0] // atom.shape[1]
            if np.allclose(function(numbers), numbers**2, rtol=1e-9) and atom.shape[1] == term.shape[-1]:
                return self.rows(self.add(Variance(node, (atom.shape[0], 1), atom)), tokens, 1)
        tokens, count = self.tokens(term)
        return self.rows(self.add(Mean(node, (count, 1), term)), tokens, 1)

    def normalize(self, term: Term, epsilon: float, node: str) -> Term:
        """The normalization of LayerNorm over the last axis."""
        tokens, count = self.tokens(term)
        new = self.add(Norm(node, (count, term.shape[-1]), term, shortest(epsilon)))
        return self.rows(new, tokens, term.shape[-1])

    def tokens(self, term: Term) -> tuple[Array, int]:
        """The tokens of a term (..., features), and how many there are."""
        for part in term.parts:
            placed = self.placed(part)
            if placed is None:
                break
            atom, tokens, columns = placed
            if not np.array_equal(columns, np.arange(term.shape[-1])):
                break
            if not (isinstance(atom, Table) and atom.rows):
                count = atom.tokens.max() + 1 if isinstance(atom, Context) else atom.shape[0]
                return tokens, int(count)
        raise Unsupported("its input is no hidden state of tokens")


def scalar(array: Array | None, default: float) -> float | None:
    """The one number that an array holds; `default` for None, None if it holds several."""
    if array is None:
        return default
    return float(array.flat[0]) if array.size and (array == array.flat[0]).all() else None


def widened(array: Array) -> Array:
    """Floats of at least 32 bits."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def shortest(number: float) -> float:
    """The number with the fewest digits that rounds to the same float32, which is what an exporter was given."""
    for digits in range(1, 9):
        text = f"{number:.{digits}g}"
        if np.float32(text) == np.float32(number):
            return float(text)
    return number


def _identity(z: Array) -> Array:
    return z


def _first(part: Part) -> int:
    return int(part.ids.flat[0]) if part.ids.size else -1


def _equal(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and np.array_equal(a, b))


def _spread(array: Array, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(array, shape)
