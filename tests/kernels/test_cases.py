"""Every kernel on every available device, over its own cases, against NumPy float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tvm import tirx
from tvm.script import tirx as T

from tests.kernels import devices
from tests.kernels.devices import Device
from tvm_attn import targets
from tvm_attn.kernels import FAMILIES, Case, LayerNorm
from tvm_attn.schedule import supports

CASES = [case for family in FAMILIES for case in family.cases()]


def pairs() -> Iterator[Any]:
    """Every case with each device that takes it."""
    gpu = devices.gpu()
    present: list[Device] = [devices.processor(), *devices.vulkan_devices(), devices.EmulatedGpu()]
    for device in [*present, *([gpu] if gpu else [])]:
        marks = [pytest.mark.gpu] if device is gpu else []
        for case in CASES:
            if device.takes(case):
                yield pytest.param(device, case, marks=marks, id=f"{device.name}-{case.kernel}-{case.name}")


@pytest.mark.parametrize(("device", "case"), list(pairs()))
def test_case(device: Device, case: Case) -> None:
    devices.assert_close(case, device.run(case))


def test_every_case_has_a_target() -> None:
    known = [targets.read(name) for name in targets.names()]
    assert all(any(supports(case.kernel, target) for target in known) for case in CASES)


# --- the harness itself ---

KERNEL = LayerNorm(64, 1e-5, 8)


def faulty(row: int, column: int) -> tirx.PrimFunc:
    """A kernel with LayerNorm's operands that writes one element, at a given row and column."""

    @T.prim_func(s_tir=True)
    def function(
        x: T.Buffer((1, 8, 64), "float32"),
        gamma: T.Buffer((64,), "float32"),
        beta: T.Buffer((64,), "float32"),
        y: T.Buffer((1, 8, 64), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for _ in range(1):
            with T.sblock("write"):
                T.reads()
                T.writes(y[0, 0:8, 0:64])
                y[0, row, column] = T.float32(1)

    return function


@pytest.mark.parametrize(("row", "column", "message"), [(0, -1, "before the start"), (7, 64, "past the end")])
def test_a_write_next_to_a_tensor_is_found(row: int, column: int, message: str) -> None:
    device = devices.processor()
    function = devices.build(faulty(row, column), device.target)
    with pytest.raises(AssertionError, match=message):
        devices.run(function, devices.case_of(KERNEL), device._device())


def test_a_changed_input_is_found() -> None:
    def change(x: Any, *_: Any) -> None:
        x.copyfrom(np.zeros(x.shape, np.float32))

    with pytest.raises(AssertionError, match="input 0 was changed"):
        devices.run(change, devices.case_of(KERNEL), devices.processor()._device())


def test_a_wrong_result_is_found() -> None:
    case = devices.case_of(KERNEL)
    wrong, nan = (expected.copy() for expected in case.expected * 2)
    wrong[0, 0, 0] += 1e-2
    nan[-1, -1, -1] = np.nan
    devices.assert_close(case, case.expected)
    for result in (wrong, nan):
        with pytest.raises(AssertionError):
            devices.assert_close(case, [result])
