"""One forward pass of GPT-2 as calls of kernels."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax, tirx

from tvm_attn.kernels import (
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
    """One forward pass: the layers of GPT-2 for rows of tokens, with the attention left to the caller.

    Args:
        module: where calls go.
        groups: number of row groups, a symbolic variable or 1.
        rows: rows of a group.
        most_rows: rows of the largest call.
        inputs: token_ids, positions and slots.
        cache: gives the KV cache of a layer.
        param: gives the packed tensors of a parameter.
    """

    def __init__(
        self,
        module: Module,
        groups: tirx.Var | int,
        rows: int,
        most_rows: int,
        inputs: tuple[relax.Var | None, relax.Var, relax.Var],
        cache: Callable[[int], relax.Var],
        param: Callable[[str], list[relax.Var]],
    ) -> None:
        self.module, self.config, self.dtype = module, module.config, module.layout.dtype
        self.groups, self.rows, self.most_rows = groups, rows, most_rows
        self.static_groups = groups if isinstance(groups, int) else None
        self.token_ids, self.positions, self.slots = inputs
        self._cache, self._param = cache, param
        self.activations = "float32"
        """Dtype of what lies between a layer's kernels; the residual stream x and the logits are float32 always."""

    def _input(self, x: relax.Var, width: int) -> list[relax.Var]:
        """x (g, R, K) as the weights' format wants it."""
        weights, g = self.module.layout.weights, self.groups
        if weights in PLAIN:
            return [x]
        if weights == "bfloat16_pairs":
            kernel: Kernel = PackPairs(width, self.rows, self.static_groups)
            return [self.module.call(kernel, [x], [relax.TensorType((g, self.rows, width // 2), "int32")])]
        kernel = QuantizeRows(width, self.rows, weights, self.static_groups)
        scales = relax.TensorType((g, self.rows, width // GROUP), "float32")
        words = relax.TensorType((g, self.rows, width // 4), "int32")
        result = self.module.call(kernel, [x], [words, scales, scales])
        return [self.module.builder.emit(relax.TupleGetItem(result, i)) for i in range(3)]

    def _type(self, width: int, dtype: str = "float32") -> relax.TensorType:
        return relax.TensorType((self.groups, self.rows, width), dtype)

    def _sizes(self, name: str) -> tuple[int, int, int, int, str]:
        """K, N, R, C and format of a packed weight."""
        k, n, columns = self.module.parameters[name].sizes
        return k, n, self.rows, columns, self.module.layout.weights

    def embed(self) -> relax.Var:
        """x (g, R, E) of the tokens."""
        context, (width, vocabulary, rows, columns, weights) = self.config.n_positions, self._sizes("wte.weight")
        kernel = Embedding(vocabulary, context, width, rows, columns, weights, self.dtype, self.static_groups)
        arguments = [self.token_ids, self.positions, *self._param("wte.weight"), *self._param("wpe.weight")]
        return self.module.call(kernel, arguments, [self._type(width)])

    def norm(self, x: relax.Var, name: str) -> relax.Var:
        """LayerNorm of x with the parameters `name`, in the dtype of activations."""
        arguments = [x, *self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return self.module.call(self._norm_kernel(), arguments, [self._type(self.config.n_embd, self.activations)])

    def _normalized(self, x: relax.Var, name: str) -> list[relax.Var]:
        """x behind the LayerNorm `name`, as a linear layer takes it."""
        return self._input(self.norm(x, name), self.config.n_embd)

    def qkv(self, x: relax.Var, layer: int) -> tuple[relax.Var, relax.Var]:
        """The cache with the rows' keys and values written, and q (g, R, E), of the normalized x."""
        name, cache = f"h.{layer}.attn.c_attn", self._cache(layer)
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        arguments = [*self._normalized(x, f"h.{layer}.ln_1"), *weights, self.slots, self.positions, cache]
        outputs = [cache.ty, self._type(self.config.n_embd, self.activations)]
        result = self.module.call(self._qkv_kernel(name), arguments, outputs, in_place=[len(arguments) - 1, -1])
        emit = self.module.builder.emit
        return emit(relax.TupleGetItem(result, 0)), emit(relax.TupleGetItem(result, 1))

    def hidden(self, x: relax.Var, layer: int) -> relax.Var:
        """activation(x W + b) of the normalized x: the first half of the MLP."""
        name = f"h.{layer}.mlp.c_fc"
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        arguments = [*self._normalized(x, f"h.{layer}.ln_2"), *weights]
        return self.module.call(
            self._hidden_kernel(name), arguments, [self._type(self.config.n_inner, self.activations)]
        )

    def residual_linear(self, x: relax.Var, name: str, residual: relax.Var) -> relax.Var:
        """x W + b + residual."""
        k, n, *_ = self.module.parameters[f"{name}.weight"].sizes
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return self.module.call(self._residual_kernel(name), [*self._input(x, k), *weights, residual], [self._type(n)])

    def block(self, x: relax.Var, layer: int, sequences: relax.Var | None) -> tuple[relax.Var, relax.Var]:
        """One transformer layer: its cache and x; `sequences` is given for prompts, None for one token a row."""
        cache, q = self.qkv(x, layer)
        x = self.residual_linear(self._attention(q, cache, layer, sequences), f"h.{layer}.attn.c_proj", x)
        return cache, self.residual_linear(self.hidden(x, layer), f"h.{layer}.mlp.c_proj", x)

    def _attention(self, q: relax.Var, cache: relax.Var, layer: int, sequences: relax.Var | None) -> relax.Var:
        rows = [self.slots, self.positions] if sequences is None else [sequences]
        kernel = self._attention_kernel(layer, is_decode=sequences is None)
        return self.module.call(kernel, [q, cache, *rows], [self._type(self.config.n_embd, self.activations)])

    def gather(self, x: relax.Var, rows: relax.Var) -> relax.Var:
        """The given rows of x, as many as this pass has."""
        kernel = GatherRows(self.config.n_embd, self.rows)
        return self.module.call(kernel, [x, rows], [self._type(self.config.n_embd)])

    def head(self, x: relax.Var) -> relax.Var:
        """Logits of the normalized x."""
        name = "wte.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        columns = padded_vocabulary(self.config, self.module.layout)
        arguments = [*self._normalized(x, "ln_f"), *self._param(name)]
        return self.module.call(self._head_kernel(name), arguments, [self._type(columns)])

    # ---- the kernels, which a subclass may choose otherwise ----

    def _norm_kernel(self) -> Kernel:
        return LayerNorm(self.config.n_embd, self.config.layer_norm_epsilon, self.rows, self.static_groups)

    def _qkv_kernel(self, name: str) -> Kernel:
        return QKVLinear(
            *self._sizes(f"{name}.weight"),
            self.static_groups,
            heads=self.config.n_head,
            context=self.config.n_positions,
            cache_dtype=self.dtype,
        )

    def _hidden_kernel(self, name: str) -> Kernel:
        activation = self.config.activation_function
        return Linear(*self._sizes(f"{name}.weight"), self.static_groups, activation=activation)

    def _residual_kernel(self, name: str) -> Kernel:
        return ResidualLinear(*self._sizes(f"{name}.weight"), self.static_groups)

    def _head_kernel(self, name: str) -> Kernel:
        return Head(*self._sizes(name), self.static_groups)

    def _attention_kernel(self, layer: int, is_decode: bool) -> Kernel:
        config = self.config
        sizes = (config.n_head, config.head_dim, config.n_positions, self.rows, self.dtype)
        scale = config.attention_scale(layer)
        return DecodeAttention(*sizes, scale, self.static_groups) if is_decode else PrefillAttention(*sizes, scale)
