"""The run-time half of each device class: one module per class, named as in `tvm_attn.backends`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tvm_attn.backends import BACKENDS
from tvm_attn.runtime.devices.base import DeviceClass, Found

__all__ = ["DeviceClass", "Found", "class_of", "device_class", "device_classes"]


def device_class(kind: str) -> DeviceClass:
    """The device class of that name, one of `BACKENDS`."""
    found: DeviceClass = import_module(f"{__name__}.{kind}").DEVICE_CLASS
    return found


def class_of(device: Any) -> DeviceClass:
    """The device class of a TVM device."""
    number = device.dlpack_device_type()
    return next(found for found in device_classes() if found.dlpack == number)


def device_classes() -> list[DeviceClass]:
    """All device classes, in the order of `BACKENDS`."""
    return [device_class(kind) for kind in BACKENDS]
