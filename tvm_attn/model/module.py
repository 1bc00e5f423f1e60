"""The parts of GPT-2's Relax module: its parameters, and the calls of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import IRModule, relax, tirx

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.kernels import Kernel, PackPlain, PackWords
from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.weights import PLAIN, packed_types
from tvm_attn.model.layout import Layout
from tvm_attn.storage import GROUP, TABLES, cache_row, is_quantizable, scales_name, stored_types


@dataclass(frozen=True)
class Program:
    """GPT-2 as Relax.

    Attributes:
        module: the Relax functions, and a declaration without a body for each kernel.
        kernels: the kernel of each declaration, by name; the compiler replaces the declaration with its scheduled
            function.
        parameters: names of the canonical tensors that `transform_params` requests, by index.
    """

    module: IRModule
    kernels: dict[str, Kernel]
    parameters: list[str]


Type = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor."""


@dataclass(frozen=True)
class Parameter:
    """A parameter and its conversion into the library's layout.

    Attributes:
        given: canonical tensors by name: the parameter, and its scales if it is quantized.
        packed: the tensors that kernels take, in order.
        kernels: the kernel that packs each of them, or None if the canonical tensor is used unchanged.
        sizes: K, N and C of a packed matrix; zeros for the others.
    """

    given: dict[str, Type]
    packed: list[Type]
    kernels: list[PackPlain | PackWords | None]
    sizes: tuple[int, int, int] = (0, 0, 0)


def _parameter(name: str, shape: tuple[int, ...], layout: Layout, types: dict[str, Type]) -> Parameter:
    if not is_quantizable(name, shape):
        return Parameter({name: types[name]}, [types[name]], [None])
    # Token table and head are (V, E) and padded; linear layers are (in, out), and their strips divide them.
    table, weights = name in TABLES, layout.weights
    k, n = (shape[1], shape[0]) if table else shape
    columns = layout.columns if table else largest_power(n, layout.columns)
    sizes = (k, n, columns)
    packed: list[Type] = [*packed_types(weights, k, n, columns)]
    if weights in PLAIN:
        plain = PackPlain(in_features=k, out_features=n, columns=columns, dtype=weights, transposed=table)
        return Parameter({name: types[name]}, packed, [plain], sizes)
    words = PackWords(in_features=k, out_features=n, columns=columns, weights=weights, transposed=table)
    if weights == "bfloat16_pairs":
        return Parameter({name: types[name]}, packed, [words], sizes)
    given = {given_name: types[given_name] for given_name in (name, scales_name(name))}
    scales = PackPlain(in_features=k // GROUP, out_features=n, columns=columns, dtype="float16", transposed=table)
    return Parameter(given, packed, [words, scales], sizes)


def padded_vocabulary(config: GPT2Config, layout: Layout) -> int:
    """V', the number of columns of the logits."""
    return -(-config.vocab_size // layout.columns) * layout.columns


def _declaration(name: str, operands: int) -> tirx.PrimFunc:
    """A function without a body in place of a kernel: parsing its TensorIR here and for scheduling costs a second."""
    parameters = [tirx.Var(f"operand_{i}", "handle") for i in range(operands)]
    return tirx.PrimFunc(parameters, tirx.Evaluate(0)).with_attr("global_symbol", name)


class Module:
    """The Relax module under construction: adds every kernel once and emits calls to it."""

    def __init__(self, config: GPT2Config, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.builder = relax.BlockBuilder()
        self.kernels: dict[str, Kernel] = {}
        self._variables: dict[Kernel, relax.GlobalVar] = {}
        types = stored_types(config, layout.dtype, layout.quantization)
        shapes = param_shapes(config)
        self.parameters = {name: _parameter(name, shape, layout, types) for name, shape in shapes.items()}

    def call(
        self,
        kernel: Kernel,
        arguments: Sequence[relax.Expr],
        outputs: list[relax.TensorType],
        in_place: list[int] | None = None,
    ) -> relax.Var:
        """Emits a call; `in_place` gives, for each output, the argument that it updates, or -1 for a new tensor."""
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
        """Type of the KV cache: one tensor per layer."""
        config = self.config
        width, dtype = cache_row(self.layout.cache, config.head_dim)
        shape = (slots, 2, config.n_head, config.n_positions, width)
        return relax.TupleType([relax.TensorType(shape, dtype)] * config.n_layer)

    def params_type(self) -> relax.TupleType:
        """Type of the packed parameters."""
        return relax.TupleType([relax.TensorType(*kind) for p in self.parameters.values() for kind in p.packed])
