"""Names of devices, and the choice between devices."""

from types import SimpleNamespace
from typing import Any

import pytest

from tvm_attn.errors import DeviceError
from tvm_attn.runtime import device
from tvm_attn.runtime.devices import cuda, device_class, device_classes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", None),
        ("cpu", ("cpu", 0)),
        ("cpu:0", ("cpu", 0)),
        ("vulkan", ("vulkan", 0)),
        ("vulkan:2", ("vulkan", 2)),
        ("cuda:11", ("cuda", 11)),
    ],
)
def test_names(name: str, expected: tuple[str, int] | None) -> None:
    assert device.parse_device(name) == expected


@pytest.mark.parametrize(
    "name", ["", "gpu", "cpu:1", "vulkan:", "vulkan:-1", "vulkan:0x1", "vulkan:0 ", "Vulkan", "vulkan:٣"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(DeviceError, match=r"^unknown device .*; use auto, cpu, cuda:0 or vulkan:0$"):
        device.parse_device(name)


class Artifact:
    """Libraries for some device classes, all of which fit this machine."""

    def __init__(self, *kinds: str) -> None:
        self.libraries = [SimpleNamespace(device=kind, obstacle=lambda capability: None) for kind in kinds]

    def library(self, kind: str, capability: Any = None) -> Any:
        return next(library for library in self.libraries if library.device == kind)


@pytest.mark.parametrize(
    ("kinds", "present", "software", "expected"),
    [
        (("cpu",), {"vulkan"}, set(), "cpu"),
        (("cpu", "vulkan"), {"vulkan"}, set(), "vulkan"),
        (("cpu", "vulkan"), {"vulkan"}, {"vulkan"}, "cpu"),
        (("cpu", "vulkan"), set(), set(), "cpu"),
        (("cpu", "vulkan", "cuda"), {"cuda", "vulkan"}, set(), "cuda"),
        (("cpu", "vulkan", "cuda"), {"vulkan"}, set(), "vulkan"),
        (("vulkan",), {"vulkan"}, {"vulkan"}, "vulkan"),
    ],
)
def test_automatic_choice(
    kinds: tuple[str, ...], present: set[str], software: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found in device_classes():
        reason = None if found.kind in {"cpu", *present} else "absent"
        monkeypatch.setattr(found, "obstacle", lambda index=0, reason=reason: reason)
        monkeypatch.setattr(found, "is_software", lambda index=0, answer=found.kind in software: answer)
    monkeypatch.setattr(cuda, "capability", lambda index: (9, 0))
    library, kind, index = device.choose_device(Artifact(*kinds), "auto")  # type: ignore[arg-type]
    assert (library.device, kind, index) == (expected, expected, 0)


def test_absent_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_class("cuda"), "obstacle", lambda index=0: f"there is no device cuda:{index}")
    with pytest.raises(DeviceError, match=r"^device cuda:1: there is no device cuda:1; tvm-attn devices lists"):
        device.choose_device(Artifact("cuda"), "cuda:1")  # type: ignore[arg-type]


def test_the_processor_is_always_there() -> None:
    assert device_class("cpu").obstacle() is None
    assert "cuda" in str(device_class("cuda").obstacle(63))
