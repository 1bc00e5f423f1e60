"""The stream of a device that a model's work goes to: calls, waiting, and copies to the host.

| a model loaded with | its work goes to | and is waited for |
|---|---|---|
| `stream=None` | tvm_ffi's current stream, else the default stream | when results are read |
| `stream=handle` | that stream, e.g. `torch.cuda.Stream().cuda_stream` | when results are read and inputs are written |

TVM copies between host and device on the default stream, which is not synchronized with the streams of PyTorch's pool:
so a model's own stream is waited for before each copy. Loading ends with a wait, so that parameters packed on one
stream can be read on another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi

from tvm_attn.runtime.devices import class_of


class Stream:
    """A stream of a device.

    Args:
        device: TVM's device.
        handle: the stream as an integer, or None for the one that is current in tvm_ffi at each call.
    """

    def __init__(self, device: tvm.runtime.Device, handle: int | None) -> None:
        self.device, self.given = device, handle
        self._class = class_of(device)
        self._copies = self._class.copies()
        self._running: int | None = None

    def handle(self) -> int:
        """The stream as an integer; 0 is the default stream."""
        return tvm_ffi.get_raw_stream(self.device) if self.given is None else self.given

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of a library; its kernels go to the stream."""
        self._class.select(self.device.index)
        running, self._running = self._running, None
        if running is not None and running != self.handle():
            self.device.sync(running)
        if self.given is None:
            return function(*arguments)
        with tvm_ffi.use_raw_stream(self.device, self.given):
            return function(*arguments)

    def leave_running(self) -> None:
        """Says that nobody waits for the last call: should the next one go to another stream, that waits for it."""
        self._running = self.handle()

    def carry(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function for another thread to call, with the stream that is current in this one."""
        if not self._class.has_streams or self.given is not None:
            return function
        handle = self.handle()

        def call(*args: Any, **kwargs: Any) -> Any:
            with tvm_ffi.use_raw_stream(self.device, handle):
                return function(*args, **kwargs)

        return call

    def wait(self) -> None:
        """Waits for all work on the stream, unless a copy does that anyway."""
        if self._class.has_streams and (handle := self.handle()):
            self.device.sync(handle)

    def read(self, tensor: tvm.runtime.Tensor) -> npt.NDArray[Any]:
        """A tensor (g, R, ...) on the host as (g * R, ...), once it is computed; on the CPU a view without a copy."""
        if self._class.in_host_memory:
            array = np.from_dlpack(tensor)
        else:
            self.wait()
            array = tensor.numpy()
        return array.reshape(-1, *array.shape[2:])

    def start_read(self, tensor: tvm.runtime.Tensor) -> Callable[[], npt.NDArray[Any]]:
        """Starts to read a tensor (g, R, ...): later work may overwrite it.

        Returns:
            A function that waits for the copy and returns it, (g * R, ...). It may be called once.
        """
        if self._copies is None:
            array = self.read(tensor).copy()
            return lambda: array
        self._class.select(self.device.index)
        shape = tuple(map(int, tensor.shape))
        finish = self._copies.start(tensor.data_ptr(), shape, str(tensor.dtype), self.handle())

        def read() -> npt.NDArray[Any]:
            self._class.select(self.device.index)
            return finish().reshape(-1, *shape[2:])

        return read

    def hand_over(self, consumer: int | None) -> None:
        """Waits if the consumer's stream, as `__dlpack__` numbers it, is not ordered after this one."""
        if not self._class.has_streams or consumer == -1:  # -1: the consumer takes care of it
            return
        own = self.handle()
        if own != (0 if consumer in (None, 0, 1) else consumer):  # 1 is the default stream
            self.device.sync(own)
