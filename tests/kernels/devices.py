"""The devices that kernels are tested on: this processor, Vulkan devices, an emulated NVIDIA GPU, a real one.

Every device puts a case's tensors between guards, and checks the guards afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from tests.cuda import emulation
from tests.kernels.cuda import emulated
from tvm_attn import inventory, targets, vulkan
from tvm_attn.compiler import cuda_module
from tvm_attn.compiler.cuda import compile_fatbin
from tvm_attn.compiler.devices import backend_for
from tvm_attn.kernels import Case, Kernel
from tvm_attn.runtime.devices import device_class
from tvm_attn.schedule import schedule, supports
from tvm_attn.targets import CudaTarget, Target

_GUARD = 4096
"""Bytes before and after a tensor: all ones, which is NaN for floats and -1 for integers."""


class Device(Protocol):
    """Something that runs cases.

    Attributes:
        name: its name in the tests' ids.
    """

    name: str

    def takes(self, case: Case) -> bool:
        """Whether the device can compute the case's kernel."""
        ...

    def run(self, case: Case) -> list[np.ndarray]:
        """The results of a case, in the order of `Case.expected`."""
        ...


def assert_close(case: Case, results: Sequence[np.ndarray], more: float = 0.0) -> None:
    """Every result is within the bound of its case plus `more`, and infinite where it should be."""
    assert len(results) == len(case.expected)
    for result, expected in zip(results, case.expected, strict=True):
        infinite = np.isinf(expected)
        np.testing.assert_array_equal(result[infinite], expected[infinite])
        result, expected = result[~infinite], expected[~infinite]
        difference = result.astype(np.float64) - expected
        assert not np.isnan(difference).any()
        assert np.square(difference).sum() <= (case.nmse + more) * np.square(expected).sum()


class _WithoutOffset:
    """A view as DLPack with its offset added to its address, because compiled functions refuse an offset."""

    def __init__(self, view: Any) -> None:
        self._view = view

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.__dlpack_device__()  # type: ignore[no-any-return]

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._view._to_dlpack()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        tensor = pointer(capsule, b"dltensor")
        # In a DLTensor the address comes first, the offset after device, rank, dtype, shape and strides.
        address, offset = (ctypes.c_uint64.from_address(tensor + place) for place in (0, 40))
        address.value, offset.value = address.value + offset.value, 0
        return capsule


class _Guarded:
    """A tensor on a device with the content of an array, between guards."""

    def __init__(self, array: np.ndarray, device: Any) -> None:
        self._bytes = tvm.runtime.empty((array.nbytes + 2 * _GUARD,), "uint8", device)
        self._bytes.copyfrom(np.full(array.nbytes + 2 * _GUARD, 255, np.uint8))
        view = self._bytes._create_view(array.shape, str(array.dtype), _GUARD)
        bits = array.view(np.uint16) if str(array.dtype) == "bfloat16" else array
        self._bytes._create_view(bits.shape, str(bits.dtype), _GUARD).copyfrom(bits)
        self.tensor = tvm_ffi.from_dlpack(_WithoutOffset(view))
        self._array = array

    def read(self) -> np.ndarray:
        """The tensor's current content; checks that nothing was written next to it."""
        content = self._bytes.numpy()
        assert (content[:_GUARD] == 255).all(), "written before the start of a tensor"
        assert (content[-_GUARD:] == 255).all(), "written past the end of a tensor"
        return content[_GUARD:-_GUARD].view(self._array.dtype).reshape(self._array.shape)


def run(function: Callable[..., Any], case: Case, device: Any) -> list[np.ndarray]:
    """Calls a compiled function with a case's operands on a TVM device, each between guards."""
    tensors = [_Guarded(array, device) for array in (*case.inputs, *case.outputs)]
    function(*(entry.tensor for entry in tensors))
    return _results(case, [entry.read() for entry in tensors])


def _results(case: Case, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results among the operands; checks that the other operands are unchanged."""
    for index, (before, after) in enumerate(zip(case.inputs, arrays, strict=False)):
        if index not in case.in_place:
            assert before.tobytes() == after.tobytes(), f"input {index} was changed"
    return [*(arrays[index] for index in case.in_place), *arrays[len(case.inputs) :]]


def build(function: tirx.PrimFunc, target: Target) -> Callable[..., Any]:
    """A scheduled function, compiled for a target."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    if not isinstance(target, CudaTarget):
        built = tirx.build(
            module, target=backend_for(target).tvm_target(target), pipeline=backend_for(target).tir_pipeline(target)
        )
        return built["main"]  # type: ignore[no-any-return]
    cuda_module.register_pipeline()
    with tempfile.TemporaryDirectory() as folder, cuda_module.without_runtime():
        built = tirx.build(module, target=backend_for(target).tvm_target(target), pipeline=cuda_module.PIPELINE)
        path = Path(folder) / "kernel.so"
        cuda_module.export_library(built, path, compile_fatbin(cuda_module.device_source(built), target.images))
        return tvm.runtime.load_module(str(path))["main"]  # type: ignore[no-any-return]


class TvmDevice:
    """A device that TVM's runtime knows, and the target that its kernels are compiled for."""

    def __init__(self, name: str, target: Target, device: Callable[[], Any]) -> None:
        self.name, self.target, self._device = name, target, device
        self._function = functools.cache(lambda kernel: build(schedule(kernel, target), target))

    def takes(self, case: Case) -> bool:
        """See `Device`."""
        return supports(case.kernel, self.target)

    def run(self, case: Case) -> list[np.ndarray]:
        """See `Device`."""
        return run(self._function(case.kernel), case, self._device())


class EmulatedGpu:
    """Tensor-core kernels in the emulation; the address sanitizer's zones around tensors are the guards."""

    name = "emulated-cuda"

    def takes(self, case: Case) -> bool:
        """Whether this kernel is emulated: not all are, because compiling is slow."""
        return emulated.is_emulated(case.kernel)

    def run(self, case: Case) -> list[np.ndarray]:
        """See `Device`."""
        return emulate(emulated.function_for(case.kernel), case)


def emulate(function: tirx.PrimFunc, case: Case, races: bool = False) -> list[np.ndarray]:
    """Runs a function that is scheduled for CUDA with a case's operands; see `emulation.run`."""
    arrays = [array.copy() for array in (*case.inputs, *case.outputs)]
    emulation.run(function, arrays, races=races)
    return _results(case, arrays)


def processor() -> TvmDevice:
    """This machine's processor."""
    return TvmDevice("cpu", targets.detect_cpu(), tvm.cpu)


def vulkan_devices() -> list[TvmDevice]:
    """Every usable Vulkan device, with schedules that work on all of them."""
    if device_class("vulkan").obstacle() is not None:
        return []
    usable = [index for index in range(len(vulkan.devices())) if device_class("vulkan").obstacle(index) is None]
    generic = targets.resolve("vulkan")
    return [TvmDevice(f"vulkan:{index}", generic, functools.partial(tvm.vulkan, index)) for index in usable]


def gpu() -> TvmDevice | None:
    """The NVIDIA GPU, with its own target if there is one."""
    if device_class("cuda").obstacle() is not None:
        return None
    candidates = [targets.read(name) for name in targets.names() if name.startswith("cuda-")]
    fitting = [target for target in candidates if inventory.obstacle(target) is None]
    return TvmDevice("cuda", (fitting or [targets.read("cuda")])[-1], tvm.cuda)


@functools.cache
def case_of(kernel: Kernel) -> Case:
    """The first case of a kernel."""
    return next(case for case in type(kernel).cases() if case.kernel == kernel)
