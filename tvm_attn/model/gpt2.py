"""GPT-2 (Radford et al., 2019) in Relax, over the kernels of `tvm_attn.kernels`.

The module has these functions; token_ids, positions and slots are (g, R) int32, one value a row, and a padding row has
position -1. `kv` is a tuple with one cache (S, 2, H, P, D) a layer, updated in place; `params` is the tuple of packed
parameters that `transform_params` returns.

    prefill(token_ids, positions, slots, sequences (b, 4), last_rows (q, R), kv, params) -> logits (q, R, V')
    logits(token_ids, positions, slots, sequences (b, 4), kv, params) -> logits (g, R, V')
    decode(token_ids, positions, slots, kv, params) -> logits (g, R, V')
    decode_one(...)   the same for one row: g = R = 1, with kernels made for it
    argmax(logits (g, R, V')) -> token_ids (g, R);  argmax_one for one row
    transform_params(get) -> packed parameters; `get(index, name)` gives a canonical one

V' is the vocabulary rounded up to whole weight strips; the columns past V are zero. `sequences` is explained at
`PrefillAttention`; `last_rows` are the rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import IRModule, relax, tirx

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.kernels import (
    Argmax,
    DecodeAttention,
    Embedding,
    GatherRows,
    Head,
    Kernel,
    LayerNorm,
    Linear,
    PackLinear,
    PrefillAttention,
    QKVLinear,
    ResidualLinear,
)
from tvm_attn.kernels.matmul import strip_columns


@dataclass(frozen=True)
class Layout:
    """How activations and weights lie in memory; a property of the target.

    Attributes:
        rows: R, the rows of a group.
        columns: C, the widest strip of packed columns, a power of two.
        dtype: storage dtype of matrices and KV cache: float32, float16 or bfloat16.
    """

    rows: int
    columns: int
    dtype: str


@dataclass(frozen=True)
class Program:
    """GPT-2 as Relax.

    Attributes:
        module: the Relax functions and the unscheduled kernels.
        kernels: the kernel behind each TensorIR function of the module, by its name there.
    """

    module: IRModule
    kernels: dict[str, Kernel]


@dataclass(frozen=True)
class _Packed:
    """A parameter as the kernels want it: canonical name, packed shape, dtype, and the kernel that packs it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kernel: PackLinear | None


def _packed_parameters(config: GPT2Config, layout: Layout) -> dict[str, _Packed]:
    packed = {}
    for name, shape in param_shapes(config).items():
        if len(shape) == 1:
            packed[name] = _Packed(name, shape, "float32", None)
        elif name == "wpe.weight":
            packed[name] = _Packed(name, shape, layout.dtype, None)
        else:
            # Token table and head are (V, E) and padded; linear layers are (in, out) and have strips that divide them.
            table = name in ("wte.weight", "lm_head.weight")
            k, n = (shape[1], shape[0]) if table else shape
            columns = layout.columns if table else strip_columns(n, layout.columns)
            kernel = PackLinear(k, n, columns, layout.dtype, transposed=table)
            packed[name] = _Packed(name, (-(-n // columns), k, columns), layout.dtype, kernel)
    return packed


def padded_vocabulary(config: GPT2Config, layout: Layout) -> int:
    """V', the number of columns of the logits."""
    return -(-config.vocab_size // layout.columns) * layout.columns


class _Module:
    """The Relax module in the making: adds every kernel once and emits calls to it."""

    def __init__(self, config: GPT2Config, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.builder = relax.BlockBuilder()
        self.kernels: dict[str, Kernel] = {}
        self._variables: dict[Kernel, relax.GlobalVar] = {}
        self.parameters = _packed_parameters(config, layout)

    def call(
        self,
        kernel: Kernel,
        arguments: Sequence[relax.Expr],
        outputs: list[relax.TensorType],
        in_place: list[int] | None = None,
    ) -> relax.Var:
        """Emits a call; `in_place` gives per output the argument it updates, or -1 for a fresh tensor."""
        if kernel not in self._variables:
            name = f"{kernel.family}_{len(self.kernels)}"
            self._variables[kernel] = self.builder.add_func(kernel.prim_func().with_attr("global_symbol", name), name)
            self.kernels[self._variables[kernel].name_hint] = kernel
        variable, tuple_ = self._variables[kernel], relax.Tuple(list(arguments))
        if in_place:
            return self.builder.emit(relax.op.call_tir_inplace(variable, tuple_, in_place, outputs))
        return self.builder.emit(relax.call_tir(variable, tuple_, outputs))

    def kv_type(self, slots: tirx.Var) -> relax.TupleType:
        """Type of the KV cache: one tensor a layer."""
        config = self.config
        shape = (slots, 2, config.n_head, config.n_positions, config.head_dim)
        return relax.TupleType([relax.TensorType(shape, self.layout.dtype)] * config.n_layer)

    def params_type(self) -> relax.TupleType:
        """Type of the packed parameters."""
        return relax.TupleType([relax.TensorType(p.shape, p.dtype) for p in self.parameters.values()])


class _Forward:
    """One forward pass: the layers of GPT-2 for rows of tokens, with the attention left to the caller.

    Args:
        module: where calls go.
        groups: number of row groups, a symbolic variable or 1.
        rows: rows of a group.
        inputs: token_ids, positions and slots.
        kv, params: the tuples.
    """

    def __init__(
        self,
        module: _Module,
        groups: tirx.Var | int,
        rows: int,
        inputs: tuple[relax.Var, relax.Var, relax.Var],
        kv: relax.Var,
        params: relax.Var,
    ) -> None:
        self.module, self.config, self.dtype = module, module.config, module.layout.dtype
        self.groups, self.rows = groups, rows
        self.static_groups = groups if isinstance(groups, int) else None
        self.token_ids, self.positions, self.slots = inputs
        self.kv, self.params = kv, params
        self.index = {name: i for i, name in enumerate(module.parameters)}

    def _param(self, name: str) -> relax.Var:
        return self.module.builder.emit(relax.TupleGetItem(self.params, self.index[name]))

    def _type(self, width: int, groups: tirx.Var | int | None = None) -> relax.TensorType:
        return relax.TensorType((self.groups if groups is None else groups, self.rows, width), "float32")

    def _sizes(self, name: str) -> tuple[int, int, int, int, str]:
        """K, N, R, C, dtype of a packed weight."""
        kernel = self.module.parameters[name].kernel
        assert kernel is not None
        return kernel.in_features, kernel.out_features, self.rows, kernel.columns, self.dtype

    def embed(self) -> relax.Var:
        """x (g, R, E) of the tokens."""
        config, (width, vocabulary, rows, columns, dtype) = self.config, self._sizes("wte.weight")
        kernel = Embedding(vocabulary, config.n_positions, width, rows, columns, dtype, self.static_groups)
        arguments = [self.token_ids, self.positions, self._param("wte.weight"), self._param("wpe.weight")]
        return self.module.call(kernel, arguments, [self._type(width)])

    def norm(self, x: relax.Var, name: str, groups: tirx.Var | int | None = None) -> relax.Var:
        """LayerNorm of x with the parameters `name`."""
        config = self.config
        kernel = LayerNorm(config.n_embd, config.layer_norm_epsilon, self.rows, self.static_groups)
        arguments = [x, self._param(f"{name}.weight"), self._param(f"{name}.bias")]
        return self.module.call(kernel, arguments, [self._type(config.n_embd, groups)])

    def qkv(self, x: relax.Var, layer: int) -> tuple[relax.Var, relax.Var]:
        """The cache with the rows' keys and values written, and q (g, R, E)."""
        config, name = self.config, f"h.{layer}.attn.c_attn"
        kernel = QKVLinear(
            *self._sizes(f"{name}.weight"), self.static_groups, heads=config.n_head, context=config.n_positions
        )
        cache = self.module.builder.emit(relax.TupleGetItem(self.kv, layer))
        arguments = [x, self._param(f"{name}.weight"), self._param(f"{name}.bias"), self.slots, self.positions, cache]
        outputs = [cache.ty, self._type(config.n_embd)]
        result = self.module.call(kernel, arguments, outputs, in_place=[5, -1])
        emit = self.module.builder.emit
        return emit(relax.TupleGetItem(result, 0)), emit(relax.TupleGetItem(result, 1))

    def linear(self, x: relax.Var, name: str, activation: str) -> relax.Var:
        """activation(x W + b)."""
        sizes = self._sizes(f"{name}.weight")
        kernel = Linear(*sizes, self.static_groups, activation=activation)
        arguments = [x, self._param(f"{name}.weight"), self._param(f"{name}.bias")]
        return self.module.call(kernel, arguments, [self._type(sizes[1])])

    def residual_linear(self, x: relax.Var, name: str, residual: relax.Var) -> relax.Var:
        """x W + b + residual."""
        sizes = self._sizes(f"{name}.weight")
        kernel = ResidualLinear(*sizes, self.static_groups)
        arguments = [x, self._param(f"{name}.weight"), self._param(f"{name}.bias"), residual]
        return self.module.call(kernel, arguments, [self._type(sizes[1])])

    def block(self, x: relax.Var, layer: int, sequences: relax.Var | None) -> relax.Var:
        """One transformer layer; `sequences` is given for prompts, None for one token a row."""
        cache, q = self.qkv(self.norm(x, f"h.{layer}.ln_1"), layer)
        attended = self._attention(q, cache, layer, sequences)
        x = self.residual_linear(attended, f"h.{layer}.attn.c_proj", x)
        hidden = self.linear(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc", self.config.activation_function)
        return self.residual_linear(hidden, f"h.{layer}.mlp.c_proj", x)

    def _attention(self, q: relax.Var, cache: relax.Var, layer: int, sequences: relax.Var | None) -> relax.Var:
        config = self.config
        sizes = (config.n_head, config.head_dim, config.n_positions, self.rows, self.dtype)
        scale = config.attention_scale(layer)
        if sequences is None:
            kernel: Kernel = DecodeAttention(*sizes, scale, self.static_groups)
            arguments = [q, cache, self.slots, self.positions]
        else:
            kernel = PrefillAttention(*sizes, scale)
            arguments = [q, cache, sequences]
        return self.module.call(kernel, arguments, [self._type(config.n_embd)])

    def gather(self, x: relax.Var, rows: relax.Var, groups: tirx.Var) -> relax.Var:
        """The given rows of x, as (q, R, E)."""
        kernel = GatherRows(self.config.n_embd, self.rows)
        return self.module.call(kernel, [x, rows], [self._type(self.config.n_embd, groups)])

    def head(self, x: relax.Var, groups: tirx.Var | int | None = None) -> relax.Var:
        """Logits of x."""
        name = "wte.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        kernel = Head(*self._sizes(name), self.static_groups)
        columns = padded_vocabulary(self.config, self.module.layout)
        return self.module.call(kernel, [x, self._param(name)], [self._type(columns, groups)])


def _row_inputs(groups: tirx.Var | int, rows: int) -> tuple[relax.Var, relax.Var, relax.Var]:
    shape = relax.TensorType((groups, rows), "int32")
    return relax.Var("token_ids", shape), relax.Var("positions", shape), relax.Var("slots", shape)


def _add_forward(module: _Module, name: str, max_groups: int) -> None:
    """Adds prefill (logits of chosen rows) or logits (of all rows)."""
    rows, builder = module.layout.rows, module.builder
    g, q, b, s = (tirx.Var(letter, "int64") for letter in "gqbs")
    inputs = _row_inputs(g, rows)
    sequences = relax.Var("sequences", relax.TensorType((b, 4), "int32"))
    last_rows = relax.Var("last_rows", relax.TensorType((q, rows), "int32"))
    kv, params = relax.Var("kv", module.kv_type(s)), relax.Var("params", module.params_type())
    chosen = [last_rows] if name == "prefill" else []
    # The upper bound lets the memory planner place all activations once, for every length.
    attributes = {"tir_var_upper_bound": {"g": max_groups, "q": max_groups}}
    with builder.function(name, [*inputs, sequences, *chosen, kv, params], attrs=attributes):
        with builder.dataflow():
            forward = _Forward(module, g, rows, inputs, kv, params)
            x = forward.embed()
            for layer in range(module.config.n_layer):
                x = forward.block(x, layer, sequences)
            if chosen:
                x = forward.gather(x, last_rows, q)
            groups = q if chosen else g
            logits = builder.emit_output(forward.head(forward.norm(x, "ln_f", groups), groups))
        builder.emit_func_output(logits)


def _add_decode(module: _Module, name: str, rows: int, groups: tirx.Var | int, max_groups: int) -> None:
    builder, s = module.builder, tirx.Var("s", "int64")
    inputs = _row_inputs(groups, rows)
    kv, params = relax.Var("kv", module.kv_type(s)), relax.Var("params", module.params_type())
    attributes = {"tir_var_upper_bound": {"g": max_groups}}
    with builder.function(name, [*inputs, kv, params], attrs=attributes):
        with builder.dataflow():
            forward = _Forward(module, groups, rows, inputs, kv, params)
            x = forward.embed()
            for layer in range(module.config.n_layer):
                x = forward.block(x, layer, None)
            logits = builder.emit_output(forward.head(forward.norm(x, "ln_f")))
        builder.emit_func_output(logits)


def _add_argmax(module: _Module, name: str, rows: int, groups: tirx.Var | int) -> None:
    builder, columns = module.builder, padded_vocabulary(module.config, module.layout)
    logits = relax.Var("logits", relax.TensorType((groups, rows, columns), "float32"))
    static_groups = groups if isinstance(groups, int) else None
    kernel = Argmax(module.config.vocab_size, columns, rows, groups=static_groups)
    with builder.function(name, [logits]):
        with builder.dataflow():
            result = module.call(kernel, [logits], [relax.TensorType((groups, rows), "int32")])
            output = builder.emit_output(result)
        builder.emit_func_output(output)


def _add_transform_params(module: _Module) -> None:
    builder, shapes = module.builder, param_shapes(module.config)
    inputs = [relax.Var(p.name, relax.TensorType(shapes[p.name], p.dtype)) for p in module.parameters.values()]
    with builder.function("transform_params", inputs, attrs={"num_input": 0}):
        with builder.dataflow():
            outputs: list[relax.Var] = []
            for given, parameter in zip(inputs, module.parameters.values(), strict=True):
                if parameter.kernel is None:
                    outputs.append(given)
                else:
                    packed_type = relax.TensorType(parameter.shape, parameter.dtype)
                    outputs.append(module.call(parameter.kernel, [given], [packed_type]))
            output = builder.emit_output(relax.Tuple(outputs))
        builder.emit_func_output(output)


def build_program(config: GPT2Config, layout: Layout, max_prefill_rows: int, max_batch: int) -> Program:
    """GPT-2 as a Relax module over unscheduled kernels.

    Args:
        config: the model.
        layout: the target's layout and the storage dtype.
        max_prefill_rows: most rows of one call of prefill or logits.
        max_batch: most rows of one call of decode.
    """
    module, rows = _Module(config, layout), layout.rows
    prefill_groups, decode_groups = -(-max_prefill_rows // rows), -(-max_batch // rows)
    _add_forward(module, "prefill", prefill_groups)
    _add_forward(module, "logits", prefill_groups)
    _add_decode(module, "decode", rows, tirx.Var("g", "int64"), decode_groups)
    _add_decode(module, "decode_one", 1, 1, 1)
    _add_argmax(module, "argmax", rows, tirx.Var("g", "int64"))
    _add_argmax(module, "argmax_one", 1, 1)
    _add_transform_params(module)
    return Program(module.builder.finalize(), module.kernels)
