"""GPT-2 (Radford et al., 2019) in Relax, over the kernels of `tvm_attn.kernels`.

The module has these functions; token_ids, positions and slots are (g, R) int32, one value per row, and a padding row
has position -1. `kv` is a tuple with one cache (S, 2, H, P, D) per layer, or rows of words if it is
int8 (`tvm_attn.kernels.cache_write`), updated in place; `params` is the tuple of
packed parameters that `transform_params` returns.

    prefill(token_ids, positions, slots, sequences (b, 4), last_rows, last_positions, last_slots (q, R), kv, params)
        -> logits (q, R, V')
    logits(token_ids, positions, slots, sequences (b, 4), kv, params) -> logits (g, R, V')
    decode(token_ids, positions, slots, kv, params) -> logits (g, R, V')
    decode_one(...)   decode with kernels for one row: g = R = 1
    decode_group(...) decode with kernels for one group: g = 1; only if the layout has `group_kernels`
    step(...)         decode, then token_ids becomes the argmax of the logits and positions increase by one, in place;
                      step_one and step_group for one row and group; only with tensor cores
    argmax(logits (g, R, V')) -> token_ids (g, R);  argmax_one for one row
    exp_sums(logits (n, V'), token_ids (n,)) -> distances (n,), totals (n,);  see `tvm_attn.kernels.ExpSums`
    top_logits(logits (n, V')) -> ids (n, 20), values (n, 20);  see `tvm_attn.kernels.TopLogits`
    trace(token_ids, positions, slots, sequences, kv, params)
        -> for each layer the x (g, R, E) that it gets and its queries (g, R, E), then the x after the last layer
    attention_weights_L(q (g, R, E), cache of a layer, slot (1,)) -> weights (H, g R, g R), of layers with the scale of
        layer L; see `tvm_attn.kernels.AttentionWeights`
    lens(x (g, R, E), params) -> logits (g, R, V') of x as if it came after the last layer
    transform_params(get) -> packed parameters; `get(index, name)` gives a canonical one

V' is the vocabulary rounded up to whole weight strips; the columns past V are zero. `PrefillAttention` explains
`sequences`; `last_rows` are the rows whose logits are wanted, at most `max_batch`. A step suits a CUDA graph: it reads
only what the previous step left in its arguments, and needs nothing from the host.
"""

from __future__ import annotations

from tvm import relax, tirx

from tvm_attn.config import GPT2Config
from tvm_attn.kernels import Advance, Argmax, AttentionWeights, ExpSums, TopLogits
from tvm_attn.model.forward import Forward, attention_sizes
from tvm_attn.model.layout import Layout
from tvm_attn.model.module import Module, Program, padded_vocabulary
from tvm_attn.runtime.logprobs import MOST_LOGPROBS


class _Tuples:
    """The last two arguments of a forward function, `kv` and `params`, and their elements by name."""

    def __init__(self, module: Module) -> None:
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


def _row_inputs(
    groups: tirx.Var | int, rows: int, names: tuple[str, str, str] = ("token_ids", "positions", "slots")
) -> tuple[relax.Var, relax.Var, relax.Var]:
    first, second, third = (relax.Var(name, relax.TensorType((groups, rows), "int32")) for name in names)
    return first, second, third


def _sequences() -> relax.Var:
    return relax.Var("sequences", relax.TensorType((tirx.Var("b", "int64"), 4), "int32"))


def _add_logits(module: Module, max_groups: int) -> None:
    """Adds the function logits, for all rows."""
    rows, builder, tuples, g = module.layout.rows, module.builder, _Tuples(module), tirx.Var("g", "int64")
    inputs, sequences = _row_inputs(g, rows), _sequences()
    # The upper bound lets the memory planner place all activations once for every length.
    attributes = {"tir_var_upper_bound": {"g": max_groups}}
    with builder.function("logits", [*inputs, sequences, tuples.kv, tuples.params], attrs=attributes):
        with builder.dataflow():
            forward = Forward(module, g, rows, max_groups, inputs, tuples.cache, tuples.param)
            x = forward.embed()
            for layer in range(module.config.n_layer):
                _, x = forward.block(x, layer, sequences)
            logits = builder.emit_output(forward.head(x))
        builder.emit_func_output(logits)


def _add_prefill(module: Module, max_groups: int, max_last_groups: int) -> None:
    """Adds prefill, which gives the logits of selected rows.

    In the last layer only keys and values of the other rows are needed. So that layer computes the keys and values of
    all rows, then runs as a layer of decode for the selected rows, which writes their keys and values a second time.
    """
    rows, builder, tuples, final = module.layout.rows, module.builder, _Tuples(module), module.config.n_layer - 1
    g, q = (tirx.Var(letter, "int64") for letter in "gq")
    inputs, sequences = _row_inputs(g, rows), _sequences()
    last_rows, last_positions, last_slots = chosen = _row_inputs(q, rows, ("last_rows", "last_positions", "last_slots"))
    attributes = {"tir_var_upper_bound": {"g": max_groups, "q": max_last_groups}}
    with builder.function("prefill", [*inputs, sequences, *chosen, tuples.kv, tuples.params], attrs=attributes):
        with builder.dataflow():
            forward = Forward(module, g, rows, max_groups, inputs, tuples.cache, tuples.param)
            x = forward.embed()
            for layer in range(final):
                _, x = forward.block(x, layer, sequences)
            cache, _ = forward.qkv(x, final)
            last_inputs = (None, last_positions, last_slots)
            last = Forward(module, q, rows, max_last_groups, last_inputs, lambda _: cache, tuples.param)
            _, x = last.block(last.gather(x, last_rows), final, None)
            logits = builder.emit_output(last.head(x))
        builder.emit_func_output(logits)


def _add_decode_layer(
    module: Module, name: str, layer: int, rows: int, groups: int | None, max_groups: int
) -> relax.GlobalVar:
    """Adds one layer of decode as a function that becomes one kernel: (x, positions, slots, cache, the layer's
    parameters) -> (cache, x)."""
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
            inputs = (None, positions, slots)
            forward = Forward(module, g, rows, max_groups, inputs, lambda _: cache, params.__getitem__)
            outputs = builder.emit_output(relax.Tuple(list(forward.block(x, layer, None))))
        return builder.emit_func_output(outputs)


def _layer_parameters(module: Module, layer: int) -> list[str]:
    return [name for name in module.parameters if name.startswith(f"h.{layer}.")]


class _Decode:
    """The arguments of a decode or step function, and its forward pass.

    Args:
        module: the module to which the function is added.
        name: the function's name.
        rows: rows per group.
        groups: a static number of row groups, or None for a symbolic one.
        max_groups: upper bound of the number of row groups.
    """

    def __init__(self, module: Module, name: str, rows: int, groups: int | None, max_groups: int) -> None:
        self._module, config, self._tuples = module, module.config, _Tuples(module)
        self._scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
        self._layers: dict[float, relax.GlobalVar] = {}
        if module.layout.fuse_layers:  # layers differ only in their scale
            for scale in dict.fromkeys(self._scales):
                layer = self._scales.index(scale)
                self._layers[scale] = _add_decode_layer(
                    module, f"{name}_layer_{layer}", layer, rows, groups, max_groups
                )
        self.rows, self._max_groups = rows, max_groups
        self.groups = tirx.Var("g", "int64") if groups is None else groups
        self.inputs = _row_inputs(self.groups, rows)
        self.arguments = [*self.inputs, self._tuples.kv, self._tuples.params]

    def logits(self) -> relax.Var:
        """Emits the forward pass inside the function."""
        module, tuples = self._module, self._tuples
        emit, (_, positions, slots) = module.builder.emit, self.inputs
        forward = Forward(module, self.groups, self.rows, self._max_groups, self.inputs, tuples.cache, tuples.param)
        x = forward.embed()
        for layer, scale in enumerate(self._scales):
            if self._layers:
                weights = [tensor for name in _layer_parameters(module, layer) for tensor in tuples.param(name)]
                call = relax.Call(self._layers[scale], [x, positions, slots, tuples.cache(layer), *weights])
                x = emit(relax.TupleGetItem(emit(call), 1))
            else:
                _, x = forward.block(x, layer, None)
        return forward.head(x)


def _add_decode(module: Module, name: str, rows: int, groups: int | None, max_groups: int) -> None:
    """Adds decode, decode_group or decode_one."""
    builder, decode = module.builder, _Decode(module, name, rows, groups, max_groups)
    with builder.function(name, decode.arguments, attrs={"tir_var_upper_bound": {"g": max_groups}}):
        with builder.dataflow():
            logits = builder.emit_output(decode.logits())
        builder.emit_func_output(logits)


def _add_step(module: Module, name: str, rows: int, groups: int | None, max_groups: int) -> None:
    """Adds step, step_group or step_one."""
    config, builder, decode = module.config, module.builder, _Decode(module, name, rows, groups, max_groups)
    columns = padded_vocabulary(config, module.layout)
    # No argument is an input from outside the graph; a graph is captured for each value of the symbolic sizes.
    attributes = {
        "tir_var_upper_bound": {"g": max_groups},
        "num_input": 0,
        "relax.rewrite_cuda_graph.capture_symbolic_vars": ["g", "s"],
    }
    with builder.function(name, decode.arguments, attrs=attributes):
        with builder.dataflow():
            logits = decode.logits()
            token_ids, positions, _ = decode.inputs
            kernel = Advance(vocabulary=config.vocab_size, columns=columns, rows=rows, groups=groups)
            module.call(kernel, [logits, token_ids, positions], [token_ids.ty, positions.ty], in_place=[1, 2])
            logits = builder.emit_output(logits)
        builder.emit_func_output(logits)


def _add_argmax(module: Module, name: str, rows: int, groups: tirx.Var | int) -> None:
    builder, columns = module.builder, padded_vocabulary(module.config, module.layout)
    logits = relax.Var("logits", relax.TensorType((groups, rows, columns), "float32"))
    static_groups = groups if isinstance(groups, int) else None
    kernel = Argmax(vocabulary=module.config.vocab_size, columns=columns, rows=rows, groups=static_groups)
    with builder.function(name, [logits]):
        with builder.dataflow():
            result = module.call(kernel, [logits], [relax.TensorType((groups, rows), "int32")])
            output = builder.emit_output(result)
        builder.emit_func_output(output)


def _add_logprobs(module: Module) -> None:
    """Adds exp_sums and top_logits, what log-probabilities are made of."""
    builder, columns, n = module.builder, padded_vocabulary(module.config, module.layout), tirx.Var("n", "int64")
    logits = relax.Var("logits", relax.TensorType((n, columns), "float32"))
    token_ids = relax.Var("token_ids", relax.TensorType((n,), "int32"))
    sums = [relax.TensorType((n,), "float32")] * 2
    best = [relax.TensorType((n, MOST_LOGPROBS), dtype) for dtype in ("int32", "float32")]
    vocabulary = module.config.vocab_size
    for name, kernel, arguments, types in (
        ("exp_sums", ExpSums(vocabulary, columns), [logits, token_ids], sums),
        ("top_logits", TopLogits(vocabulary, columns, MOST_LOGPROBS), [logits], best),
    ):
        with builder.function(name, arguments):
            with builder.dataflow():
                output = builder.emit_output(module.call(kernel, arguments, types))
            builder.emit_func_output(output)


def _add_trace(module: Module, max_groups: int) -> None:
    """Adds trace, attention_weights_L and lens, which show what happens inside."""
    config, layout, builder, tuples = module.config, module.layout, module.builder, _Tuples(module)
    rows, g, attributes = layout.rows, tirx.Var("g", "int64"), {"tir_var_upper_bound": {"g": max_groups}}
    inputs, sequences = _row_inputs(g, rows), _sequences()
    with builder.function("trace", [*inputs, sequences, tuples.kv, tuples.params], attrs=attributes):
        with builder.dataflow():
            forward = Forward(module, g, rows, max_groups, inputs, tuples.cache, tuples.param)
            seen = [forward.embed()]
            for layer in range(config.n_layer):
                cache, q = forward.qkv(seen[-1], layer)
                seen += [q, forward.after_qkv(seen[-1], q, cache, layer, sequences)]
            output = builder.emit_output(relax.Tuple(seen))
        builder.emit_func_output(output)
    scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
    for scale in dict.fromkeys(scales):
        layer, g = scales.index(scale), tirx.Var("g", "int64")
        q = relax.Var("q", relax.TensorType((g, rows, config.n_embd), layout.activations))
        cache = relax.Var("cache", module.kv_type(tirx.Var("s", "int64")).fields[layer])
        slot = relax.Var("slot", relax.TensorType((1,), "int32"))
        weights = relax.TensorType((config.n_head, g * rows, g * rows), "float32")
        kernel = AttentionWeights(**attention_sizes(module, layer, rows))
        with builder.function(f"attention_weights_{layer}", [q, cache, slot]):
            with builder.dataflow():
                output = builder.emit_output(module.call(kernel, [q, cache, slot], [weights]))
            builder.emit_func_output(output)
    tuples, g = _Tuples(module), tirx.Var("g", "int64")
    x = relax.Var("x", relax.TensorType((g, rows, config.n_embd), "float32"))
    with builder.function("lens", [x, tuples.params], attrs=attributes):
        with builder.dataflow():
            (_, positions, slots) = _row_inputs(g, rows)
            forward = Forward(module, g, rows, max_groups, (None, positions, slots), tuples.cache, tuples.param)
            output = builder.emit_output(forward.head(x))
        builder.emit_func_output(output)


def _add_transform_params(module: Module) -> None:
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


MAX_BATCH = 64
"""The most sequences per decode call that libraries are planned for."""


def build_program(
    config: GPT2Config, layout: Layout, max_prefill_rows: int | None = None, max_batch: int = MAX_BATCH
) -> Program:
    """GPT-2 as a Relax module that calls declared kernels.

    Args:
        config: the model's hyperparameters.
        layout: the layout of tensors for the target and storage dtype.
        max_prefill_rows: most rows per call of prefill or logits; by default one whole context.
        max_batch: most rows per call of decode.
    """
    module, rows = Module(config, layout), layout.rows
    prefill_rows = config.n_positions if max_prefill_rows is None else max_prefill_rows
    prefill_groups, decode_groups = -(-prefill_rows // rows), -(-max_batch // rows)
    _add_prefill(module, prefill_groups, decode_groups)
    _add_logits(module, prefill_groups)
    _add_decode(module, "decode", rows, None, decode_groups)
    _add_decode(module, "decode_one", 1, 1, 1)
    if layout.group_kernels:
        _add_decode(module, "decode_group", rows, 1, 1)
    if layout.tensor_cores:
        _add_step(module, "step", rows, None, decode_groups)
        _add_step(module, "step_group", rows, 1, 1)
        _add_step(module, "step_one", 1, 1, 1)
    _add_argmax(module, "argmax", rows, tirx.Var("g", "int64"))
    _add_argmax(module, "argmax_one", 1, 1)
    _add_logprobs(module)
    _add_trace(module, prefill_groups)
    _add_transform_params(module)
    given = [name for parameter in module.parameters.values() for name in parameter.given]
    return Program(module.builder.finalize(), module.kernels, given)
