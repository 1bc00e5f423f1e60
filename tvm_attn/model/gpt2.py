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

from collections.abc import Callable, Sequence
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
    PackPairs,
    PackPlain,
    PackWords,
    PrefillAttention,
    QKVLinear,
    QuantizeRows,
    ResidualLinear,
)
from tvm_attn.kernels.weights import PLAIN, packed_types, strip_columns
from tvm_attn.storage import GROUP, TABLES, is_quantizable, scales_name, stored_types


@dataclass(frozen=True)
class Layout:
    """How activations and weights lie in memory; a property of the target.

    Attributes:
        rows: R, the rows of a group.
        columns: C, the widest strip of packed columns, a power of two.
        dtype: storage dtype of the KV cache and the position table: float32, float16 or bfloat16.
        weights: format of the other matrices, see `tvm_attn.kernels.weights`.
        fuse_layers: whether a layer of decode is one kernel, see `tvm_attn.compiler.fusion`.
    """

    rows: int
    columns: int
    dtype: str
    weights: str
    fuse_layers: bool


@dataclass(frozen=True)
class Program:
    """GPT-2 as Relax.

    Attributes:
        module: the Relax functions, and a declaration of each kernel, which has no body.
        kernels: the kernel behind each declaration, by its name there; the compiler puts its scheduled function there.
        parameters: names of the canonical tensors that `transform_params` asks for, by its index.
    """

    module: IRModule
    kernels: dict[str, Kernel]
    parameters: list[str]


Type = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor."""


@dataclass(frozen=True)
class _Parameter:
    """A parameter on its way into the library's layout.

    Attributes:
        given: canonical tensors by name: the parameter, and its scales where it is quantized.
        packed: the tensors that kernels take, in order.
        kernels: the kernel that makes each of them, or None where the canonical tensor is used as it is.
        sizes: K, N and C of a packed matrix; zeros for the others.
    """

    given: dict[str, Type]
    packed: list[Type]
    kernels: list[PackPlain | PackWords | None]
    sizes: tuple[int, int, int] = (0, 0, 0)


def _parameter(name: str, shape: tuple[int, ...], layout: Layout, types: dict[str, Type]) -> _Parameter:
    if not is_quantizable(name, shape):
        return _Parameter({name: types[name]}, [types[name]], [None])
    # Token table and head are (V, E) and padded; linear layers are (in, out) and have strips that divide them.
    table, weights = name in TABLES, layout.weights
    k, n = (shape[1], shape[0]) if table else shape
    columns = layout.columns if table else strip_columns(n, layout.columns)
    sizes = (k, n, columns)
    packed: list[Type] = [*packed_types(weights, k, n, columns)]
    if weights in PLAIN:
        return _Parameter({name: types[name]}, packed, [PackPlain(*sizes, weights, table)], sizes)
    words = PackWords(*sizes, weights, table)
    if weights == "bfloat16_pairs":
        return _Parameter({name: types[name]}, packed, [words], sizes)
    given = {given_name: types[given_name] for given_name in (name, scales_name(name))}
    return _Parameter(given, packed, [words, PackPlain(k // GROUP, n, columns, "float16", table)], sizes)


def padded_vocabulary(config: GPT2Config, layout: Layout) -> int:
    """V', the number of columns of the logits."""
    return -(-config.vocab_size // layout.columns) * layout.columns


def _declaration(name: str, operands: int) -> tirx.PrimFunc:
    """A function without a body, in a kernel's place: parsing TensorIR that scheduling parses again takes a second."""
    parameters = [tirx.Var(f"operand_{i}", "handle") for i in range(operands)]
    return tirx.PrimFunc(parameters, tirx.Evaluate(0)).with_attr("global_symbol", name)


class _Module:
    """The Relax module in the making: adds every kernel once and emits calls to it."""

    def __init__(self, config: GPT2Config, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.builder = relax.BlockBuilder()
        self.kernels: dict[str, Kernel] = {}
        self._variables: dict[Kernel, relax.GlobalVar] = {}
        types = stored_types(config, layout.dtype, layout.weights if layout.weights in ("int8", "int4") else "none")
        shapes = param_shapes(config)
        self.parameters = {name: _parameter(name, shape, layout, types) for name, shape in shapes.items()}

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
            fresh = len(outputs) if in_place is None else in_place.count(-1)
            self._variables[kernel] = self.builder.add_func(_declaration(name, len(arguments) + fresh), name)
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
        return relax.TupleType([relax.TensorType(*kind) for p in self.parameters.values() for kind in p.packed])


class _Forward:
    """One forward pass: the layers of GPT-2 for rows of tokens, with the attention left to the caller.

    Args:
        module: where calls go.
        groups: number of row groups, a symbolic variable or 1.
        rows: rows of a group.
        inputs: token_ids, positions and slots.
        cache: gives the KV cache of a layer.
        param: gives the packed tensors of a parameter.
    """

    def __init__(
        self,
        module: _Module,
        groups: tirx.Var | int,
        rows: int,
        inputs: tuple[relax.Var | None, relax.Var, relax.Var],
        cache: Callable[[int], relax.Var],
        param: Callable[[str], list[relax.Var]],
    ) -> None:
        self.module, self.config, self.dtype = module, module.config, module.layout.dtype
        self.groups, self.rows = groups, rows
        self.static_groups = groups if isinstance(groups, int) else None
        self.token_ids, self.positions, self.slots = inputs
        self._cache, self._param = cache, param

    def _input(self, x: relax.Var, width: int, groups: tirx.Var | int | None = None) -> list[relax.Var]:
        """x (g, R, K) as the weights' format wants it."""
        weights, g = self.module.layout.weights, self.groups if groups is None else groups
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

    def _type(self, width: int, groups: tirx.Var | int | None = None) -> relax.TensorType:
        return relax.TensorType((self.groups if groups is None else groups, self.rows, width), "float32")

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

    def norm(self, x: relax.Var, name: str, groups: tirx.Var | int | None = None) -> relax.Var:
        """LayerNorm of x with the parameters `name`."""
        config = self.config
        kernel = LayerNorm(config.n_embd, config.layer_norm_epsilon, self.rows, self.static_groups)
        arguments = [x, *self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return self.module.call(kernel, arguments, [self._type(config.n_embd, groups)])

    def qkv(self, x: relax.Var, layer: int) -> tuple[relax.Var, relax.Var]:
        """The cache with the rows' keys and values written, and q (g, R, E)."""
        config, name = self.config, f"h.{layer}.attn.c_attn"
        kernel = QKVLinear(
            *self._sizes(f"{name}.weight"),
            self.static_groups,
            heads=config.n_head,
            context=config.n_positions,
            cache_dtype=self.dtype,
        )
        cache = self._cache(layer)
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        arguments = [*self._input(x, config.n_embd), *weights, self.slots, self.positions, cache]
        outputs = [cache.ty, self._type(config.n_embd)]
        result = self.module.call(kernel, arguments, outputs, in_place=[len(arguments) - 1, -1])
        emit = self.module.builder.emit
        return emit(relax.TupleGetItem(result, 0)), emit(relax.TupleGetItem(result, 1))

    def linear(self, x: relax.Var, name: str, activation: str) -> relax.Var:
        """activation(x W + b)."""
        sizes = self._sizes(f"{name}.weight")
        kernel = Linear(*sizes, self.static_groups, activation=activation)
        arguments = [*self._input(x, sizes[0]), *self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return self.module.call(kernel, arguments, [self._type(sizes[1])])

    def residual_linear(self, x: relax.Var, name: str, residual: relax.Var) -> relax.Var:
        """x W + b + residual."""
        sizes = self._sizes(f"{name}.weight")
        kernel = ResidualLinear(*sizes, self.static_groups)
        weights = [*self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return self.module.call(kernel, [*self._input(x, sizes[0]), *weights, residual], [self._type(sizes[1])])

    def block(self, x: relax.Var, layer: int, sequences: relax.Var | None) -> tuple[relax.Var, relax.Var]:
        """One transformer layer: its cache and x; `sequences` is given for prompts, None for one token a row."""
        cache, q = self.qkv(self.norm(x, f"h.{layer}.ln_1"), layer)
        attended = self._attention(q, cache, layer, sequences)
        x = self.residual_linear(attended, f"h.{layer}.attn.c_proj", x)
        hidden = self.linear(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc", self.config.activation_function)
        return cache, self.residual_linear(hidden, f"h.{layer}.mlp.c_proj", x)

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
        arguments = [*self._input(x, self.config.n_embd, groups), *self._param(name)]
        return self.module.call(kernel, arguments, [self._type(columns, groups)])


class _Tuples:
    """The last two arguments of a forward function, `kv` and `params`, and their elements by name."""

    def __init__(self, module: _Module) -> None:
        self.kv = relax.Var("kv", module.kv_type(tirx.Var("s", "int64")))
        self.params = relax.Var("params", module.params_type())
        self._module = module
        self._places: dict[str, range] = {}
        first = 0
        for name, parameter in module.parameters.items():
            self._places[name] = range(first, first := first + len(parameter.packed))

    def cache(self, layer: int) -> relax.Var:
        """The KV cache of a layer."""
        return self._module.builder.emit(relax.TupleGetItem(self.kv, layer))

    def param(self, name: str) -> list[relax.Var]:
        """The packed tensors of a parameter."""
        return [self._module.builder.emit(relax.TupleGetItem(self.params, index)) for index in self._places[name]]


def _row_inputs(groups: tirx.Var | int, rows: int) -> tuple[relax.Var, relax.Var, relax.Var]:
    shape = relax.TensorType((groups, rows), "int32")
    return relax.Var("token_ids", shape), relax.Var("positions", shape), relax.Var("slots", shape)


def _add_forward(module: _Module, name: str, max_groups: int) -> None:
    """Adds prefill (logits of chosen rows) or logits (of all rows)."""
    rows, builder, tuples = module.layout.rows, module.builder, _Tuples(module)
    g, q, b = (tirx.Var(letter, "int64") for letter in "gqb")
    inputs = _row_inputs(g, rows)
    sequences = relax.Var("sequences", relax.TensorType((b, 4), "int32"))
    last_rows = relax.Var("last_rows", relax.TensorType((q, rows), "int32"))
    chosen = [last_rows] if name == "prefill" else []
    # The upper bound lets the memory planner place all activations once, for every length.
    attributes = {"tir_var_upper_bound": {"g": max_groups, "q": max_groups}}
    with builder.function(name, [*inputs, sequences, *chosen, tuples.kv, tuples.params], attrs=attributes):
        with builder.dataflow():
            forward = _Forward(module, g, rows, inputs, tuples.cache, tuples.param)
            x = forward.embed()
            for layer in range(module.config.n_layer):
                _, x = forward.block(x, layer, sequences)
            if chosen:
                x = forward.gather(x, last_rows, q)
            groups = q if chosen else g
            logits = builder.emit_output(forward.head(forward.norm(x, "ln_f", groups), groups))
        builder.emit_func_output(logits)


def _add_decode_layer(module: _Module, name: str, layer: int, rows: int, groups: int | None) -> relax.GlobalVar:
    """Adds one layer of decode as a function that becomes one kernel: (x, positions, slots, cache, parameters of the
    layer) -> (cache, x)."""
    config, builder = module.config, module.builder
    g = tirx.Var("g", "int64") if groups is None else groups
    x = relax.Var("x", relax.TensorType((g, rows, config.n_embd), "float32"))
    _, positions, slots = _row_inputs(g, rows)
    cache = relax.Var("cache", module.kv_type(tirx.Var("s", "int64")).fields[layer])
    names = _layer_parameters(module, layer)
    params = {
        name: [
            relax.Var(f"{name}.{i}", relax.TensorType(*kind)) for i, kind in enumerate(module.parameters[name].packed)
        ]
        for name in names
    }
    arguments = [x, positions, slots, cache, *(tensor for tensors in params.values() for tensor in tensors)]
    with builder.function(name, arguments, attrs={"Primitive": True}, private=True):
        with builder.dataflow():
            forward = _Forward(module, g, rows, (None, positions, slots), lambda _: cache, params.__getitem__)
            outputs = builder.emit_output(relax.Tuple(list(forward.block(x, layer, None))))
        return builder.emit_func_output(outputs)


def _layer_parameters(module: _Module, layer: int) -> list[str]:
    return [name for name in module.parameters if name.startswith(f"h.{layer}.")]


def _add_decode(module: _Module, name: str, rows: int, groups: int | None, max_groups: int) -> None:
    """Adds decode or decode_one."""
    builder, config, tuples = module.builder, module.config, _Tuples(module)
    scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
    functions: dict[float, relax.GlobalVar] = {}
    if module.layout.fuse_layers:  # layers differ in nothing but their scale
        for scale in dict.fromkeys(scales):
            layer = scales.index(scale)
            functions[scale] = _add_decode_layer(module, f"{name}_layer_{layer}", layer, rows, groups)
    g = tirx.Var("g", "int64") if groups is None else groups
    inputs = _row_inputs(g, rows)
    _, positions, slots = inputs
    attributes = {"tir_var_upper_bound": {"g": max_groups}}
    with builder.function(name, [*inputs, tuples.kv, tuples.params], attrs=attributes):
        with builder.dataflow():
            forward = _Forward(module, g, rows, inputs, tuples.cache, tuples.param)
            x = forward.embed()
            for layer, scale in enumerate(scales):
                if functions:
                    weights = [tensor for name in _layer_parameters(module, layer) for tensor in tuples.param(name)]
                    call = relax.Call(functions[scale], [x, positions, slots, tuples.cache(layer), *weights])
                    x = builder.emit(relax.TupleGetItem(builder.emit(call), 1))
                else:
                    _, x = forward.block(x, layer, None)
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
    builder = module.builder
    given = {name: kind for parameter in module.parameters.values() for name, kind in parameter.given.items()}
    inputs = {name: relax.Var(name, relax.TensorType(*kind)) for name, kind in given.items()}
    with builder.function("transform_params", list(inputs.values()), attrs={"num_input": 0}):
        with builder.dataflow():
            outputs: list[relax.Var] = []
            for parameter in module.parameters.values():
                for name, kind, kernel in zip(parameter.given, parameter.packed, parameter.kernels, strict=True):
                    canonical = inputs[name]
                    outputs.append(module.call(kernel, [canonical], [relax.TensorType(*kind)]) if kernel else canonical)
            output = builder.emit_output(relax.Tuple(outputs))
        builder.emit_func_output(output)


def build_program(config: GPT2Config, layout: Layout, max_prefill_rows: int, max_batch: int) -> Program:
    """GPT-2 as a Relax module over declared kernels.

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
    _add_decode(module, "decode", rows, None, decode_groups)
    _add_decode(module, "decode_one", 1, 1, 1)
    _add_argmax(module, "argmax", rows, tirx.Var("g", "int64"))
    _add_argmax(module, "argmax_one", 1, 1)
    _add_transform_params(module)
    given = [name for parameter in module.parameters.values() for name in parameter.given]
    return Program(module.builder.finalize(), module.kernels, given)
