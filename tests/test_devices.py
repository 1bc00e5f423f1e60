"""The command that lists devices, and what it says is missing for a target."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from tvm_attn import _resources, devices, inventory, targets
from tvm_attn._resources import resource_dir
from tvm_attn.errors import DeviceError, TargetError
from tvm_attn.runtime.devices import Found, device_class
from tvm_attn.runtime.machine import usable_cores

GPU = Found(
    device="vulkan:0",
    name="a GPU",
    driver="a driver 1.2",
    features=("float16", "int8", "storage16", "subgroup_shuffle"),
    limits={
        "max_workgroup_invocations": 1024,
        "max_shared_memory_bytes": 49152,
        "min_subgroup_size": 32,
        "max_subgroup_size": 64,
        "memory_bytes": 8 << 30,
    },
)


def lacking(target: targets.Target, device: Found, dtype: str = "float32") -> list[str]:
    return list(device_class(target.device).lacks(target, device, dtype, "none"))


@pytest.fixture
def generic() -> targets.GpuTarget:
    target = targets.read("vulkan-generic")
    assert isinstance(target, targets.GpuTarget)
    return target


def test_json_lists_devices_and_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    processor = listed["devices"][0]
    assert processor["device"] == "cpu"
    assert processor["limits"]["cores"] == usable_cores()
    assert {fit["target"] for fit in listed["fits"]} == set(targets.names())
    # Each class of devices is either there or its absence is explained.
    present = {entry["device"].partition(":")[0] for entry in listed["devices"] if not entry["missing"]}
    for kind in ("cuda", "vulkan"):
        assert (kind in present) != bool(listed["absent"].get(kind))


def test_text_names_devices_reasons_and_targets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> list[Found]:
        raise DeviceError("no such thing here [at all]")

    old = dataclasses.replace(GPU, device="vulkan", name="an old GPU", limits={}, features=(), missing=("Vulkan 1.3",))
    monkeypatch.setattr(device_class("cuda"), "find", none)
    monkeypatch.setattr(device_class("vulkan"), "find", lambda: [GPU, old])
    assert devices.main([]) == 0
    text = capsys.readouterr().out
    assert "vulkan:0: a GPU" in text
    assert "8.0 GiB" in text
    assert "vulkan: an old GPU" in text
    assert "needs Vulkan 1.3" in text
    assert "cuda: no such thing here [at all]" in text
    assert "vulkan-generic" in text


def test_gpu_that_has_everything(generic: targets.GpuTarget) -> None:
    assert lacking(generic, GPU, "float16") == []


def test_float32_needs_no_feature(generic: targets.GpuTarget, capsys: pytest.CaptureFixture[str]) -> None:
    """Vulkan 1.3 promises neither 64-bit integers nor any type of 16 bits."""
    plain = dataclasses.replace(GPU, features=())
    assert lacking(generic, plain) == []
    assert lacking(generic, plain, "float16") == ["float16", "storage16"]
    fits = tuple(inventory._fits([plain], {"cuda": "none", "cpu": "none"}))
    devices._print(inventory.Inventory((plain,), {}, fits))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "vulkan-generic" in line)
    *words, file = line.split()
    assert words == ["vulkan-generic", "vulkan:0", "float32", "float16:", "float16,", "storage16"]
    assert file.endswith("targets/vulkan-generic.toml")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_threads": 2048}, ["blocks of 2048 threads (has 1024)"]),
        ({"shared_bytes": 65536}, ["65536 bytes of shared memory (has 49152)"]),
        ({"subgroup": 16}, ["subgroups of 16 (has 32 to 64)"]),
        ({"subgroup": 64}, []),
        ({"matrix": (16, 16, 16)}, ["cooperative_matrix", "vulkan_memory_model"]),
        ({"subgroup": 32}, []),
    ],
)
def test_what_a_gpu_lacks(generic: targets.GpuTarget, changes: dict[str, Any], expected: list[str]) -> None:
    assert lacking(dataclasses.replace(generic, **changes), GPU, "float16") == expected


def test_what_a_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("tvm_attn.runtime.devices.cpu.cpu_features", lambda: frozenset(("avx2", "sse2")))
    processor = Found("cpu", "a processor", None, ("avx2", "sse2"), {"cores": 1})
    x86 = targets.read("cpu-x86-64-v3")
    assert lacking(x86, processor) == [feature for feature in x86.features if feature not in ("avx2", "sse2")]
    assert lacking(targets.read("cpu-aarch64"), processor) == ["architecture aarch64"]


def test_matrices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = {"m": 16, "n": 8, "k": 16, "a": "float16", "b": "float16", "c": "float32", "result": "float32"}
    for found, line in (([matrix, matrix], "16 x 8 x 16 float16 with float32 sums"), ([], "-")):
        device = dataclasses.replace(GPU, limits=GPU.limits | {"cooperative_matrices": found})
        devices._print(inventory.Inventory((device,), {}, ()))
        (row,) = (row for row in capsys.readouterr().out.splitlines() if "cooperative matrices" in row)
        assert row.split("matrices")[1].strip() == line


def test_unusable_devices_fit_no_target(generic: targets.GpuTarget) -> None:
    unusable = dataclasses.replace(GPU, device="vulkan", missing=("bufferDeviceAddress",))
    fits = [fit for fit in inventory._fits([unusable], {"vulkan": "why"}) if fit.target == generic.name]
    assert fits == [inventory.Fit(generic.name, "vulkan", dtype, ("why",)) for dtype in generic.dtypes]


def test_why_a_device_does_not_run_a_target(generic: targets.GpuTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_class("vulkan"), "obstacle", lambda index=0: None)
    monkeypatch.setattr(device_class("vulkan"), "find", lambda: [GPU])
    matrix = targets.read("vulkan-matrix")
    assert isinstance(matrix, targets.GpuTarget)
    assert inventory.obstacle(generic) is None
    assert inventory.obstacle(generic, "float32", "int8") == "vulkan:0 lacks storage8"
    assert inventory.obstacle(matrix) is None
    assert inventory.obstacle(matrix, "float16") == "vulkan:0 lacks cooperative_matrix, vulkan_memory_model"
    monkeypatch.setattr(device_class("vulkan"), "obstacle", lambda index=0: "no vulkan today")
    assert inventory.obstacle(generic) == "no vulkan today"


def test_matrices_have_three_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (resource_dir("targets") / "vulkan-matrix.toml").read_text()
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "short.toml").write_text(text.replace("[16, 16, 16]", "[16, 16]"))
    monkeypatch.setattr(_resources, "resource_dir", lambda name: tmp_path / name)
    with pytest.raises(TargetError, match=r"gpu.matrix is \[16, 16\]; give three sizes"):
        targets.read("short")
