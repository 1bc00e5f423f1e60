"""Fused kernels against NumPy: every loop sees what the one before it wrote, whichever thread wrote it."""

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from tvm_attn.compiler.fusion import fuse_primitive_functions

WIDTH = 24


@T.prim_func(s_tir=True)
def scale_rows(x: T.handle, factors: T.Buffer((WIDTH,), "float32"), y: T.handle) -> None:
    """y[i, :] = x[i, :] * factors, rows in parallel."""
    n = T.int32()
    X = T.match_buffer(x, (n, WIDTH), "float32")
    Y = T.match_buffer(y, (n, WIDTH), "float32")
    for i in T.parallel(n):
        for j in T.serial(WIDTH):
            with T.sblock("scale"):
                row, column = T.axis.remap("SS", [i, j])
                Y[row, column] = X[row, column] * factors[column]


@T.prim_func(s_tir=True)
def sum_rows(x: T.handle, sums: T.Buffer((WIDTH,), "float32"), y: T.handle) -> None:
    """sums += the column sums of x, on one thread; y[i, :] = x[n - 1 - i, :] + sums, rows in parallel."""
    n = T.int32()
    X = T.match_buffer(x, (n, WIDTH), "float32")
    Y = T.match_buffer(y, (n, WIDTH), "float32")
    for i in T.serial(n):
        for j in T.serial(WIDTH):
            with T.sblock("sum"):
                row, column = T.axis.remap("SS", [i, j])
                sums[column] = sums[column] + X[row, column]
    for i in T.parallel(n):
        for j in T.serial(WIDTH):
            with T.sblock("spread"):
                row, column = T.axis.remap("SS", [i, j])
                Y[row, column] = X[n - 1 - row, column] + sums[column]


def module() -> tvm.IRModule:
    """main(x (n, W), factors (W,), sums (W,)) -> (sums, y): scale, sum in place, scale again, in one primitive
    function that is called twice."""
    builder = relax.BlockBuilder()
    scale, accumulate = builder.add_func(scale_rows, "scale_rows"), builder.add_func(sum_rows, "sum_rows")
    vector = relax.TensorType((WIDTH,), "float32")

    def inputs() -> tuple[list[relax.Var], relax.TensorType]:
        matrix = relax.TensorType((tirx.Var("n", "int64"), WIDTH), "float32")
        return [relax.Var("x", matrix), relax.Var("factors", vector), relax.Var("sums", vector)], matrix

    (x, factors, sums), matrix = inputs()
    with builder.function("layer", [x, factors, sums], attrs={"Primitive": True}, private=True):
        with builder.dataflow():
            scaled = builder.emit(relax.call_tir(scale, relax.Tuple([x, factors]), [matrix]))
            pair = builder.emit(
                relax.op.call_tir_inplace(accumulate, relax.Tuple([scaled, sums]), [1, -1], [vector, matrix])
            )
            total = builder.emit(relax.TupleGetItem(pair, 0))
            y = builder.emit(relax.TupleGetItem(pair, 1))
            y = builder.emit(relax.call_tir(scale, relax.Tuple([y, factors]), [matrix]))
            results = builder.emit_output(relax.Tuple([total, y]))
        layer = builder.emit_func_output(results)
    (x, factors, sums), _ = inputs()
    with builder.function("main", [x, factors, sums]):
        with builder.dataflow():
            first = builder.emit(relax.Call(layer, [x, factors, sums]))
            middle = builder.emit(relax.TupleGetItem(first, 1))
            total = builder.emit(relax.TupleGetItem(first, 0))
            results = builder.emit_output(builder.emit(relax.Call(layer, [middle, factors, total])))
        builder.emit_func_output(results)
    return builder.finalize()


def reference(x: np.ndarray, factors: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, factors, sums = (array.astype(np.float64) for array in (x, factors, sums))
    for _ in range(2):
        scaled = x * factors
        sums = sums + scaled.sum(axis=0)
        x = (scaled[::-1] + sums) * factors
    return sums, x


@pytest.fixture(scope="module")
def machine() -> Any:
    fused = fuse_primitive_functions(module())
    return relax.VirtualMachine(relax.build(fused, "llvm"), tvm.cpu())


# One row: fewer than there are threads.
@pytest.mark.parametrize("rows", [1, 2, 3, 64, 1001])
def test_fused_functions_give_what_their_kernels_give(machine: Any, rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, factors, sums = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, WIDTH), WIDTH, WIDTH))
    expected = reference(x, factors, sums)
    given = tvm.runtime.tensor(sums)
    results = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(factors), given)
    for result, want in zip(results, expected, strict=True):
        error = np.sum((result.numpy() - want) ** 2) / np.sum(want**2)
        assert error < 1e-12
    assert np.array_equal(given.numpy(), results[0].numpy()), "sums are updated in place"


def test_a_primitive_function_is_one_call_of_one_kernel() -> None:
    fused = fuse_primitive_functions(module())
    names = {variable.name_hint for variable in fused.get_global_vars()}
    assert names == {"main", "scale_rows", "sum_rows", "layer_kernel"}
    assert str(fused["main"]).count("call_tir_inplace(layer_kernel") == 2
    text = str(fused["layer_kernel"])
    assert text.count("T.parallel(") == 3  # scale, the parallel half of the sum, scale again
    # A barrier would wait for threads that the system does not run.
    assert "pragma_parallel" not in text


def test_modules_without_primitive_functions_stay_as_they_are() -> None:
    builder = relax.BlockBuilder()
    scale = builder.add_func(scale_rows, "scale_rows")
    matrix = relax.TensorType((tirx.Var("n", "int64"), WIDTH), "float32")
    x, factors = relax.Var("x", matrix), relax.Var("factors", relax.TensorType((WIDTH,), "float32"))
    with builder.function("main", [x, factors]):
        with builder.dataflow():
            result = builder.emit_output(relax.call_tir(scale, relax.Tuple([x, factors]), [matrix]))
        builder.emit_func_output(result)
    before = builder.finalize()
    tvm.ir.assert_structural_equal(fuse_primitive_functions(before), before)
