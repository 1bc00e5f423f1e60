"""TVM's default GPU schedules (DLight) with target vulkan, static and symbolic shapes, against NumPy float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx
from tvm.s_tir import dlight

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

TARGET = {"kind": "vulkan", "max_num_threads": 256, "max_shared_memory_per_block": 32768, "supports_float16": True}
# Normalised mean squared error: the mean of the squared difference over the mean of the squared reference.
NMSE = {"float32": 1e-12, "float16": 1e-6}


def scheduled(function: Any, *rules: Any) -> tvm.IRModule:
    """The function as DLight schedules it. Each rule ignores functions that are not of its kind."""
    with tvm.target.Target(TARGET):
        mod = dlight.ApplyDefaultSchedule(*rules)(tvm.IRModule({"main": function}))
    assert mod["main"].attrs["tirx.is_scheduled"]
    return mod


def check(mod: tvm.IRModule, run: Run, want: Array, *inputs: Array) -> None:
    dtype = str(inputs[0].dtype)
    got = run(mod, *inputs, np.zeros(want.shape, dtype), target=TARGET)[-1].astype("float64")
    assert not np.isnan(got).any()
    assert np.square(got - want).mean() <= NMSE[dtype] * np.square(want).mean()


def normal(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def extents(symbolic: str, **sizes: int) -> list[Any]:
    """The sizes; those named in `symbolic` as variables."""
    return [te.var(name, "int64") if name in symbolic else tirx.IntImm("int64", size) for name, size in sizes.items()]


def product(m: Any, n: Any, k: Any, dtype: str, transposed: bool = True) -> Any:
    """out[i, j] = sum of a[i, k] * b[j, k], in float32 if the type is float16."""
    one = tirx.IntImm("int64", 1)
    a = te.placeholder((one, m, k), dtype, "a")
    b = te.placeholder((n, k) if transposed else (k, n), dtype, "b")
    axis = te.reduce_axis((0, k), "axis")

    def element(z: Any, i: Any, j: Any) -> Any:
        return te.sum(
            a[z, i, axis].astype("float32") * (b[j, axis] if transposed else b[axis, j]).astype("float32"), axis=axis
        )

    wide = te.compute((one, m, n), element, "wide")
    if dtype == "float32":
        return te.create_prim_func([a, b, wide])
    return te.create_prim_func([a, b, te.compute((one, m, n), lambda *i: wide(*i).astype(dtype), "out")])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symbolic", ["", "m", "mn"])
def test_matmul(symbolic: str, transposed: bool, dtype: str, run: Run) -> None:
    m, n, k = 70, 96, 64
    mod = scheduled(product(*extents(symbolic, m=m, n=n, k=k), dtype, transposed), dlight.gpu.Matmul())
    a, b = normal((1, m, k), dtype), normal((n, k) if transposed else (k, n), dtype, 1)
    check(mod, run, a.astype("float64") @ (b.T if transposed else b).astype("float64"), a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symbolic", ["", "n"])
def test_gemv(symbolic: str, transposed: bool, dtype: str, run: Run) -> None:
    n, k = 192, 256
    function = product(*extents(symbolic, m=1, n=n, k=k), dtype, transposed)
    mod = scheduled(function, dlight.gpu.GEMV(), dlight.gpu.Reduction(), dlight.gpu.GeneralReduction())
    a, b = normal((1, 1, k), dtype), normal((n, k) if transposed else (k, n), dtype, 1)
    check(mod, run, a.astype("float64") @ (b.T if transposed else b).astype("float64"), a, b)


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_gemv_of_a_small_batch(rows: int, run: Run) -> None:
    n, k = 64, 256
    mod = scheduled(product(*extents("m", m=rows, n=n, k=k), "float32"), dlight.gpu.LowBatchGEMV(4))
    a, b = normal((1, rows, k), "float32"), normal((n, k), "float32", 1)
    check(mod, run, a.astype("float64") @ b.T.astype("float64"), a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("symbolic", ["", "n", "k"])
@pytest.mark.parametrize("axis", [0, 1])
def test_reduction(axis: int, symbolic: str, dtype: str, run: Run) -> None:
    n, k = 100, 130
    rows, length = extents(symbolic, n=n, k=k)
    x = te.placeholder((rows, length) if axis == 1 else (length, rows), dtype, "x")
    reduced = te.reduce_axis((0, length), "reduced")
    out = te.compute((rows,), lambda i: te.max(x[i, reduced] if axis == 1 else x[reduced, i], axis=reduced), "out")
    rules = (dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
    mod = scheduled(te.create_prim_func([x, out]), *rules)
    values = normal((n, k) if axis == 1 else (k, n), dtype)
    check(mod, run, values.astype("float64").max(axis), values)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("symbolic", ["", "n", "nk"])
def test_softmax(symbolic: str, dtype: str, run: Run) -> None:
    n, k = 40, 300
    rows, length = extents(symbolic, n=n, k=k)
    x = te.placeholder((rows, length), dtype, "x")
    mod = scheduled(te.create_prim_func([x, tvm.topi.nn.softmax(x)]), dlight.gpu.GeneralReduction())
    values = normal((n, k), dtype) * np.array(3, dtype)
    powers = np.exp(values.astype("float64") - values.max(1, keepdims=True).astype("float64"))
    check(mod, run, powers / powers.sum(1, keepdims=True), values)


@pytest.mark.parametrize("symbolic", ["", "n"])
def test_rms_norm(symbolic: str, run: Run) -> None:
    n, k = 17, 256
    batch, rows, length = extents(symbolic, batch=1, n=n, k=k)
    x, weight = te.placeholder((batch, rows, length), "float32", "x"), te.placeholder((length,), "float32", "weight")
    mod = scheduled(te.create_prim_func([x, weight, tvm.topi.nn.rms_norm(x, weight, [2], 1e-5)]), dlight.gpu.RMSNorm())
    values, weights = normal((1, n, k), "float32"), normal((k,), "float32", 1)
    wide = values.astype("float64")
    want = wide / np.sqrt(np.square(wide).mean(2, keepdims=True) + 1e-5) * weights
    check(mod, run, want, values, weights)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("symbolic", ["", "n", "nm"])
def test_transpose(symbolic: str, dtype: str, run: Run) -> None:
    n, m = 70, 130
    rows, columns = extents(symbolic, n=n, m=m)
    x = te.placeholder((rows, columns), dtype, "x")
    out = te.compute((columns, rows), lambda i, j: x[j, i], "out")
    mod = scheduled(te.create_prim_func([x, out]), dlight.gpu.Transpose())
    values = normal((n, m), dtype)
    check(mod, run, values.T.astype("float64"), values)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("symbolic", ["", "n", "nm"])
def test_fallback(symbolic: str, dtype: str, run: Run) -> None:
    n, m = 33, 70
    rows, columns = extents(symbolic, n=n, m=m)
    x, y = te.placeholder((rows, columns), dtype, "x"), te.placeholder((columns,), dtype, "y")
    total = te.compute((rows, columns), lambda i, j: x[i, j] + y[j], "total")
    out = te.compute(
        (rows, columns), lambda i, j: te.max(total[i, j], tirx.const(0, dtype)) * y[columns - 1 - j], "out"
    )
    mod = scheduled(te.create_prim_func([x, y, out]), dlight.gpu.Fallback())
    a, b = normal((n, m), dtype), normal((m,), dtype, 1)
    wide = b.astype("float64")
    check(mod, run, np.maximum(a.astype("float64") + wide, 0) * wide[::-1], a, b)
