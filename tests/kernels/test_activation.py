"""exp, tanh, erf and the activations over them, compiled for this machine, against PyTorch's float64 functions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from tvm import ir, s_tir
from tvm.script import tirx as T

from tvm_attn import targets
from tvm_attn.kernels import activation

LANES = 16
STATED = 3e-7
"""The relative error that tvm_attn/kernels/activation.py states."""


def _grid() -> np.ndarray:
    """Every 2**11-th float32 from -inf over the denormals to inf, and the ranges where the formulas change, densely."""
    patterns = np.arange(0, 2**32, 2**11, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = [np.linspace(-end, end, 2**19, dtype=np.float32) for end in (1.1, 5.0, 100.0)]
    tiny = np.finfo(np.float32).smallest_subnormal * np.arange(-64, 65, dtype=np.float32)
    edges = np.float32([0.625, 0.65, 0.98, 1.0, 1.02, 4.0, 87.0, 87.33, 88.73])
    around = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(100))])
    x = np.concatenate([patterns[~np.isnan(patterns)], *dense, tiny, around, -around])
    return np.concatenate([x, np.zeros(-len(x) % LANES, np.float32)])


X = _grid()
WIDE = torch.from_numpy(X).double()


def compute(expression: Callable[[ir.Expr], ir.Expr]) -> np.ndarray:
    """The expression for each value of the grid, in a loop that is vectorised like the kernels' loops."""
    target = targets.detect_cpu()

    @T.prim_func(s_tir=True)
    def elementwise(x_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, LANES), "float32")
        y = T.match_buffer(y_handle, (n, LANES), "float32")
        for i, j in T.grid(n, LANES):
            with T.sblock("y"):
                vi, vj = T.axis.remap("SS", [i, j])
                y[vi, vj] = expression(x[vi, vj])

    schedule = s_tir.Schedule(elementwise)
    schedule.vectorize(schedule.get_loops(schedule.get_sblock("y"))[-1])
    run = tvm.tirx.build(schedule.mod, target=tvm.target.Target(target.tvm))["main"]
    y = tvm.runtime.tensor(np.empty((len(X) // LANES, LANES), np.float32))
    run(tvm.runtime.tensor(X.reshape(-1, LANES)), y)
    return y.numpy().reshape(-1)


def relative_error(actual: np.ndarray, expected: torch.Tensor, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and relative errors at the chosen inputs whose results are normal float32 numbers."""
    wanted = expected.numpy()
    normal = where & np.isfinite(wanted) & (np.abs(wanted) >= np.finfo(np.float32).tiny)
    assert normal.sum() > 2**16
    return X[normal], np.abs(actual[normal] - wanted[normal]) / np.abs(wanted[normal])


def test_exp2() -> None:
    y = compute(activation.exp2)
    _, error = relative_error(y, torch.exp2(WIDE), np.abs(X) <= 126)
    assert error.max() <= STATED
    # The clamp: always positive, finite and normal.
    assert y.min() == 2.0**-126
    assert y.max() == 2.0**126
    assert y[X == 0].min() == y[X == 0].max() == 1.0


def test_exp() -> None:
    y = compute(activation.exp)
    x, error = relative_error(y, WIDE.exp(), np.abs(X) <= 87)
    # x * log2(e) is rounded to float32 once more, an error relative to the argument.
    assert (error <= np.maximum(STATED, 1e-7 * np.abs(x))).all()
    assert y[np.abs(X) < 1e-8].min() == y[np.abs(X) < 1e-8].max() == 1.0
    assert y[X < -87.4].max() == y[np.isneginf(X)].max() == y.min() == 2.0**-126
    assert y[X > 87.4].min() == y[np.isposinf(X)].min() == y.max() == 2.0**126


def test_sigmoid() -> None:
    y = compute(activation.sigmoid)
    x, error = relative_error(y, WIDE.sigmoid(), X >= -87)
    assert (error <= np.maximum(STATED, 1e-7 * np.abs(x))).all()
    assert y.min() >= 0.0
    assert y.max() == y[np.isposinf(X)].max() == 1.0
    assert y[np.isneginf(X)].max() <= 2.0**-125


@pytest.mark.parametrize(("name", "exact"), [("tanh", torch.tanh), ("erf", torch.erf)])
def test_tanh_and_erf(name: str, exact: Callable[[torch.Tensor], torch.Tensor]) -> None:
    y = compute(getattr(activation, name))
    _, error = relative_error(y, exact(WIDE), np.isfinite(X))
    assert error.max() <= STATED
    assert y.min() == y[np.isneginf(X)].max() == -1.0
    assert y.max() == y[np.isposinf(X)].min() == 1.0
    # Denormal results have an absolute precision: two steps of the denormal numbers.
    denormal = np.abs(X) < np.finfo(np.float32).tiny
    assert np.abs(y[denormal] - exact(WIDE).numpy()[denormal]).max() <= 2 * np.finfo(np.float32).smallest_subnormal


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def test_every_activation_is_tested() -> None:
    assert set(ACTIVATIONS) == set(activation.EXPRESSIONS) == set(activation.REFERENCES)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    """Activations multiply x by a factor of at most one, so the error is measured relative to x."""
    y = compute(activation.EXPRESSIONS[name])
    finite = np.isfinite(X)
    error = np.abs(y[finite] - ACTIVATIONS[name](WIDE).numpy()[finite])
    assert (error <= STATED * np.abs(X[finite]) + np.finfo(np.float32).smallest_subnormal).all()
    assert y[np.isposinf(X)].min() == (1.0 if name == "tanh" else np.inf)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_reference_of_activation(name: str) -> None:
    x = np.linspace(-30, 30, 4001)
    np.testing.assert_allclose(
        activation.REFERENCES[name](x), ACTIVATIONS[name](torch.from_numpy(x)).numpy(), rtol=1e-12, atol=1e-15
    )
