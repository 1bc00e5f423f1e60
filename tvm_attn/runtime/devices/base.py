"""What every device class answers at run time: which devices there are, why one cannot be used, what it lacks.

Methods import TVM when they are called: `tvm_attn.runtime.tvm_import` decides how it is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tvm_attn.runtime.devices.cuda_copies import Copies
    from tvm_attn.targets import GpuTarget


@dataclass(frozen=True)
class Found:
    """A device of this machine, usable or not.

    Attributes:
        device: the device's name in this project, e.g. "cpu" or "vulkan:0"; only the class, e.g. "vulkan", if it cannot
            be used.
        name: product name.
        driver: driver and version, or None.
        features: features that code for the device may use, sorted.
        limits: numbers by name; sizes are in bytes.
        missing: reasons why the device cannot be used; empty if it can.
    """

    device: str
    name: str
    driver: str | None
    features: tuple[str, ...]
    limits: dict[str, Any]
    missing: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The device's class, one of `tvm_attn.backends.BACKENDS`."""
        return self.device.partition(":")[0]


class DeviceClass(ABC):
    """A class of devices at run time. The defaults are those of a GPU with one queue of work.

    Attributes:
        kind: the class's name, one of `tvm_attn.backends.BACKENDS`.
        dlpack: DLPack's number for the class (`DLDeviceType`).
        in_host_memory: whether the host can read tensors without a copy.
        has_streams: whether work runs on streams that the caller may choose.
        prefill_chunk: tokens of prompts between two steps of running sequences: enough to use the device well, and few
            enough that nobody notices the pause.
    """

    kind: ClassVar[str]
    dlpack: ClassVar[int]
    in_host_memory: ClassVar[bool] = False
    has_streams: ClassVar[bool] = False
    prefill_chunk: ClassVar[int] = 512

    @abstractmethod
    def find(self) -> list[Found]:
        """The devices of this machine, usable ones first. Starts no work on them.

        Raises:
            DeviceError: no device is usable; the message says why.
        """

    @abstractmethod
    def obstacle(self, index: int = 0) -> str | None:
        """Why the device with that index cannot be used, as text; None if it can."""

    @abstractmethod
    def lacks(self, target: Any, device: Found, dtype: str, quant: str) -> Iterator[str]:
        """What a library needs and a device lacks, as text; nothing if the library runs.

        Args:
            target: the target that the library is compiled for, of this class.
            device: a usable device of this class.
            dtype, quant: the library's storage dtype and quantization.
        """

    def is_software(self, index: int = 0) -> bool:
        """Whether an existing device is a program on the CPU, such as Mesa's llvmpipe."""
        return False

    def capability(self, index: int = 0) -> tuple[int, int] | None:
        """What decides between libraries for an existing device, see `Artifact.library`; None if nothing does."""
        return None

    def select(self, index: int) -> None:  # noqa: B027  (nothing to do is the default)
        """Makes a device the current one of this thread, if the class has a current device."""

    def copies(self) -> Copies | None:
        """Copies to the host that a stream makes without anybody waiting for it, one object a stream; None if every
        copy waits."""
        return None

    def free_memory(self, device: Any) -> int | None:
        """Free bytes on a TVM device; None if it does not say."""
        self.select(device.index)
        free = device.available_global_memory
        return None if free is None else int(free)

    def require(self, module: Any, index: int, name: str) -> None:  # noqa: B027
        """Checks a loaded library, a tvm_ffi.Module, against the device.

        Raises:
            DeviceError: the device lacks what a kernel needs; `name` names the library in the message.
        """


def exists_in_tvm(kind: str, index: int) -> str | None:
    """Why TVM has no such device, as text; None if it has."""
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is None:
        return f"the {kind} runtime is missing"
    return None if tvm.runtime.device(kind, index).exist else f"there is no device {kind}:{index}"


def lacks_of_block(target: GpuTarget, threads: int, shared_bytes: int) -> Iterator[str]:
    """What a GPU lacks for a target's block (a workgroup), as text."""
    if threads < target.max_threads:
        yield f"blocks of {target.max_threads} threads (has {threads})"
    if shared_bytes < target.shared_bytes:
        yield f"{target.shared_bytes} bytes of shared memory (has {shared_bytes})"
