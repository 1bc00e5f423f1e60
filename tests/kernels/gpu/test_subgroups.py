"""Schedules for a target with a known subgroup size, on a device with that size, against NumPy float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tvm

from tests.kernels import devices
from tvm_attn import targets, vulkan
from tvm_attn.compiler.devices import backend_for
from tvm_attn.kernels import Argmax, Case, DecodeAttention, Kernel, LayerNorm
from tvm_attn.runtime.devices import device_class
from tvm_attn.schedule import schedule, supports
from tvm_attn.targets import GpuTarget
from tvm_attn.vulkan.codegen import build, parse

GENERIC = targets.resolve("vulkan")
assert isinstance(GENERIC, GpuTarget)

OBSTACLE = device_class("vulkan").obstacle()
needs_device = pytest.mark.skipif(OBSTACLE is not None, reason=f"Vulkan: {OBSTACLE}")
needs_runtime = pytest.mark.skipif(not vulkan.is_built(), reason="tvm_attn was built without its Vulkan runtime")


def with_subgroups(size: int) -> GpuTarget:
    """The target from a file with `gpu.subgroup = size` and TVM's `thread_warp_size = size`."""
    return replace(GENERIC, subgroup=size, tvm=GENERIC.tvm | {"thread_warp_size": size})


def compiled(kernel: Kernel, target: GpuTarget, decisions: dict[str, int] | None = None) -> Any:
    module = tvm.IRModule({"main": schedule(kernel, target, decisions).with_attr("global_symbol", "main")})
    return tvm.tirx.build(
        module, target=backend_for(target).tvm_target(target), pipeline=backend_for(target).tir_pipeline(target)
    )


def check(case: Case, function: Callable[..., None]) -> None:
    devices.assert_close(case, devices.run(function, case, tvm.vulkan(0)))


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The records of the kernels that are compiled during a test."""
    kept: list[dict[str, Any]] = []
    emit = build.__globals__["emit"]

    def keep(mod: tvm.IRModule) -> bytes:
        blob: bytes = emit(mod)
        kept.extend(record for record, _ in parse(blob))
        return blob

    monkeypatch.setitem(build.__globals__, "emit", keep)
    return kept


@needs_device
@pytest.mark.parametrize("family", [LayerNorm, Argmax, DecodeAttention], ids=lambda family: family.family)
def test_kernels_on_a_device_with_known_subgroups(family: type[Kernel], records: list[dict[str, Any]]) -> None:
    target = with_subgroups(vulkan.devices()[0]["limits"]["subgroup_size"])
    cases = [case for case in family.cases() if supports(case.kernel, target)]
    for kernel in dict.fromkeys(case.kernel for case in cases):
        function = compiled(kernel, target)["main"]
        for case in cases:
            if case.kernel == kernel:
                check(case, function)
    if family is LayerNorm:
        assert {record["subgroup_size"] for record in records} == {target.subgroup}


@needs_device
@pytest.mark.parametrize("threads", [32, 64])
def test_several_subgroups_a_row(threads: int) -> None:
    size = vulkan.devices()[0]["limits"]["subgroup_size"]
    if threads > min(size**2, GENERIC.max_threads):
        pytest.skip(f"subgroups of {size} sum {size**2} threads")
    for case in LayerNorm.cases():
        if supports(case.kernel, GENERIC) and case.kernel.width >= threads:
            check(case, compiled(case.kernel, with_subgroups(size), {"threads": threads})["main"])


@needs_runtime
@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
def test_layer_norm_shuffles_in_subgroups_of_the_target(size: int, records: list[dict[str, Any]]) -> None:
    """Shared memory holds two sums over all threads without subgroups, and two numbers per subgroup with them."""
    kernel = LayerNorm(768, 1e-5, 8)
    compiled(kernel, GENERIC)
    text = compiled(kernel, with_subgroups(size)).imports[0].inspect_source()
    plain, shuffling = records
    assert plain["subgroup_size"] is None and "subgroup_shuffle" not in plain["features"]
    assert shuffling["subgroup_size"] == size and "subgroup_shuffle" in shuffling["features"]
    assert "OpGroupNonUniformShuffle" in text
    assert shuffling["shared_bytes"] < plain["shared_bytes"]
