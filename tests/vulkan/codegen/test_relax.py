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


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("name", "reference"), [("cumsum", np.cumsum), ("cumprod", np.cumprod)])
def test_running_sums_and_products(name: str, reference: Any, axis: int, evaluate: Evaluate) -> None:
    """TVM allocates their scratch variables outside of the launch: they are parameters of scope "local"."""
    x = np.random.default_rng(0).uniform(0.5, 1.5, (37, 21)).astype("float32")
    got = evaluate(lambda v: getattr(relax.op, name)(v, axis=axis), x)
    np.testing.assert_allclose(got, reference(x.astype("float64"), axis=axis), rtol=1e-5)
