"""From the logits of a traced graph back to GPT-2's configuration and canonical parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tvm_attn.config import ACTIVATIONS, GPT2Config
from tvm_attn.errors import ConfigError, one_line
from tvm_attn.onnx.rules import erf_gelu, tanh_gelu
from tvm_attn.onnx.terms import (
    Array,
    Atom,
    Context,
    Function,
    Linear,
    Norm,
    Past,
    Pointwise,
    Table,
    Term,
    Weights,
    scalar,
)
from tvm_attn.onnx.trace import Refused, Trace, Value


def _rounded_gelus(dtype: Any) -> list[tuple[str, Function]]:
    """GELU with constants of 16 bits. Those of bfloat16 change it more than gelu and gelu_new differ."""
    exact = (0.044715, (2 / np.pi) ** 0.5, 0.5**0.5, 2**0.5)
    cubic, root, width, divisor = (float(np.asarray(number).astype(dtype)) for number in exact)
    return [
        ("gelu_new", lambda z: 0.5 * z * (1 + np.tanh(root * (z + cubic * z**3)))),
        ("gelu", lambda z: z * erf_gelu(z * width * 2**0.5) / (z * width * 2**0.5)),
        ("gelu", lambda z: z * erf_gelu(z * 2**0.5 / divisor) / (z * 2**0.5 / divisor)),
    ]


_ACTIVATIONS: list[tuple[str, Function]] = [
    ("gelu_new", tanh_gelu),
    ("gelu", erf_gelu),
    ("relu", lambda z: np.maximum(z, 0)),
    ("silu", lambda z: z / (1 + np.exp(-z))),
    ("tanh", np.tanh),
    *_rounded_gelus(np.float16),
    *_rounded_gelus(ml_dtypes.bfloat16),
]
_ACTIVATION_ERROR = 1e-4
"""Less than a third of what gelu and gelu_new differ by."""
_HIDDEN = -1000.0
"""What is added to a score that is masked, or less; GPT-2 itself was trained with -10,000."""


@dataclass(frozen=True, eq=False)
class Recovered:
    """GPT-2 as a graph computes it.

    Attributes:
        config: without token ids.
        params: canonical parameters, views of the file's tensors where the forms agree.
        notes: what the user should know, one line each.
        tokens: the input that holds the token ids.
    """

    config: GPT2Config
    params: dict[str, Array]
    notes: tuple[str, ...]
    tokens: str


@dataclass(frozen=True, eq=False)
class _Block:
    params: dict[str, Array]
    heads: int
    scale: float
    activation: str
    epsilons: tuple[float, float]


def recover(trace: Trace, logits: Value) -> Recovered:
    """Configuration and parameters of the model whose logits these are.

    Raises:
        Refused: they are not those of a GPT-2; the message says what does not fit.
    """
    return _Recovery(trace, logits).result()


class _Recovery:
    def __init__(self, trace: Trace, logits: Value) -> None:
        self._trace, self._space = trace, trace.space
        self._logits = logits
        self._notes = dict(trace.notes)
        self._tokens = ""

    def result(self) -> Recovered:
        head, final = self._head(self._logits)
        norm, weight, bias = self._affine(final, "the head")
        params: dict[str, Array] = {}
        tables, blocks_atoms = self._residual(norm.x, norm.node)
        if not blocks_atoms or len(blocks_atoms) % 2:
            raise Refused(f"{norm.node}: it reads a sum of {len(blocks_atoms)} blocks' results; GPT-2 adds two a block")
        blocks = [
            self._block(index // 2, blocks_atoms[:index], blocks_atoms[index], blocks_atoms[index + 1], tables)
            for index in range(0, len(blocks_atoms), 2)
        ]
        wte, wpe = self._tables(norm.x, tables, head)
        params |= {"wte.weight": wte, "wpe.weight": wpe}
        for layer, block in enumerate(blocks):
            params |= {f"h.{layer}.{name}": array for name, array in block.params.items()}
        params |= {"ln_f.weight": weight, "ln_f.bias": bias}
        tied = head is None or head is wte or (head.shape == wte.shape and np.array_equal(head, wte))
        if not tied:
            params["lm_head.weight"] = head  # type: ignore[assignment]
        config = self._config(blocks, norm, params, tied)
        return Recovered(config, params, tuple(self._notes), self._tokens)

    # The head and the embeddings.

    def _head(self, logits: Value) -> tuple[Array | None, Term]:
        """The matrix of the head (vocabulary, width), None if there is none, and its input."""
        if not isinstance(logits, Term):
            raise Refused("the logits do not depend on the weights")
        placed = self._space.placed(logits.parts[0]) if len(logits.parts) == 1 else None
        if placed is None:
            raise Refused("the graph's first result is neither logits nor the output of a LayerNorm")
        atom, _, columns = placed
        if isinstance(atom, Norm):
            self._notes["the file ends before the head; the token embeddings are the head, as in GPT-2"] = None
            return None, logits
        if not isinstance(atom, Linear) or not np.array_equal(columns, np.arange(atom.shape[1])):
            raise Refused(f"{atom.node}: its result, the graph's first, is not the product with a head")
        if not logits.plain or (atom.bias is not None and atom.bias.any()):
            raise Refused(f"{atom.node}: its result, the logits, is scaled or has a bias, which GPT-2 does not have")
        return _float(atom.weight).T, atom.x

    def _tables(self, x: Term, tables: list[Table], head: Array | None) -> tuple[Array, Array]:
        """Token and position embeddings."""
        positions = [table for table in tables if table.rows]
        tokens = [table for table in tables if not table.rows]
        if len(tokens) == 2 and not positions:
            size = None if head is None else len(head)
            same = [t for t in tokens if head is not None and np.shares_memory(t.weight, head)]
            named = [t for t in tokens if "pos" not in t.source.lower()]
            fits = [t for t in tokens if len(t.weight) == size]
            chosen = next((found for found in (same, fits, named) if len(found) == 1), tokens)[0]
            positions = [t for t in tokens if t is not chosen]
            tokens = [chosen]
        if len(tokens) != 1:
            raise Refused(f"the hidden states begin as a sum of {len(tokens)} embeddings of tokens; GPT-2 has one")
        wte, self._tokens = _float(tokens[0].weight), tokens[0].source
        if x.shift is not None and not positions:  # computed when the model was exported
            shift = np.broadcast_to(x.shift, x.shape).reshape(-1, self._trace.length, x.shape[-1])
            if (shift != shift[0]).any():
                raise Refused("the sum of embeddings has a constant that depends on the sequence")
            self._notes[f"the file holds the embeddings of {len(shift[0])} positions only"] = None
            return wte, shift[0]
        if x.shift is not None or len(positions) != 1:
            raise Refused("the hidden states do not begin as the sum of a token's and a position's embedding")
        wpe = _float(positions[0].weight)
        if wte.shape[1] != x.shape[-1] or wpe.shape[1] != x.shape[-1]:
            raise Refused("the embeddings have another width than the hidden states")
        if head is not None and head.shape != wte.shape:
            raise Refused(f"the head is {head.shape}, and the token embeddings are {wte.shape}")
        return wte, wpe

    def _residual(self, x: Term, node: str) -> tuple[list[Table], list[Linear]]:
        """Tables and matrix products whose plain sum a term is, in the order of the graph."""
        tables, blocks = [], []
        tokens: Array | None = None
        for part in x.parts:
            placed = self._space.placed(part)
            if placed is None or not np.array_equal(placed[2], np.arange(x.shape[-1])):
                raise Refused(f"{node}: its input is not a sum of embeddings and of what blocks add to them")
            atom, rows, _ = placed
            if part.scale is not None:
                raise Refused(f"{atom.node}: its result is scaled before it is added to the hidden states")
            if isinstance(atom, Table) and atom.rows:
                tables.append(atom)
                continue
            if tokens is not None and not np.array_equal(tokens, rows):
                raise Refused(f"{atom.node}: its result is added to the hidden states of other tokens")
            tokens = rows
            if isinstance(atom, Table):
                tables.append(atom)
            elif isinstance(atom, Linear):
                blocks.append(atom)
            else:
                raise Refused(f"{atom.node}: its result is added to the hidden states, which GPT-2 does not do")
        return tables, sorted(blocks, key=lambda atom: atom.start)

    def _affine(self, x: Term, reader: str) -> tuple[Norm, Array, Array]:
        """The normalization that a term is, and LayerNorm's weight and bias."""
        placed = self._space.placed(x.parts[0]) if len(x.parts) == 1 else None
        norm, _, columns = placed or (None, None, np.empty(0))
        if not isinstance(norm, Norm):
            what = f"{norm.node}: it" if norm else "a sum"
            raise Refused(f"{what} is read by {reader} where GPT-2 has a LayerNorm")
        width = norm.shape[1]
        if not np.array_equal(columns, np.arange(width)):
            raise Refused(f"{norm.node}: its result is permuted")
        weight = _vector(x.parts[0].scale, x.shape, 1.0)
        bias = _vector(x.shift, x.shape, 0.0)
        if weight is None or bias is None:
            raise Refused(f"{norm.node}: its weight or bias differs between tokens")
        return norm, weight, bias

    # Blocks.

    def _block(self, layer: int, before: list[Linear], attention: Linear, mlp: Linear, tables: list[Table]) -> _Block:
        context = self._space.placed(attention.x.parts[0])
        if context is None or not isinstance(context[0], Context) or len(attention.x.parts) != 1:
            raise Refused(f"{attention.node}: block {layer} adds its result first, and it does not read attention")
        first, heads, scale, params = self._attention(layer, context[0])
        self._same_residual(first, tables, before)
        projection = _float(attention.weight)
        order = context[2]
        if scalar(attention.x.parts[0].scale, 1) != 1 or attention.x.shift is not None:
            raise Refused(f"{attention.node}: it scales or shifts the result of attention")
        if len(order) != heads * context[0].shape[2] or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise Refused(f"{attention.node}: it does not read all heads of attention")
        if not np.array_equal(order, np.arange(len(order))):
            projection = projection[np.argsort(order)]
        params |= {"attn.c_proj.weight": projection, "attn.c_proj.bias": _bias(attention)}
        second, more, activation = self._mlp(layer, mlp)
        self._same_residual(second, tables, [*before, attention])
        return _Block(params | more, heads, scale, activation, (first.epsilon, second.epsilon))

    def _same_residual(self, norm: Norm, tables: list[Table], before: list[Linear]) -> None:
        found, blocks = self._residual(norm.x, norm.node)
        if blocks != before or {id(table) for table in found} != {id(table) for table in tables}:
            raise Refused(
                f"{norm.node}: it reads a sum of {len(blocks)} blocks' results where GPT-2 adds {len(before)}; "
                "GPT-2's MLP follows its attention"
            )

    def _mlp(self, layer: int, mlp: Linear) -> tuple[Norm, dict[str, Array], str]:
        found = self._space.pointwise(mlp.x)
        root = found[0] if found else None
        if found is None or not isinstance(root, Linear):
            raise Refused(f"{mlp.node}: block {layer} adds its result second, and it does not read an activation")
        _, places, function = found
        columns = (places % root.shape[1]).reshape(-1, places.shape[-1])[0]
        norm, weight, bias = self._affine(root.x, root.node)
        numbers = np.linspace(-6, 6, 240)  # without 0
        with np.errstate(all="ignore"):
            values = np.broadcast_to(function(numbers), numbers.shape)
        errors = [np.abs(values - known(numbers)).max() for _, known in _ACTIVATIONS]
        best = int(np.argmin(np.nan_to_num(errors, nan=np.inf)))
        if not errors[best] < _ACTIVATION_ERROR:
            atom = self._space.of(mlp.x.parts[0])
            raise Refused(
                f"{atom.node if atom else mlp.node}: the function between the matrix products of block {layer}'s MLP "
                f"is none of {', '.join(ACTIVATIONS)}"
            )
        inner, inner_bias = _float(root.weight), _bias(root)
        if not np.array_equal(columns, np.arange(root.shape[1])):
            inner, inner_bias = inner[:, columns], inner_bias[columns]
        params = {
            "ln_2.weight": weight,
            "ln_2.bias": bias,
            "mlp.c_fc.weight": inner,
            "mlp.c_fc.bias": inner_bias,
            "mlp.c_proj.weight": _float(mlp.weight),
            "mlp.c_proj.bias": _bias(mlp),
        }
        return norm, params, _ACTIVATIONS[best][0]

    def _attention(self, layer: int, context: Context) -> tuple[Norm, int, float, dict[str, Array]]:
        weights, heads = context.weights, context.heads
        scores = weights.scores
        q = self._projected(scores.q, heads, scores)
        k = self._projected(scores.k, heads, scores)
        v = self._projected(context.v, heads, context)
        if not np.array_equal(k.tokens, v.tokens):
            raise Refused(f"{context.node}: its keys and values are not of the same tokens")
        scale = self._causal(weights, q.tokens, k) * q.factor * k.factor
        if len({id(side.norm) for side in (q, k, v)}) > 1 or len({side.affine for side in (q, k, v)}) > 1:
            raise Refused(f"{scores.node}: its queries, keys and values do not come from one LayerNorm")
        parts = [side.weight for side in (q, k, v)]
        biases = [side.bias for side in (q, k)] + [v.bias * np.float32(v.factor) if v.factor != 1 else v.bias]
        if v.factor != 1:
            parts[2] = parts[2] * np.float32(v.factor)
        norm, weight, bias = self._affine(q.linear.x, q.linear.node)
        joined = q.linear.weight
        whole = q.linear is k.linear is v.linear and v.factor == 1 and joined.shape[1] == 3 * q.columns.size
        in_order = np.array_equal(
            np.concatenate([side.columns.reshape(-1) for side in (q, k, v)]), np.arange(joined.shape[1])
        )
        params = {
            "ln_1.weight": weight,
            "ln_1.bias": bias,
            "attn.c_attn.weight": _float(joined) if whole and in_order else np.concatenate(parts, 1),
            "attn.c_attn.bias": np.concatenate(biases),
        }
        return norm, heads, scale, params

    def _projected(self, x: Term, heads: int, user: Atom) -> _Side:
        """Queries, keys or values (groups, tokens, features) as columns of a matrix product."""
        part = x.parts[0]
        numbers = part.ids
        if len(x.parts) != 1 or numbers.min(initial=0) < 0:
            raise Refused(f"{user.node}: its queries, keys or values are not those of tokens")
        newest = self._space.atom(int(numbers.max()))
        if not isinstance(newest, Linear):
            what = "a function" if isinstance(newest, Pointwise) else "something else than a matrix product"
            raise Refused(f"{newest.node}: attention reads {what} of the hidden states (rotary embeddings, norms?)")
        new = np.asarray((numbers >= newest.start).all((0, 2)))  # which tokens are not past
        self._check_past(numbers[:, ~new], user)
        tokens, columns = newest.place(numbers[:, new] - newest.start)
        if not new.any() or (tokens != tokens[..., :1]).any() or (columns != columns[:, :1]).any():
            raise Refused(f"{user.node}: the heads of its queries, keys or values mix tokens")
        columns, tokens = columns[:, 0].reshape(-1, heads, x.shape[2]), tokens[..., 0]
        if (columns != columns[0]).any():
            raise Refused(f"{user.node}: its heads differ between sequences")
        columns = columns[0].reshape(-1)
        factor = scalar(part.scale, 1)
        shift = _heads(x.shift, x.shape, heads, new)
        if factor is None or factor == 0 or shift is None:
            raise Refused(f"{user.node}: its queries, keys or values are scaled or shifted differently")
        places = np.full(x.shape[:2], -1)
        places[:, new] = tokens
        norm, weight, bias = self._affine(newest.x, newest.node)
        extra = shift.reshape(-1) / np.float32(factor)
        own = _bias(newest)[columns]
        return _Side(
            newest, columns, places, factor, _float(newest.weight)[:, columns],
            own + extra if extra.any() else own, norm, (weight.tobytes(), bias.tobytes()),
        )  # fmt: skip

    def _check_past(self, numbers: Array, user: Atom) -> None:
        if numbers.size:
            atoms = {id(self._space.atom(int(number))): self._space.atom(int(number)) for number in numbers[0, :, 0]}
            first = next(iter(atoms.values()))
            if len(atoms) > 1 or not isinstance(first, Past) or len(np.unique(numbers)) < numbers.size:
                raise Refused(f"{user.node}: it reads keys or values that are neither past nor of these tokens")

    def _causal(self, weights: Weights, rows: Array, keys: _Side) -> float:
        """Checks that each token sees itself and what precedes it; returns the factor of the scores."""
        per_sequence = self._trace.length
        at = self._trace.past_length + rows % per_sequence
        past = keys.tokens < 0
        slot = np.cumsum(past, 1) - 1  # past tokens are in order
        column = np.where(past, slot, self._trace.past_length + keys.tokens % per_sequence)
        if (keys.tokens // per_sequence != rows[:, :1] // per_sequence)[~past].any():
            raise Refused(f"{weights.node}: it sees tokens of other sequences")
        unused = past & (slot >= self._trace.past_length)  # room for tokens to come
        visible = (column[:, None, :] <= at[:, :, None]) & ~unused[:, None, :]
        shift, scale = weights.shift, weights.scale
        if not (shift[~visible] <= _HIDDEN).all():
            raise Refused(f"{weights.node}: a token sees later ones; GPT-2 is causal")
        shown = np.where(visible, shift, np.nan)
        with np.errstate(all="ignore"):
            spread = np.nanmax(shown, 2) - np.nanmin(shown, 2)
        if not (spread == 0).all():
            raise Refused(f"{weights.node}: something is added to the scores of attention, or hides earlier tokens")
        factors = scale[visible]
        if not (factors == factors[0]).all() or not factors[0] > 0:
            raise Refused(f"{weights.node}: the scores of attention have several factors")
        return float(factors[0])

    # The configuration.

    def _config(self, blocks: list[_Block], norm: Norm, params: dict[str, Array], tied: bool) -> GPT2Config:
        def one(what: str, values: list[Any]) -> Any:
            if len(set(values)) > 1:
                raise Refused(f"blocks differ in {what} ({', '.join(map(str, sorted(set(values))))})")
            return values[0]

        heads = one("the number of heads", [block.heads for block in blocks])
        epsilon = one("the epsilon of LayerNorm", [norm.epsilon, *(e for block in blocks for e in block.epsilons)])
        inner = one("the width of the MLP", [block.params["mlp.c_fc.weight"].shape[1] for block in blocks])
        vocabulary, width = params["wte.weight"].shape
        options: dict[str, Any] = {}
        for scaled in (True, False):
            for inverse in (False, True):
                first = (width / heads) ** (-0.5 if scaled else 0)
                expected = [first / (layer + 1 if inverse else 1) for layer in range(len(blocks))]
                if not options and all(
                    abs(block.scale / number - 1) < 2e-3 for block, number in zip(blocks, expected, strict=True)
                ):
                    options = {"scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": inverse}
        if not options:  # any other factor becomes part of the queries
            for layer, block in enumerate(blocks):
                factor = np.float32(block.scale * (width / heads) ** 0.5)
                for name in ("weight", "bias"):
                    joined = params[f"h.{layer}.attn.c_attn.{name}"].astype(np.float32)
                    joined[..., :width] *= factor
                    params[f"h.{layer}.attn.c_attn.{name}"] = joined
            self._notes["the queries' weights hold the file's own factors of the scores"] = None
        try:
            return GPT2Config(
                vocab_size=vocabulary,
                n_positions=len(params["wpe.weight"]),
                n_embd=width,
                n_layer=len(blocks),
                n_head=heads,
                n_inner=inner,
                activation_function=one("the activation", [block.activation for block in blocks]),
                layer_norm_epsilon=epsilon,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=None,
                **options,
            )
        except ConfigError as error:
            raise Refused(one_line(error)) from None


@dataclass(frozen=True, eq=False)
class _Side:
    """Queries, keys or values: where they come from. Tokens (groups, S) are -1 for past ones."""

    linear: Linear
    columns: Array
    tokens: Array
    factor: float
    weight: Array
    bias: Array
    norm: Norm
    affine: tuple[bytes, bytes]


def _heads(shift: Array | None, shape: tuple[int, ...], heads: int, new: Array) -> Array | None:
    """A constant for each head and feature; None if it also depends on something else."""
    if shift is None:
        return np.zeros(1, np.float32)
    full = np.broadcast_to(shift, shape)
    rows = full[:, new].reshape(-1, heads, int(new.sum()), shape[2])
    if (full[:, ~new] != 0).any() or (rows != rows[:1, :, :1]).any():
        return None
    return rows[0, :, 0]


def _vector(array: Array | None, shape: tuple[int, ...], default: float) -> Array | None:
    """A vector over the last axis; None if the array depends on another axis."""
    if array is None:
        return np.full(shape[-1], default, np.float32)
    rows = np.broadcast_to(array, shape).reshape(-1, shape[-1])
    return rows[0].copy() if (rows == rows[0]).all() else None


def _float(weight: Array) -> Array:
    return weight.astype(np.float32) if weight.dtype.kind in "iu" else weight


def _bias(linear: Linear) -> Array:
    return np.zeros(linear.shape[1], np.float32) if linear.bias is None else linear.bias
