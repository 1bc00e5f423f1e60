"""Relax programs as a user compiles them for the device at hand: stock legalization, DLight, stock lowering."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.s_tir import dlight

Array = np.ndarray[Any, Any]
RULES = (dlight.gpu.Matmul(), dlight.gpu.GEMV(), dlight.gpu.Reduction(), dlight.gpu.GeneralReduction())


@pytest.fixture
def evaluate(vulkan: Any) -> Callable[..., Array]:
    """evaluate(expression, *arrays): the value of a Relax expression of the arrays."""

    def compute(expression: Callable[..., Any], *arrays: Array) -> Array:
        inputs = [relax.Var(f"x{n}", relax.TensorType(a.shape, str(a.dtype))) for n, a in enumerate(arrays)]
        builder = relax.BlockBuilder()
        with builder.function("main", inputs):
            with builder.dataflow():
                result = builder.emit_output(expression(*inputs))
            builder.emit_func_output(result)
        target = tvm.target.Target.from_device("vulkan").with_host("llvm")
        with target:
            module = relax.transform.LegalizeOps()(builder.get())
            module = dlight.ApplyDefaultSchedule(*RULES, dlight.gpu.Fallback())(module)
        machine = relax.VirtualMachine(tvm.compile(module, target=target), vulkan)
        result = machine["main"](*(tvm.runtime.tensor(a, vulkan) for a in arrays)).numpy()
        assert isinstance(result, np.ndarray)
        return result

    return compute


Evaluate = Callable[..., Array]


@pytest.mark.parametrize(("m", "k", "n"), [(1, 40, 23), (1, 7, 5), (3, 40, 23), (5, 64, 1), (1, 300, 130)])
def test_matmul(m: int, k: int, n: int, evaluate: Evaluate) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), "float32"), rng.standard_normal((k, n), "float32")
    np.testing.assert_allclose(evaluate(relax.op.matmul, a, b), a.astype("float64") @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [17, 80, 130])
def test_concatenation_of_many(count: int, evaluate: Evaluate) -> None:
    """One nested decision for each of them; a driver takes 79."""
    arrays = [np.random.default_rng(n).standard_normal((1 + n % 2, 3), "float32") for n in range(count)]
    got = evaluate(lambda *values: relax.op.concat(list(values), axis=0), *arrays)
    np.testing.assert_array_equal(got, np.concatenate(arrays))


def test_long_chain(evaluate: Evaluate) -> None:
    def chain(x: Any) -> Any:
        for _ in range(200):
            x = relax.op.add(relax.op.multiply(x, relax.const(0.5)), relax.const(1.0))
        return x

    x = np.random.default_rng(0).standard_normal((8, 8), "float32")
    np.testing.assert_allclose(evaluate(chain, x), np.full((8, 8), 2.0), rtol=1e-6)


@pytest.mark.parametrize("count", [10, 1500])
def test_sort(count: int, evaluate: Evaluate) -> None:
    """The extent of one of its loops is a cast."""
    x = np.random.default_rng(0).standard_normal(count, "float32")
    np.testing.assert_array_equal(evaluate(lambda v: relax.op.sort(v, axis=0), x), np.sort(x))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("name", "reference"), [("cumsum", np.cumsum), ("cumprod", np.cumprod)])
def test_running_sums_and_products(name: str, reference: Any, axis: int, evaluate: Evaluate) -> None:
    """TVM allocates their scratch variables outside the launch: they are parameters of scope "local"."""
    x = np.random.default_rng(0).uniform(0.5, 1.5, (37, 21)).astype("float32")
    got = evaluate(lambda v: getattr(relax.op, name)(v, axis=axis), x)
    np.testing.assert_allclose(got, reference(x.astype("float64"), axis=axis), rtol=1e-5)
