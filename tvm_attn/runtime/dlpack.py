"""Tensors that other libraries share with TVM through DLPack, https://dmlc.github.io/dlpack/latest/."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_CPU = 1  # kDLCPU


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def rows_view(tensor: Any, rows: int, columns: int) -> Any:
    """The first columns of the first rows of a TVM tensor (..., C), as a TVM tensor (rows, columns) without a copy.

    Its rows are C elements apart. TVM makes only compact views, so this makes one of whole rows and shortens them.
    """
    view = tensor._create_view((rows, int(tensor.shape[-1])))
    capsule = view._to_dlpack()
    # The capsule's shape is the view's own memory, so changing it changes the view.
    _DLTensor.from_address(_pointer(capsule, b"dltensor")).shape[1] = columns
    return view


def host_array(values: Any) -> np.ndarray:
    """Values as a NumPy array; tensors of PyTorch and other libraries are copied from whatever device they are on."""
    if not isinstance(values, np.ndarray) and hasattr(values, "__dlpack_device__"):
        if values.__dlpack_device__()[0] != _CPU:
            values = values.cpu() if hasattr(values, "cpu") else _from_device(values)
        if not hasattr(values, "__array__"):
            return np.from_dlpack(values)
    return np.asarray(values)


def _from_device(values: Any) -> np.ndarray:
    """The content of a tensor on a device that TVM knows."""
    import tvm  # noqa: F401  (its tensors have numpy())
    import tvm_ffi

    tensor: Any = tvm_ffi.from_dlpack(values, require_contiguous=True)
    array: np.ndarray = tensor.numpy()
    return array
