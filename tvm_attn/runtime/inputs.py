"""Int32 arguments of the compiled functions: tensors that stay on the device, and what the host knows of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import tvm

Int32Array = npt.NDArray[np.int32]


class MirroredTensor:
    """An int32 tensor on the device, written only if the host does not know that it already holds the values.

    Args:
        shape: the tensor's shape.
        device: TVM's device.
        before_write: called before the tensor is written: no function in flight may still be reading it.
    """

    def __init__(self, shape: tuple[int, ...], device: tvm.runtime.Device, before_write: Callable[[], None]) -> None:
        self.tensor = tvm.runtime.empty(shape, "int32", device)
        self._before_write = before_write
        self.mirror: Int32Array | None = None
        """The values of the tensor, flattened, or None if the host does not know them."""

    def holds(self, values: Int32Array) -> bool:
        """Whether the tensor is known to begin with these int32 values."""
        # For arrays as short as these, comparing bytes is ten times faster than comparing elements.
        return self.mirror is not None and self.mirror[: values.size].tobytes() == values.tobytes()

    def write(self, values: Int32Array) -> tvm.runtime.Tensor:
        """Makes the tensor hold int32 values of its shape, which must be a new array; returns the tensor."""
        if not self.holds(values):
            self.mirror = None
            self._before_write()
            self.tensor.copyfrom(values)
            self.mirror = values.reshape(-1)
        return self.tensor


class Inputs:
    """The input tensors of an engine, one for each name and shape: allocating one per call would stall the device."""

    def __init__(self, device: tvm.runtime.Device, before_write: Callable[[], None]) -> None:
        self._device, self._before_write = device, before_write
        self._tensors: dict[tuple[str, tuple[int, ...]], MirroredTensor] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> MirroredTensor:
        """The tensor of that name and shape."""
        tensor = self._tensors.get((name, shape))
        if tensor is None:
            tensor = self._tensors[name, shape] = MirroredTensor(shape, self._device, self._before_write)
        return tensor

    def write(self, name: str, values: Int32Array) -> tvm.runtime.Tensor:
        """The tensor of that name and the values' shape, holding these int32 values, which must be a new array."""
        return self.get(name, values.shape).write(values)


def in_groups(values: Int32Array, shape: tuple[int, int], fill: int) -> Int32Array:
    """(n,) int32 as row groups (g, R), padded with `fill`; a new array."""
    groups = np.full(shape[0] * shape[1], fill, np.int32)
    groups[: len(values)] = values
    return groups.reshape(shape)
