"""What this machine can run models on: devices with their features and limits, and the targets that fit them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tvm_attn import targets
from tvm_attn.errors import DeviceError
from tvm_attn.runtime.devices import Found, device_class, device_classes
from tvm_attn.targets import Target


@dataclass(frozen=True)
class Fit:
    """Whether unquantized code for a target and a storage dtype runs on a device.

    Attributes:
        target: the target's name.
        device: the device, or the device class if there is no such device.
        dtype: the storage dtype.
        missing: what the device lacks; empty if the code runs.
        file: where the target's file is.
    """

    target: str
    device: str
    dtype: str
    missing: tuple[str, ...]
    file: str = field(default="", compare=False)


@dataclass(frozen=True)
class Inventory:
    """This machine's devices, and the targets that fit them.

    Attributes:
        devices: the devices, processor first.
        absent: the reason for each device class that has no usable device.
        fits: one entry for every target, device of its class, and dtype of the target.
    """

    devices: tuple[Found, ...]
    absent: dict[str, str]
    fits: tuple[Fit, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def take_inventory() -> Inventory:
    """Inspects this machine through TVM and Vulkan's loader. Starts no work on any device."""
    devices, absent = [], {}
    for found in device_classes():
        try:
            devices += found.find()
        except DeviceError as error:
            absent[found.kind] = str(error)
    return Inventory(tuple(devices), absent, tuple(_fits(devices, absent)))


def obstacle(target: Target, dtype: str = "float32", quant: str = "none") -> str | None:
    """Why the first device of a target's class cannot run its code, in words; None if it can."""
    of_target = device_class(target.device)
    if reason := of_target.obstacle():
        return reason
    first = of_target.find()[0]
    lacking = ", ".join(of_target.lacks(target, first, dtype, quant))
    return f"{first.device} lacks {lacking}" if lacking else None


def _fits(devices: list[Found], absent: dict[str, str]) -> Iterator[Fit]:
    for target in targets.read_all():
        usable = [device for device in devices if device.kind == target.device and not device.missing]
        for dtype in target.dtypes:
            for device in usable:
                missing = device_class(target.device).lacks(target, device, dtype, "none")
                yield Fit(target.name, device.device, dtype, tuple(missing), target.place)
            if not usable:
                reason = absent.get(target.device, "no such device")
                yield Fit(target.name, target.device, dtype, (reason,), target.place)
