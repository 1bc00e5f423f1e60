"""One forward pass of GPT-2 as calls of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, tirx

from tvm_attn.kernels import (
    CacheWrite,
    DecodeAttention,
    Embedding,
    GatherRows,
    Head,
    Kernel,
    LayerNorm,
    Linear,
    PackPairs,
    PrefillAttention,
    QKVLinear,
    QuantizeRows,
    ResidualLinear,
)
from tvm_attn.kernels.weights import PLAIN
from tvm_attn.model.module import Module, padded_vocabulary
from tvm_attn.storage import GROUP


class Forward:
    """One forward pass: the layers of GPT-2 for rows of tokens.

    Args:
        module: receives the calls.
        groups: number of row groups, a symbolic variable or 1.
        rows: rows per group.
        max_groups: upper bound of the number of row groups.
        inputs: token_ids, positions and slots.
        cache: gives the KV cache of a layer.
        param: gives the packed tensors of a parameter.
    """

    def __init__(
        self,
        module: Module,
        groups: tirx.Var | int,
        rows: int,
        max_groups: int,
        inputs: tuple[relax.Var | None, relax.Var, relax.Var],
        cache: Callable[[int], relax.Var],
        param: Callable[[str], list[relax.Var]],
    ) -> None:
        self.module, self.config, self.dtype = module, module.config, module.layout.dtype
        self.groups, self.rows, self.activations = groups, rows, module.layout.activations
        self.static_groups = groups if isinstance(groups, int) else None
        # If one static group has its own kernels, LayerNorm is part of the linear layer.
        self.fuses_norm = module.layout.tensor_cores and self.static_groups == 1
        # Otherwise the same kernels serve prompts and decode.
        self.max_groups = max_groups if module.layout.tensor_cores and self.static_groups is None else None
        self.token_ids, self.positions, self.slots = inputs
        self._cache, self._param = cache, param

    def _input(self, x: relax.Var, width: int) -> list[relax.Var]:
        """x (g, R, K) in the form that the weights' format needs."""
        weights, g = self.module.layout.weights, self.groups
        if self.module.layout.tensor_cores or weights in PLAIN:
            return [x]
        if weights == "bfloat16_pairs":
            kernel: Kernel = PackPairs(width=width, rows=self.rows, groups=self.static_groups)
            return [self.module.call(kernel, [x], [relax.TensorType((g, self.rows, width // 2), "int32")])]
        kernel = QuantizeRows(width=width, rows=self.rows, weights=weights, groups=self.static_groups)
        scales = relax.TensorType((g, self.rows, width // GROUP), "float32")
        words = relax.TensorType((g, self.rows, width // 4), "int32")
        result = self.module.call(kernel, [x], [words, scales, scales])
        return [self.module.builder.emit(relax.TupleGetItem(result, i)) for i in range(3)]

    def _type(self, width: int, dtype: str = "float32") -> relax.TensorType:
        return relax.TensorType((self.groups, self.rows, width), dtype)

    def _sizes(self, name: str, fuses_norm: bool = False) -> dict[str, Any]:
        """The fields that all linear kernels share, for a packed weight."""
        k, n, columns = self.module.parameters[name].sizes
        return {
            "in_features": k,
            "out_features": n,
            "rows": self.rows,
            "columns": columns,
            "weights": self.module.layout.weights,
            "groups": self.static_groups,
            "activations": self.activations,
            "epsilon": self.config.layer_norm_epsilon if fuses_norm else None,
            "max_groups": self.max_groups,
        }

    def embed(self) -> relax.Var:
        """x (g, R, E) of the tokens."""
        width, vocabulary, columns = self.module.parameters["wte.weight"].sizes
        kernel = Embedding(
            vocabulary=vocabulary,
            context=self.config.n_positions,
            width=width,
            rows=self.rows,
            columns=columns,
            weights=self.module.layout.weights,
            dtype=self.dtype,
            groups=self.static_groups,
        )
        arguments = [self.token_ids, self.positions, *self._param("wte.weight"), *self._param("wpe.weight")]
        return self.module.call(kernel, arguments, [self._type(width)])

    def norm(self, x: relax.Var, name: str) -> relax.Var:
        """LayerNorm of x with the parameters `name`, in the dtype of activations."""
        config = self.config
        kernel = LayerNorm(
            width=config.n_embd,
            epsilon=config.layer_norm_epsilon,
            rows=self.rows,
            groups=self.static_groups,
            activations=self.activations,
        )
        arguments = [x, *self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return self.module.call(kernel, arguments, [self._type(config.n_embd, self.activations)])

    def _normalized(self, x: relax.Var, name: str) -> list[relax.Var]:
        """x after the LayerNorm `name`, in the form that a linear layer takes."""
        if self.fuses_norm:
            return [x, *self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return self._input(self.norm(x, name), self.config.n_embd)

    def qkv(self, x: relax.Var, layer: int) -> tuple[relax.Var, relax.Var]:
        """The cache with the rows' keys and values written, and q (g, R, E); LayerNorm of x comes first."""
        name, cache = f"h.{layer}.attn.c_attn", self._cache(layer)
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        arguments = [*self._normalized(x, f"h.{layer}.ln_1"), *weights, self.slots, self.positions, cache]
        outputs = [cache.ty, self._type(self.config.n_embd, self.activations)]
        sizes = self._sizes(f"{name}.weight", self.fuses_norm)
        heads, context = self.config.n_head, self.config.n_positions
        if self.module.layout.cache == "int8":
            # A row's scale is that of a whole head, and a strip of a linear layer's columns may hold half of one.
            qkv = self.module.call(Linear(**sizes), arguments[:-3], [self._type(3 * self.config.n_embd)])
            kernel: Kernel = CacheWrite(heads, self.config.head_dim, context, self.rows, self.static_groups)
            arguments = [qkv, self.slots, self.positions, cache]
        else:
            kernel = QKVLinear(**sizes, heads=heads, context=context, cache_dtype=self.dtype)
        result = self.module.call(kernel, arguments, outputs, in_place=[len(arguments) - 1, -1])
        emit = self.module.builder.emit
        return emit(relax.TupleGetItem(result, 0)), emit(relax.TupleGetItem(result, 1))

    def hidden(self, x: relax.Var, layer: int) -> relax.Var:
        """activation(x W + b) of x after LayerNorm: the first half of the MLP."""
        name = f"h.{layer}.mlp.c_fc"
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        arguments = [*self._normalized(x, f"h.{layer}.ln_2"), *weights]
        sizes, activation = self._sizes(f"{name}.weight", self.fuses_norm), self.config.activation_function
        kernel = Linear(**sizes, activation=activation)
        return self.module.call(kernel, arguments, [self._type(self.config.n_inner, self.activations)])

    def residual_linear(self, x: relax.Var, name: str, residual: relax.Var) -> relax.Var:
        """x W + b + residual."""
        kernel = ResidualLinear(**self._sizes(f"{name}.weight"))
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        arguments = [*self._input(x, kernel.in_features), *weights, residual]
        return self.module.call(kernel, arguments, [self._type(kernel.out_features)])

    def block(self, x: relax.Var, layer: int, sequences: relax.Var | None) -> tuple[relax.Var, relax.Var]:
        """One transformer layer: its cache and x; `sequences` is None for one token per row (decode)."""
        cache, q = self.qkv(x, layer)
        return cache, self.after_qkv(x, q, cache, layer, sequences)

    def after_qkv(
        self, x: relax.Var, q: relax.Var, cache: relax.Var, layer: int, sequences: relax.Var | None
    ) -> relax.Var:
        """The rest of a layer, after its queries, keys and values."""
        x = self.residual_linear(self._attention(q, cache, layer, sequences), f"h.{layer}.attn.c_proj", x)
        return self.residual_linear(self.hidden(x, layer), f"h.{layer}.mlp.c_proj", x)

    def _attention(self, q: relax.Var, cache: relax.Var, layer: int, sequences: relax.Var | None) -> relax.Var:
        sizes = attention_sizes(self.module, layer, self.rows)
        if sequences is None:
            kernel: Kernel = DecodeAttention(**sizes, groups=self.static_groups)
            rows = [self.slots, self.positions]
        else:
            kernel, rows = PrefillAttention(**sizes), [sequences]
        return self.module.call(kernel, [q, cache, *rows], [self._type(self.config.n_embd, self.activations)])

    def gather(self, x: relax.Var, rows: relax.Var) -> relax.Var:
        """The given rows of x, as many as this pass has rows."""
        kernel = GatherRows(width=self.config.n_embd, rows=self.rows)
        return self.module.call(kernel, [x, rows], [self._type(self.config.n_embd)])

    def head(self, x: relax.Var) -> relax.Var:
        """Logits of x after LayerNorm."""
        name = "wte.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        columns = padded_vocabulary(self.config, self.module.layout)
        arguments = [*self._normalized(x, "ln_f"), *self._param(name)]
        return self.module.call(Head(**self._sizes(name, self.fuses_norm)), arguments, [self._type(columns)])


def attention_sizes(module: Module, layer: int, rows: int) -> dict[str, Any]:
    """The fields that the kernels of a layer's attention share."""
    config = module.config
    return {
        "heads": config.n_head,
        "head_dim": config.head_dim,
        "context": config.n_positions,
        "rows": rows,
        "dtype": module.layout.cache,
        "scale": config.attention_scale(layer),
        "activations": module.layout.activations,
    }
