"""Copies from a GPU that nobody waits for, with a driver made of the host's memory."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tvm_attn.errors import DeviceError
from tvm_attn.runtime.devices.cuda_copies import Copies


class FakeDriver:
    """Work of a stream runs when an event behind it is waited for."""

    def __init__(self) -> None:
        self.streams: dict[int, list[Callable[[], Any]]] = {}
        self.events: dict[int, tuple[int, int]] = {}
        self.buffers: list[Any] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return int(getattr(self, f"_{name}")(*arguments) or 0)

        return call

    def _cuMemHostAlloc(self, address: Any, size: Any, flags: Any) -> None:
        self.buffers.append(ctypes.create_string_buffer(size.value))
        address._obj.value = ctypes.addressof(self.buffers[-1])

    def _cuEventCreate(self, event: Any, flags: Any) -> None:
        event._obj.value = len(self.buffers)

    def _cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        def copy() -> None:
            ctypes.memmove(target.value, source.value, size.value)

        self.streams.setdefault(stream.value or 0, []).append(copy)

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        handle = stream.value or 0
        self.events[event.value] = handle, len(self.streams[handle])

    def _cuEventSynchronize(self, event: Any) -> None:
        handle, count = self.events[event.value]
        for index, work in enumerate(self.streams[handle][:count]):
            work()
            self.streams[handle][index] = lambda: None


def test_copies_land_in_order_and_are_read_in_any() -> None:
    driver, values = FakeDriver(), np.arange(6, dtype=np.int32)
    copies = Copies(driver)
    first = copies.start(values.ctypes.data, (2, 3), "int32", 7)
    driver.streams[7].append(lambda: values.__iadd__(10))  # the next step overwrites them
    second = copies.start(values.ctypes.data, (2, 3), "int32", 7)
    assert "cuEventSynchronize" not in driver.calls
    np.testing.assert_array_equal(second(), np.arange(10, 16).reshape(2, 3))
    np.testing.assert_array_equal(first(), np.arange(6).reshape(2, 3))


def test_buffers_are_used_again() -> None:
    """Also those of copies that were never read."""
    driver, values = FakeDriver(), np.arange(4, dtype=np.int32)
    copies = Copies(driver)
    for step in range(5):
        values += 1
        read = copies.start(values.ctypes.data, (4,), "int32", 0)
        if step % 2:
            kept = read()
            values += 1
            copies.start(values.ctypes.data, (4,), "int32", 0)()
            np.testing.assert_array_equal(kept, values - 1)
        del read
    assert driver.calls.count("cuMemHostAlloc") <= 2
    large = np.arange(5000, dtype=np.int32)
    np.testing.assert_array_equal(copies.start(large.ctypes.data, (5000,), "int32", 0)(), large)


def test_the_driver_refuses() -> None:
    driver = FakeDriver()
    driver._cuMemHostAlloc = lambda *_: 2  # type: ignore[method-assign,assignment]
    with pytest.raises(DeviceError, match=r"refuses cuMemHostAlloc \(error 2\)"):
        Copies(driver).start(0, (1,), "int32", 0)
