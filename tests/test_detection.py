"""Targets for hardware that no file describes, from what a machine says; most machines here are invented."""

import platform
from pathlib import Path
from typing import Any

import pytest

from tvm_attn import targets
from tvm_attn.compiler.devices import backend_for
from tvm_attn.errors import DeviceError, TargetError
from tvm_attn.runtime.devices import Found, device_class
from tvm_attn.runtime.machine import cpu_features
from tvm_attn.targets import CpuTarget, CudaTarget, VulkanTarget, detection


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of targets."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return targets.user_folder()


def machine(monkeypatch: pytest.MonkeyPatch, architecture: str, processor: str, features: set[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(detection, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(detection, "_processor_name", lambda: processor)


def described(target: targets.Target, user: Path) -> None:
    """What holds for every description: TVM takes it, and its file is found the next time."""
    assert target.file is None
    backend_for(target).tvm_target(target)
    written = targets.write(target, user / f"{target.name}.toml")
    assert written == target
    again = targets.detect(target.device)
    assert (again, again.file) == (target, user / f"{target.name}.toml")


# --- processors ---


def test_this_processor(user: Path) -> None:
    target, here = targets.detect("cpu"), targets.detect_cpu()
    assert isinstance(target, CpuTarget)
    if target.file is not None:
        assert target == here
        return
    assert target.based_on == here.name
    assert (target.lanes, target.tile_rows, target.tile_columns) == (here.lanes, here.tile_rows, here.tile_columns)
    assert set(here.features) <= set(target.features) <= cpu_features()
    assert not target.missing(cpu_features())
    described(target, user)
    assert targets.detect_cpu() == target


V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "sse4_2", "aes"}
V4 = V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}


@pytest.mark.parametrize(
    ("processor", "features", "base", "lanes"),
    [
        ("skylake-avx512", V4, "cpu-x86-64-v4", 16),
        ("haswell", V3, "cpu-x86-64-v3", 8),
        ("sandybridge", {"avx", "sse4_2"}, "cpu-x86-64", 4),
        ("znver5", V3, "cpu-x86-64-v3", 8),
    ],
)
def test_x86(processor: str, features: set[str], base: str, lanes: int, monkeypatch: Any, user: Path) -> None:
    machine(monkeypatch, "x86_64", processor, features)
    target = targets.detect("cpu")
    assert isinstance(target, CpuTarget)
    assert (target.name, target.based_on, target.lanes) == (f"cpu-{processor}", base, lanes)
    assert target.tvm["mcpu"] == processor
    assert set(target.features) == features - {"sse4_2", "aes"}
    described(target, user)


def test_a_made_for_file_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "x86_64", "znver4", set(targets.read("cpu-znver4").features))
    assert targets.detect("cpu") == targets.read("cpu-znver4")


def test_hidden_instructions_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine may hide what the processor has by its name."""
    if "avx512f" in cpu_features() or platform.machine() != "x86_64":
        pytest.skip("needs an x86 without AVX-512")
    machine(monkeypatch, "x86_64", "znver4", V3)
    target = targets.detect("cpu")
    assert (target.name, target.based_on) == ("cpu-znver4", "cpu-x86-64-v3")
    assert {"-avx512f", "-avx512bf16", "-avx512vnni"} <= set(target.tvm["mattr"])
    assert "-avx2" not in target.tvm["mattr"]


def test_a_processor_that_llvm_does_not_know(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    machine(monkeypatch, "x86_64", "x86-64", V3)
    monkeypatch.setattr(detection, "_model_name", lambda: "Fancy(R) CPU @ 9 GHz")
    target = targets.detect("cpu")
    assert (target.name, target.tvm["mcpu"]) == ("cpu-fancy-cpu-9-ghz", "x86-64-v3")
    described(target, user)


def test_an_architecture_without_files(monkeypatch: pytest.MonkeyPatch, user: Path) -> None:
    machine(monkeypatch, "riscv64", "generic-rv64", set())
    monkeypatch.setattr(detection, "_attributes", lambda base, processor: [])
    for target in (targets.detect("cpu"), targets.detect_cpu()):
        assert isinstance(target, CpuTarget)
        assert (target.name, target.lanes, target.based_on) == ("cpu-generic-rv64", 4, None)
    described(target, user)


def cache(root: Path, name: str, **files: str) -> None:
    folder = root / "cpu0" / "cache" / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_text(content + "\n")


def cores(root: Path, *ids: int) -> None:
    for cpu, core in enumerate(ids):
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "physical_package_id").write_text("0\n")


@pytest.mark.parametrize(
    ("size", "sharing", "ids", "expected"),
    [
        ("512K", "0", (0,), 512 << 10),
        ("2M", "0-1", (0, 0), 2 << 20),  # two threads of a core
        ("2048K", "0,2-3", (0, 1, 2, 3), 2048 * 1024 // 3),
        ("many", "0", (0,), None),
        ("512K", "x", (0,), None),
        ("0K", "0", (0,), None),
    ],
)
def test_level_2_cache(size: str, sharing: str, ids: tuple[int, ...], expected: int | None, tmp_path: Path) -> None:
    root = tmp_path / "cpu"
    cores(root, *ids)
    cache(root, "index0", level="1", type="Data", size="32K", shared_cpu_list="0")
    cache(root, "index1", level="2", type="Instruction", size="1K", shared_cpu_list="0")
    cache(root, "index2", level="2", type="Unified", size=size, shared_cpu_list=sharing)
    cache(root, "index3", level="3", type="Unified", size="32M", shared_cpu_list="0-7")
    assert detection._l2_bytes(root) == expected
    assert detection._l2_bytes(tmp_path / "nowhere") is None


@pytest.fixture(autouse=True)
def first_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})


def test_model_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD  EPYC 9R14\nflags\t: fpu\n")
    assert detection._model_name(file) == "AMD EPYC 9R14"
    file.write_text("Features\t: fp asimd\nmodel name\t: \n")
    assert detection._model_name(file) == ""
    assert detection._model_name(tmp_path / "nowhere") == ""


# --- GPUs ---


def nvidia(name: str, capability: str, multiprocessors: int) -> Found:
    limits = {
        "compute_capability": capability,
        "max_threads_per_block": 1024,
        "max_shared_memory_bytes": 101376,
        "warp_size": 32,
        "multiprocessors": multiprocessors,
        "l2_bytes": 50 << 20,
        "memory_bytes": 80 << 30,
    }
    return Found("cuda:0", name, "CUDA 13.0", (), limits)


@pytest.mark.parametrize(
    ("device", "name", "base", "code"),
    [
        (nvidia("NVIDIA H100 80GB HBM3", "9.0", 132), "cuda-sm90", None, ("sm_90a",)),
        (nvidia("NVIDIA H100 PCIe", "9.0", 114), "cuda-sm90-h100-pcie", "cuda-sm90", ("sm_90a",)),
        (nvidia("NVIDIA GeForce RTX 4060", "8.9", 24), "cuda-sm89-geforce-rtx-4060", "cuda-sm89", ("sm_89",)),
        (nvidia("Orin", "8.7", 16), "cuda-sm87-orin", "cuda-sm86", ("sm_87",)),
        (nvidia("NVIDIA B300", "10.3", 148), "cuda-sm103-b300", "cuda-sm100", ("sm_103",)),
        (nvidia("NVIDIA X1", "15.0", 200), "cuda-sm150-x1", "cuda", ("sm_150",)),
    ],
)
def test_cuda(device: Found, name: str, base: str | None, code: tuple[str, ...], monkeypatch: Any, user: Path) -> None:
    monkeypatch.setattr(device_class("cuda"), "find", lambda: [device])
    target = targets.detect("cuda")
    assert isinstance(target, CudaTarget)
    assert (target.name, target.based_on, target.architectures) == (name, base, code)
    assert target.multiprocessors == device.limits["multiprocessors"]
    assert not list(device_class("cuda").lacks(target, device, "float16", "none"))
    if base is not None:
        assert target.tvm["arch"] == code[0]
        assert targets.write(target, user / f"{name}.toml") == target == targets.detect("cuda")


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_class("cuda"), "find", lambda: [nvidia("Tesla T4", "7.5", 40)])
    with pytest.raises(TargetError, match=r"no target fits Tesla T4 of compute capability 7\.5"):
        targets.detect("cuda")


ALL = ("float16", "int8", "storage16", "storage8", "subgroup_shuffle", "vulkan_memory_model", "cooperative_matrix")
F32, F16 = {"c": "float32", "result": "float32"}, {"a": "float16", "b": "float16"}


def vulkan(name: str, features: tuple[str, ...], subgroups: tuple[int, int, int], **limits: Any) -> Found:
    smallest, usual, largest = subgroups
    known = {
        "max_workgroup_invocations": 1024,
        "max_workgroup_size": [1024, 1024, 64],
        "max_shared_memory_bytes": 49152,
        "subgroup_size": usual,
        "min_subgroup_size": smallest,
        "max_subgroup_size": largest,
    }
    return Found("vulkan:0", f"{name}, discrete, Vulkan 1.3.0", "a driver", features, known | limits)


def sizes(*found: tuple[int, int, int]) -> list[dict[str, Any]]:
    wrong = [{"m": 8, "n": 8, "k": 8, "a": "float32", "b": "float32", **F32}]
    return wrong + [{"m": m, "n": n, "k": k, **F16, **F32} for m, n, k in found]


@pytest.mark.parametrize(
    ("device", "name", "base", "subgroup", "matrix"),
    [
        (
            vulkan("NVIDIA RTX 4090", ALL, (32, 32, 32), cooperative_matrices=sizes((16, 8, 16), (16, 16, 16))),
            *("vulkan-nvidia-rtx-4090", "vulkan-matrix", 32, (16, 16, 16)),
        ),
        (
            vulkan("Intel(R) Arc(tm) A770 Graphics (DG2)", ALL, (8, 32, 32), cooperative_matrices=sizes((8, 16, 16))),
            *("vulkan-intel-arc-a770-graphics", "vulkan-matrix", 32, (8, 16, 16)),
        ),
        (
            vulkan("AMD Radeon RX 7900 (RADV)", ALL, (32, 64, 64)),
            "vulkan-amd-radeon-rx-7900",
            "vulkan-generic",
            64,
            None,
        ),
        (
            vulkan(
                "SwiftShader Device (Subzero)",
                (),
                (4, 4, 4),
                max_workgroup_invocations=256,
                max_shared_memory_bytes=32768,
            ),
            *("vulkan-swiftshader-device", "vulkan-generic", None, None),
        ),
    ],
)
def test_vulkan(
    device: Found, name: str, base: str, subgroup: int | None, matrix: Any, monkeypatch: pytest.MonkeyPatch, user: Path
) -> None:
    monkeypatch.setattr(device_class("vulkan"), "find", lambda: [device])
    target = targets.detect("vulkan")
    assert isinstance(target, VulkanTarget)
    assert (target.name, target.based_on, target.subgroup, target.matrix) == (name, base, subgroup, matrix)
    for dtype in target.dtypes:
        assert not list(device_class("vulkan").lacks(target, device, dtype, "none"))
    assert ("float16" in target.dtypes) == ("float16" in device.features)
    if matrix:
        assert target.tile_rows % matrix[0] == target.tile_columns % matrix[1] == 0
    assert bool(matrix) == bool(target.tvm.get("supports_cooperative_matrix"))
    described(target, user)


def test_the_vulkan_device_of_this_machine(user: Path) -> None:
    if device_class("vulkan").obstacle():
        pytest.skip("no Vulkan device")
    described(targets.detect("vulkan"), user)


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[Found]:
        raise DeviceError("there is none")

    monkeypatch.setattr(device_class("cuda"), "find", none)
    with pytest.raises(DeviceError, match="there is none"):
        targets.detect("cuda")
    with pytest.raises(TargetError, match="'tpu' is no class of devices"):
        targets.detect("tpu")
