"""Which library of an artifact runs on a CUDA device, by its compute capability."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tvm_attn import targets
from tvm_attn.errors import ArtifactError, DeviceError
from tvm_attn.runtime import device
from tvm_attn.runtime.artifact import Artifact, Library
from tvm_attn.runtime.devices import Found, cuda, device_class

ALL = ("cuda", ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"), "compute_80")
SM80 = ("cuda-sm80", ("sm_80",), None)
SM86 = ("cuda-sm86", ("sm_86",), None)
SM90 = ("cuda-sm90", ("sm_90a",), None)
PTX80 = ("cuda-ptx80", (), "compute_80")
PTX90 = ("cuda-ptx90", (), "compute_90")
PTX90A = ("cuda-ptx90a", (), "compute_90a")
FAMILY = ("cuda-sm100f", ("sm_100f",), None)
Code = tuple[str, tuple[str, ...], str | None]


@pytest.fixture
def artifact(demo_artifact: Path) -> Artifact:
    return Artifact(demo_artifact)


def with_code(artifact: Artifact, codes: Sequence[Code]) -> Artifact:
    def library(target: str, architectures: tuple[str, ...], ptx: str | None) -> Library:
        names = {"target": target, "file": f"lib-{target}.so", "device": "cuda", "features": ()}
        return replace(artifact.libraries[0], **names, architectures=architectures, ptx=ptx)  # type: ignore[arg-type]

    artifact.libraries += [library(*code) for code in codes]
    return artifact


@pytest.mark.parametrize(
    ("codes", "capability", "expected"),
    [
        # Machine code for X.Y runs on X.Y and later minor versions, the newest is preferred, PTX is the last resort.
        ([SM80], (8, 0), "cuda-sm80"),
        ([SM80], (8, 9), "cuda-sm80"),
        ([SM80, SM86], (8, 6), "cuda-sm86"),
        ([SM86, SM80], (8, 9), "cuda-sm86"),
        ([SM86, SM80], (8, 0), "cuda-sm80"),
        ([SM80, PTX80], (8, 7), "cuda-sm80"),
        ([SM80, PTX80], (9, 0), "cuda-ptx80"),
        ([PTX80, PTX90], (9, 0), "cuda-ptx90"),
        ([PTX80, PTX90], (8, 9), "cuda-ptx80"),
        ([PTX80, PTX90], (12, 1), "cuda-ptx90"),
        # Code for one architecture only.
        ([SM90, PTX80], (9, 0), "cuda-sm90"),
        ([SM90, PTX80], (10, 0), "cuda-ptx80"),
        ([PTX90A, PTX80], (10, 0), "cuda-ptx80"),
        ([PTX90A, PTX80], (9, 0), "cuda-ptx90a"),
        ([FAMILY, PTX80], (10, 3), "cuda-sm100f"),
        ([FAMILY, PTX80], (12, 0), "cuda-ptx80"),
        # A library made for the device comes before one with the same machine code and more, but not if it suits less
        # well.
        ([ALL, SM90], (9, 0), "cuda-sm90"),
        ([SM90, ALL], (9, 0), "cuda-sm90"),
        ([ALL, SM90], (8, 0), "cuda"),
        ([ALL, SM80], (8, 0), "cuda-sm80"),
        ([ALL, SM80], (8, 6), "cuda"),
        ([ALL, SM80], (8, 7), "cuda"),
        *(([ALL, SM90], capability, "cuda") for capability in [(8, 9), (10, 0), (10, 3), (12, 0), (13, 0)]),
    ],
)
def test_choice(artifact: Artifact, codes: list[Code], capability: tuple[int, int], expected: str) -> None:
    library = with_code(artifact, codes).library("cuda", capability)
    assert library.target == expected
    assert library.obstacle(capability) is None


@pytest.mark.parametrize(
    ("codes", "capability", "reasons"),
    [
        (
            [ALL],
            (7, 5),
            ["lib-cuda.so cannot run here: it holds sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120, PTX of c"],
        ),
        ([SM90], (10, 0), ["it holds sm_90a, the device has compute capability 10.0"]),
        ([SM86, SM90], (8, 0), ["lib-cuda-sm86.so cannot run here", "; lib-cuda-sm90.so cannot run here"]),
        ([PTX90], (8, 9), ["it holds PTX of compute_90, the device has compute capability 8.9"]),
        ([PTX90A], (9, 1), ["it holds PTX of compute_90a, the device has"]),
        ([SM80], (9, 0), ["it holds sm_80, the"]),
        ([FAMILY], (9, 0), ["it holds sm_100f, the"]),
    ],
)
def test_no_library_for_the_device(
    artifact: Artifact, codes: list[Code], capability: tuple[int, int], reasons: list[str]
) -> None:
    with pytest.raises(ArtifactError) as caught:
        with_code(artifact, codes).library("cuda", capability)
    message = str(caught.value)
    assert all(reason in message for reason in reasons) and "\n" not in message


def test_device_that_is_absent_comes_before_its_capability(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with_code(artifact, [SM90])
    monkeypatch.setattr(cuda, "obstacle", lambda index: f"there is no device cuda:{index}")
    with pytest.raises(DeviceError, match=r"device cuda:3: there is no device cuda:3; tvm-attn devices"):
        device.choose_device(artifact, "cuda:3")


@pytest.mark.parametrize(("capability", "automatic"), [((9, 0), ("cuda-sm90", "cuda")), ((8, 0), ("lib-cpu", "cpu"))])
def test_device_whose_capability_decides(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], automatic: tuple[str, str]
) -> None:
    """If the device is asked for and no library fits, that is an error; "auto" then takes the CPU."""
    with_code(artifact, [SM90])
    monkeypatch.setattr(cuda, "obstacle", lambda index: None)
    monkeypatch.setattr(cuda, "capability", lambda index: capability)
    library, kind, index = device.choose_device(artifact, "auto")
    assert (kind, index) == (automatic[1], 0) and automatic[0] in (library.target, library.file[:7])
    if kind == "cpu":
        with pytest.raises(ArtifactError, match=r"it holds sm_90a, the device has compute capability 8\.0"):
            device.choose_device(artifact, "cuda:1")
    else:
        assert device.choose_device(artifact, "cuda:1")[1:] == ("cuda", 1)


def gpu(capability: str) -> Found:
    limits = {
        "compute_capability": capability,
        "max_threads_per_block": 1024,
        "max_shared_memory_bytes": 101376,
    }
    return Found("cuda:0", "a GPU", "CUDA 13.0", (), limits)


@pytest.mark.parametrize(
    ("target", "capability", "lacking"),
    [
        ("cuda", "8.0", []),
        ("cuda", "12.1", []),
        ("cuda", "7.5", ["support for sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120 (has compute capability 7.5)"]),
        ("cuda-sm90", "9.0", []),
        ("cuda-sm86", "8.9", []),
        ("cuda-sm86", "8.0", ["support for sm_86 (has compute capability 8.0)"]),
    ],
)
def test_targets_that_fit_a_device(target: str, capability: str, lacking: list[str]) -> None:
    assert list(device_class("cuda").lacks(targets.read(target), gpu(capability), "float32", "none")) == lacking
