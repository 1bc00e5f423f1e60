"""Follows a graph from its inputs to its logits: what each node computes, as constants and `terms`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from tvm_attn.errors import shorten
from tvm_attn.onnx.constants import Unsupported, evaluate
from tvm_attn.onnx.reader import Graph, Node
from tvm_attn.onnx.terms import (
    Array,
    Const,
    Context,
    Linear,
    Scores,
    Space,
    Table,
    Term,
    Weights,
)

Value = Const | Term


class Refused(Exception):
    """A node that GPT-2 does not have; the message names it and says why."""


class Trace:
    """What the values of a graph are for concrete inputs.

    Attributes:
        space: the atoms.
        past_length: how many tokens precede those of the inputs.
        length: tokens of one sequence of the inputs.
        batch: sequences of the inputs.
        notes: what was simplified, one line each.
    """

    def __init__(self, opset: int, batch: int, length: int, past_length: int) -> None:
        self.space = Space()
        self.opset, self.batch, self.length, self.past_length = opset, batch, length, past_length
        self.notes: dict[str, None] = {}

    def run(self, graph: Graph, inputs: Mapping[str, Value], outputs: Sequence[str]) -> list[Value]:
        """The values of some outputs; only the nodes that they need are followed.

        Raises:
            Refused: a node does not belong to GPT-2.
        """
        return self._run(graph, dict(inputs), outputs)

    def _run(self, graph: Graph, outer: dict[str, Value], outputs: Sequence[str]) -> list[Value]:
        needed, nodes = set(outputs), []
        for node in reversed(graph.nodes):
            if needed.intersection(node.outputs):
                nodes.append(node)
                needed.update(filter(None, node.inputs))
                for value in node.attributes.values():
                    if isinstance(value, Graph):
                        needed.update(_free(value))
        uses = Counter(name for node in nodes for name in {*node.inputs, *(n for g in _graphs(node) for n in _free(g))})
        values = dict(outer)

        def get(name: str) -> Value | None:
            if name and name not in values and name in graph.initializers:
                values[name] = Const(graph.initializers[name].array())
            return values.get(name)

        for node in reversed(nodes):
            wanted = [get(name) for name in node.inputs]
            for name in (n for g in _graphs(node) for n in _free(g)):
                get(name)
            if any(name and value is None for name, value in zip(node.inputs, wanted, strict=True)):
                missing = next(n for n, v in zip(node.inputs, wanted, strict=True) if n and v is None)
                raise Refused(f"{node}: {shorten(missing)} has no value that GPT-2 would have there")
            for name, value in zip(node.outputs, self._node(node, wanted, values), strict=False):
                if name and value is not None:
                    values[name] = value
            for name in {*node.inputs}:
                uses[name] -= 1
                if not uses[name] and name not in outputs and name not in outer:
                    values.pop(name, None)
        found = [get(name) for name in outputs]
        if any(value is None for value in found):
            raise Refused("the logits are not computed")
        return [value for value in found if value is not None]

    def _node(self, node: Node, inputs: list[Value | None], values: dict[str, Value]) -> list[Value | None]:
        try:
            if node.op == "If":
                return [*self._branch(node, inputs[0], values)]
            if (function := RULES.get(node.op)) is not None and (
                "::" in node.op or any(isinstance(value, Term) for value in inputs) or node.op in _ALWAYS
            ):
                found = function(self, node, inputs)
            elif "::" in node.op or not all(value is None or isinstance(value, Const) for value in inputs):
                found = self._fallback(node, inputs)
            else:
                found = self.constants(node, inputs)
            return found if isinstance(found, list) else [found]
        except Unsupported as problem:
            raise Refused(f"{node}: {problem}") from None
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise Refused(f"{node}: its inputs do not fit it ({' '.join(str(error).split())[:100]})") from None

    def _branch(self, node: Node, condition: Value | None, values: dict[str, Value]) -> list[Value]:
        if not isinstance(condition, Const) or condition.array.size != 1:
            raise Unsupported("its condition depends on the weights")
        graph = node.attributes["then_branch" if condition.array.reshape(()) else "else_branch"]
        wanted = [value.name for value, output in zip(graph.outputs, node.outputs, strict=False)]
        needed = [name for name, output in zip(wanted, node.outputs, strict=False) if output in self._wanted]
        found = dict(zip(needed, self._run(graph, values, needed), strict=True))
        return [found.get(name) for name in wanted]  # type: ignore[misc]

    _wanted: frozenset[str] = frozenset()

    def only(self, outputs: Sequence[str]) -> None:
        """Branches are followed for these outputs alone."""
        self._wanted = frozenset(outputs)

    def constants(self, node: Node, inputs: list[Value | None]) -> list[Value | None]:
        """The outputs of a node all of whose inputs are constants."""
        arrays = [None if value is None else value.array for value in inputs if not isinstance(value, Term)]
        found: list[Value | None] = [Const(array) for array in evaluate(node, arrays, self.opset)]
        first = inputs[0] if inputs else None
        if isinstance(first, Const) and first.marks is not None and node.op in _KEEPS_TOKENS:
            marks = evaluate(node, [first.marks, *arrays[1:]], self.opset) if node.op != "Cast" else [first.marks]
            found[0] = Const(found[0].array, marks[0], first.source)  # type: ignore[union-attr]
        return found

    def _fallback(self, node: Node, inputs: list[Value | None]) -> list[Value | None]:
        """Rows of a table that turned out to be numbers of a mask are constants after all."""
        plain = [self.constant(value) if isinstance(value, Term) else value for value in inputs]
        if "::" in node.op or any(isinstance(value, Term) for value in plain):
            raise Unsupported("GPT-2 has no such operator there")
        return self.constants(node, plain)

    def constant(self, term: Term) -> Value:
        """A term as a constant, if it is one."""
        total = np.zeros(term.shape, np.float32) if term.shift is None else np.broadcast_to(term.shift, term.shape)
        for part in term.parts:
            atom = self.space.of(part)
            if not isinstance(atom, Table) or not atom.rows:
                return term
            values = atom.weight.reshape(-1)[part.ids - atom.start]
            total = total + (values if part.scale is None else values * part.scale)
        return Const(total)

    # Building blocks of the rules.

    def linear(self, x: Term, weight: Array, node: str, bias: Array | None = None) -> Term:
        """x @ weight, with `weight` (in, out)."""
        if weight.ndim > 2:
            weight = weight.reshape(weight.shape[-2:])
        if weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
            raise Unsupported(f"it multiplies {x.shape} with {weight.shape}")
        if len(x.parts) > 1 or (x.shift is not None and isinstance(self.space.of(x.parts[0]), Linear)):
            found = self.space.pointwise(x)
            if found is None:
                raise Unsupported("it multiplies a sum with a matrix; GPT-2 normalizes it first")
            x = self.space.apply(x, lambda z: z, node)
        placed = self.space.placed(x.parts[0])
        if placed is None:
            raise Unsupported("the rows of its input are not those of tokens")
        _, tokens, _ = placed
        count = max(int(tokens.max(initial=0)) + 1, self.batch * self.length)
        new = self.space.add(Linear(node, (count, weight.shape[1]), x, weight, None))
        result = self.space.rows(new, tokens, weight.shape[1])
        return result if bias is None else self.space.plus(result, bias)

    def multiply(self, a: Term, b: Term, node: str) -> Term:
        """Queries times keys, or attention weights times values."""
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a = self.spread(a, (*lead, *a.shape[-2:]))
        b = self.spread(b, (*lead, *b.shape[-2:]))
        if len(a.parts) != 1 or len(b.parts) != 1 or a.shape[-1] != b.shape[-2]:
            raise Unsupported("it multiplies two tensors that GPT-2 does not multiply")
        groups = prod(lead)
        shape = (groups, a.shape[-2], b.shape[-1])
        left = self.space.view(a, lambda i: i.reshape(groups, *i.shape[-2:]))
        atom = self.space.of(left.parts[0])
        if isinstance(atom, Weights):
            right = self.space.view(b, lambda i: i.reshape(groups, *i.shape[-2:]))
            if not left.plain or not np.array_equal(
                left.parts[0].ids.reshape(-1) - atom.start, range(prod(atom.shape))
            ):
                raise Unsupported("it does not multiply the weights of attention, as they are, with the values")
            queries = self.space.row_tokens(atom.scores.q.parts[0])
            if queries is None:
                raise Unsupported("its queries are not those of tokens")
            new = self.space.add(Context(node, shape, atom, right, queries, max(groups // self.batch, 1)))
        else:
            right = self.space.view(b, lambda i: np.swapaxes(i.reshape(groups, *i.shape[-2:]), 1, 2))
            new = self.space.add(Scores(node, shape, left, right))
        whole = self.space.whole(new)
        return self.space.view(whole, lambda i: i.reshape(*lead, *shape[1:]))

    def spread(self, term: Term, shape: tuple[int, ...]) -> Term:
        """A term broadcast to a shape."""
        return term if term.shape == shape else self.space.view(term, lambda i: np.broadcast_to(i, shape))

    def softmax(self, term: Term, node: str) -> Term:
        """The softmax of masked scores over the last axis."""
        tables = [part for part in term.parts if isinstance(self.space.of(part), Table)]
        if tables:  # a mask that looked like rows of a table
            mask = self.constant(Term(term.shape, tuple(tables), term.shift))
            if isinstance(mask, Const):
                term = Term(term.shape, tuple(p for p in term.parts if p not in tables), mask.array)
        atom = self.space.of(term.parts[0]) if len(term.parts) == 1 else None
        if not isinstance(atom, Scores):
            raise Unsupported("its input is not the scores of one attention head")
        part = term.parts[0]
        local = part.ids - atom.start
        size, keys = prod(atom.shape), atom.shape[2]
        if local.size != size or (local % keys != np.arange(keys)).any() or len(np.unique(local)) != size:
            raise Unsupported("its input is not all scores of attention")
        scale, shift = np.ones(size), np.zeros(size)
        if part.scale is not None:
            scale[local.reshape(-1)] = np.broadcast_to(part.scale, term.shape).reshape(-1)
        if term.shift is not None:
            shift[local.reshape(-1)] = np.broadcast_to(term.shift, term.shape).reshape(-1)
        new = self.space.add(Weights(node, atom.shape, atom, scale.reshape(atom.shape), shift.reshape(atom.shape)))
        return self.space.view(self.space.whole(new), lambda i: i.reshape(-1)[local])

    def heads(self, term: Term, count: int) -> Term:
        """(B, T, H * D) to (B, H, T, D)."""
        return self.space.view(term, lambda i: np.swapaxes(i.reshape(*i.shape[:2], count, -1), 1, 2))

    def attend(
        self,
        q: Term,
        k: Term,
        v: Term,
        node: str,
        scale: float | None,
        masks: Sequence[Array] = (),
        causal: bool = False,
    ) -> Term:
        """Attention of (B, H, T, D) queries over (B, H, S, D) keys with additive masks: (B, H, T, D)."""
        if k.shape[1] != q.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = (self.space.view(x, lambda i: np.repeat(i, repeats, 1)) for x in (k, v))
        scores = self.multiply(q, self.space.view(k, lambda i: np.swapaxes(i, -1, -2)), node)
        scores = self.space.times(scores, np.array(q.shape[-1] ** -0.5 if scale is None else scale))
        for mask in masks:
            scores = self.space.plus(scores, mask)
        if causal:
            rows, columns = np.ogrid[: scores.shape[-2], : scores.shape[-1]]
            future = columns > rows + scores.shape[-1] - scores.shape[-2]
            scores = self.space.plus(scores, np.where(future, -np.inf, 0))
        return self.multiply(self.softmax(scores, node), v, node)


Rule = Callable[[Trace, Node, list[Value | None]], Any]
RULES: dict[str, Rule] = {}
"""What nodes do with terms, by operator."""
_ALWAYS = ("Cast", "Gather", "Slice")  # rules that also see constants
_KEEPS_TOKENS = (
    *("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose"),
    "Unsqueeze",
)


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def array(value: Value | None) -> Array:
    """The values of an input that must be a constant."""
    if not isinstance(value, Const):
        raise Unsupported("an input that is a constant in GPT-2 depends on the weights, or is absent")
    return value.array


def term(value: Value | None) -> Term:
    """An input that must depend on the weights."""
    if not isinstance(value, Term):
        raise Unsupported("it computes with constants what GPT-2 computes with hidden states")
    return value


def _graphs(node: Node) -> list[Graph]:
    return [value for value in node.attributes.values() if isinstance(value, Graph)]


def _free(graph: Graph) -> set[str]:
    """Names that a graph takes from outside."""
    own = {name for node in graph.nodes for name in node.outputs} | {*graph.initializers}
    own |= {value.name for value in graph.inputs}
    used = {name for node in graph.nodes for name in node.inputs if name}
    used |= {value.name for value in graph.outputs}
    return (used | {name for node in graph.nodes for inner in _graphs(node) for name in _free(inner)}) - own
