"""Copies of small tensors from an NVIDIA GPU to pinned memory, which nobody waits for until they are read.

TVM's own copies wait for the device. These are steps of a stream like kernels: the host starts more work behind them
and waits for their event alone. See "Memory Management" and "Event Management" in NVIDIA's Driver API reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import DeviceError

_PAGE = 4096
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING


class Copies:
    """Copies of one stream's tensors; their buffers are used again and again.

    Args:
        library: NVIDIA's driver.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._free: list[_Buffer] = []

    def start(self, pointer: int, shape: tuple[int, ...], dtype: str, stream: int) -> Callable[[], npt.NDArray[Any]]:
        """Starts a copy of a tensor behind the present work of a stream.

        Args:
            pointer: the tensor's address on the device that is current in this thread.
            shape, dtype: its shape and NumPy dtype.
            stream: the stream as an integer.

        Returns:
            A function that waits for the copy and returns its content. It may be called once.

        Raises:
            DeviceError: the driver refuses.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = next((entry for entry in self._free if entry.size >= size), None)
        if buffer is None:
            buffer = _Buffer(self, -(-size // _PAGE) * _PAGE)
        else:
            self._free.remove(buffer)
        self.call(
            "cuMemcpyDtoHAsync_v2", buffer.address, ctypes.c_uint64(pointer), ctypes.c_size_t(size), _handle(stream)
        )
        self.call("cuEventRecord", buffer.event, _handle(stream))
        return _Copy(self, buffer, shape, dtype)

    def give_back(self, buffer: _Buffer) -> None:
        """The buffer may be used for another copy, which lands behind earlier ones of the same stream."""
        self._free.append(buffer)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of the driver; raises DeviceError if it fails."""
        error = getattr(self._library, name)(*arguments)
        if error:
            raise DeviceError(f"NVIDIA's driver refuses {name} (error {error})")


class _Buffer:
    """Pinned memory and an event, which stay until the process ends."""

    def __init__(self, copies: Copies, size: int) -> None:
        self.size, self.address, self.event = size, ctypes.c_void_p(), ctypes.c_void_p()
        copies.call("cuMemHostAlloc", ctypes.byref(self.address), ctypes.c_size_t(size), ctypes.c_uint(0))
        copies.call("cuEventCreate", ctypes.byref(self.event), ctypes.c_uint(_DISABLE_TIMING))


class _Copy:
    """One copy. Its buffer is free again when it has been read, or dropped."""

    def __init__(self, copies: Copies, buffer: _Buffer, shape: tuple[int, ...], dtype: str) -> None:
        self._copies, self._buffer, self._shape, self._dtype = copies, buffer, shape, dtype

    def __call__(self) -> npt.NDArray[Any]:
        self._copies.call("cuEventSynchronize", self._buffer.event)
        size = int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize
        assert self._buffer.address.value is not None
        return np.frombuffer(ctypes.string_at(self._buffer.address.value, size), self._dtype).reshape(self._shape)

    def __del__(self) -> None:
        self._copies.give_back(self._buffer)


def _handle(stream: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(stream)
