"""Linear layers on cooperative matrices: the generated code, and its results with emulated matrix calls.

Mesa's llvmpipe has no cooperative matrices. The kernels run on it as generated, except that TVM's matrix calls become
loops over the same memory (`with_emulated_matrices`); they have never run with matrix instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import ir, tirx
from tvm.sym.analyzer import Analyzer
from tvm_ffi.structural import structural_map, structural_walk

from tests.kernels import devices
from tvm_attn import inventory, targets, vulkan
from tvm_attn.compiler.build import build
from tvm_attn.compiler.devices import backend_for, layout_for
from tvm_attn.compiler.pipeline import compile_program
from tvm_attn.config import GPT2Config
from tvm_attn.kernels import Case, Head, Kernel, Linear, QKVLinear, ResidualLinear
from tvm_attn.kernels.gpu import linear_matrix
from tvm_attn.kernels.linear import random_case
from tvm_attn.model.gpt2 import build_program
from tvm_attn.runtime.devices import device_class
from tvm_attn.schedule import schedule
from tvm_attn.targets import GpuTarget
from tvm_attn.vulkan.codegen import build as generate
from tvm_attn.vulkan.codegen import disassemble, parse

Records = list[tuple[dict[str, Any], bytes]]

MATRIX = targets.resolve("vulkan-matrix")
assert isinstance(MATRIX, GpuTarget)

OBSTACLE = device_class("vulkan").obstacle()
pytestmark = pytest.mark.skipif(not vulkan.is_built(), reason="tvm_attn was built without its Vulkan runtime")
needs_device = pytest.mark.skipif(OBSTACLE is not None, reason=f"Vulkan: {OBSTACLE}")

# In addition to the case's bound: x is rounded to float16, by at most 2**-11 of an element. Products of x and w are
# exact in float32. Rounding errors of different elements are independent, so the squared error of a sum is at most
# (2**-11)**2 of the sum of squared products, which is the expected square of the result.
ROUNDED = 2.0**-22


def compiled(kernel: Kernel, decisions: dict[str, int] | None = None, target: GpuTarget = MATRIX) -> Any:
    function = schedule(kernel, target, decisions).with_attr("global_symbol", "main")
    return tvm.tirx.build(
        tvm.IRModule({"main": function}),
        target=backend_for(target).tvm_target(target),
        pipeline=backend_for(target).tir_pipeline(target),
    )


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    """The kernels that are generated during a test: their records and their code."""
    kept: Records = []
    emit = generate.__globals__["emit"]

    def keep(mod: tvm.IRModule) -> bytes:
        blob: bytes = emit(mod)
        kept.extend(parse(blob))
        return blob

    monkeypatch.setitem(generate.__globals__, "emit", keep)
    return kept


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Emulates the matrix calls of all kernels generated during a test; returns how many calls each kernel had."""
    counts: list[int] = []
    emit = generate.__globals__["emit"]

    def emulate(mod: tvm.IRModule) -> bytes:
        functions = {}
        for variable, function in mod.functions_items():
            functions[variable], count = with_emulated_matrices(function)
            counts.append(count)
        blob: bytes = emit(tvm.IRModule(functions))
        return blob

    monkeypatch.setitem(generate.__globals__, "emit", emulate)
    return counts


def with_emulated_matrices(function: tirx.PrimFunc) -> tuple[tirx.PrimFunc, int]:
    """A lowered kernel whose subgroups of 32 threads in x use no matrix instructions, and how many it had before.

    A thread keeps 8 neighbouring elements of a row of each 16 x 16 accumulator, and reads a row of A and 8 columns of B
    for them.
    """
    elements = {"wmma.matrix_a": 16, "wmma.matrix_b": 16 * 8, "wmma.accumulator": 8}
    fragments: dict[str, Any] = {}
    scopes: dict[str, str] = {}
    threads: list[Any] = []

    def collect(node: Any) -> None:
        if isinstance(node, tirx.AllocBuffer) and node.buffer.scope() in elements:
            name, scopes[node.buffer.name] = node.buffer.name, node.buffer.scope()
            shape = (int(node.buffer.shape[0]) // 256 * elements[scopes[name]],)
            fragments[name] = tirx.decl_buffer(shape, node.buffer.dtype, name, scope="local")
        elif getattr(node, "attr_key", None) == "thread_extent" and node.node.thread_tag == "threadIdx.x":
            assert int(node.value) == 32
            threads.append(node.node.var)

    structural_walk(function.body, ((tirx.AllocBuffer, tirx.AttrStmt), collect))
    if not fragments:
        return function, 0
    (thread,) = threads
    row, first, calls = thread // 2, thread % 2 * 8, []

    def grid(extents: tuple[int, ...], body: Callable[..., Any]) -> Any:
        variables = [tirx.Var(f"i{axis}", "int32") for axis in range(len(extents))]
        statement = body(*variables)
        for variable, extent in reversed(list(zip(variables, extents, strict=True))):
            statement = tirx.For(variable, 0, extent, tirx.ForKind.SERIAL, statement)
        return statement

    def fragment_of(pointer: Any) -> Any:
        return fragments[pointer.args[0].name]

    def store(buffer: Any, value: Any, index: Any) -> Any:
        return tirx.BufferStore(buffer, value, [index])

    def emulated(node: Any) -> Any:
        if not isinstance(node.value, ir.Call):
            return node
        name, arguments = str(node.value.op.name), list(node.value.args)
        if name == "tirx.tvm_fill_fragment":
            c, at = fragment_of(arguments[0]), arguments[4] * 8
            statement = grid((8,), lambda j: store(c, arguments[5], at + j))
        elif name == "tirx.tvm_mma_sync":
            (c, ci), (a, ai), (b, bi), (again, same) = (
                (fragment_of(arguments[i]), arguments[i + 1]) for i in (0, 2, 4, 6)
            )
            assert again.same_as(c) and int(same) == int(ci)

            def step(p: Any, j: Any) -> Any:
                product = a[ai * 16 + p].astype("float32") * b[bi * 128 + p * 8 + j].astype("float32")
                return store(c, c[ci * 8 + j] + product, ci * 8 + j)

            statement = grid((16, 8), step)
        elif name in ("tirx.tvm_load_matrix_sync", "tirx.tvm_store_matrix_sync"):
            fragment, index, stride = fragment_of(arguments[0]), arguments[4], arguments[6]
            assert arguments[7].value == "row_major" and arguments[5].op.name == "tirx.address_of"
            # Vulkan requires 16-byte pointers and strides (VUID-RuntimeSpirv-OpCooperativeMatrixLoadKHR-08986).
            modulus = Analyzer().modular_set(arguments[5].args[0].indices[0])
            for distance in (modulus.coeff, modulus.base, stride):
                assert int(distance) * np.dtype(fragment.dtype).itemsize % 16 == 0
            memory, (place,) = arguments[5].args[0].source, arguments[5].args[0].indices
            if name == "tirx.tvm_store_matrix_sync":
                here = place + row * stride + first
                statement = grid((8,), lambda j: store(memory, fragment[index * 8 + j], here + j))
            elif scopes[arguments[0].args[0].name] == "wmma.matrix_a":
                statement = grid((16,), lambda p: store(fragment, memory[place + row * stride + p], index * 16 + p))
            else:
                statement = grid(
                    (16, 8),
                    lambda p, j: store(fragment, memory[place + p * stride + first + j], index * 128 + p * 8 + j),
                )
        else:
            return node
        calls.append(name)
        return statement

    def replaced(node: Any) -> Any:
        return tirx.AllocBuffer(fragments[node.buffer.name]) if node.buffer.name in fragments else node

    def plain(node: Any) -> Any:
        return node.body if node.attr_key.startswith("fragment_") else node

    callbacks = ((tirx.Evaluate, emulated), (tirx.AllocBuffer, replaced), (tirx.AttrStmt, plain))
    return function.with_body(structural_map(function.body, callbacks)), len(calls)


def check(case: Case, function: Callable[..., None]) -> None:
    devices.assert_close(case, devices.run(function, case, tvm.vulkan(0)), ROUNDED)


def cases() -> Iterator[tuple[Case, dict[str, int]]]:
    """Cases of many rows, with decisions: every epilogue, sizes that tiles do not divide, large and small tiles."""
    linear = Linear(96, 128, 16, 64, "float16", activation="gelu_new")
    yield random_case(linear, 5), {}
    yield random_case(Linear(90, 96, 16, 32, "float16"), 3), {}
    yield random_case(ResidualLinear(128, 64, 16, 64, "float16"), 4), {}
    yield random_case(Head(128, 1021, 16, 64, "float16"), 2), {}
    for cache_dtype in ("float16", "float32"):
        qkv = QKVLinear(128, 384, 16, 64, "float16", heads=2, context=32, cache_dtype=cache_dtype)
        yield random_case(qkv, 3), {}
    yield random_case(linear, 5), {"matrix_groups": 1, "matrix_strips": 1, "matrix_k": 16, "subgroups_down": 1}
    yield random_case(linear, 3), {"matrix_groups": 2, "matrix_strips": 2, "matrix_k": 32, "subgroups_across": 4}
    yield random_case(linear, 2), {"matrix_groups": 2, "matrix_strips": 1, "matrix_k": 64}
    yield random_case(linear, 9), {"matrix_groups": 4, "subgroups_down": 4, "subgroups_across": 1}
    yield random_case(Linear(48, 64, 32, 16, "float16"), 2), {"matrix_groups": 2, "matrix_strips": 4}


@needs_device
@pytest.mark.parametrize(("case", "chosen"), list(cases()), ids=lambda value: str(getattr(value, "kernel", value)))
def test_matches_float64_with_emulated_matrices(case: Case, chosen: dict[str, int], emulation: list[int]) -> None:
    function = compiled(case.kernel, {"few_groups": 0} | chosen)
    assert max(emulation) > 0
    check(case, function["main"])


@pytest.mark.parametrize(
    "kernel",
    [
        Linear(768, 3072, 16, 64, "float16", activation="gelu_new"),
        ResidualLinear(3072, 768, 16, 64, "float16"),
        QKVLinear(768, 2304, 16, 64, "float16", heads=12, context=1024, cache_dtype="float16"),
        Head(768, 50257, 16, 64, "float16"),
    ],
    ids=lambda kernel: kernel.family,
)
def test_many_rows_use_matrices_and_few_rows_do_not(kernel: Kernel, records: Records) -> None:
    """The layers of the 124M model. The validator checks the modules of every test."""
    compiled(kernel)
    (plain, plain_code), (matrix, code) = records
    assert "cooperative_matrix" not in plain["features"]
    assert b"SPV_KHR_cooperative_matrix" not in plain_code
    assert {"cooperative_matrix", "vulkan_memory_model", "float16"} <= set(matrix["features"])
    assert matrix["subgroup_size"] == MATRIX.subgroup
    assert matrix["workgroup_size"][0] == MATRIX.subgroup
    assert matrix["shared_bytes"] <= MATRIX.shared_bytes
    text = disassemble(code)
    # Four subgroups with four sums each, and two steps through 32 features.
    assert text.count("OpCooperativeMatrixMulAddKHR") == 8
    assert text.count("OpCooperativeMatrixStoreKHR") == 4


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        (Linear(96, 128, 16, 64, "float32"), {}),
        (Linear(96, 128, 8, 64, "float16"), {}),
        (Linear(96, 24, 16, 8, "float16"), {}),
        (Linear(96, 128, 16, 64, "float16", groups=3), {}),
        (Linear(96, 128, 16, 64, "float16"), {"matrix": None}),
        (Linear(96, 128, 16, 64, "float16"), {"subgroup": None}),
        (Linear(96, 128, 16, 64, "float16"), {"shared_bytes": 4096}),
    ],
)
def test_what_matrices_do_not_fit_gets_the_plain_schedule(kernel: Linear, changes: dict[str, Any]) -> None:
    target = replace(MATRIX, **changes)
    assert not linear_matrix.fits(kernel, target)
    assert "wmma" not in schedule(kernel, target).script()


def test_targets_without_matrices_know_nothing_of_them() -> None:
    generic = targets.resolve("vulkan")
    assert isinstance(generic, GpuTarget) and generic.matrix is None and generic.subgroup is None
    assert MATRIX.matrix == (16, 16, 16)


def test_a_model_compiles(tmp_path: Path, records: Records) -> None:
    config = GPT2Config(
        vocab_size=300, n_positions=40, n_embd=64, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    program = build_program(config, layout_for(config, MATRIX, "float16", "none"), 48, 8)
    compile_program(program, MATRIX, tmp_path / "lib.so")
    assert (tmp_path / "lib.so").exists()
    using = {
        record["name"].split("_kernel")[0].rstrip("_0123456789")
        for record, _ in records
        if "cooperative_matrix" in record["features"]
    }
    assert using == {"linear", "residual_linear", "qkv_linear", "head"}
    assert all("subgroup_shuffle" in record["features"] for record, _ in records if "layer_norm" in record["name"])


def test_a_build_for_another_device_is_not_checked(demo_model_dir: Path, tmp_path: Path) -> None:
    reason = inventory.obstacle(MATRIX, "float16")
    if reason is None:
        pytest.skip("this device has cooperative matrices")
    built = build(demo_model_dir, "vulkan-matrix", "float16", out=tmp_path / "artifact")
    assert built.reports["vulkan-matrix"] is None
    assert any("lib-vulkan-matrix.so was compiled but not checked" in note and reason in note for note in built.notes)
