"""What every device class answers at run time: which devices there are, what keeps them from use, what they lack.

Methods import TVM when they are called: how it is imported is for `tvm_attn.runtime.tvm_import` to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tvm_attn.targets import GpuTarget


@dataclass(frozen=True)
class Found:
    """A device of this machine, usable or not.

    Attributes:
        device: its name in this project, e.g. "cpu" or "vulkan:0"; for one that cannot be used its class, "vulkan".
        name: the product's name.
        driver: driver and version, or None.
        features: what its code may use, sorted.
        limits: numbers by name; sizes are bytes.
        missing: what keeps it from being used; empty for a usable one.
    """

    device: str
    name: str
    driver: str | None
    features: tuple[str, ...]
    limits: dict[str, Any]
    missing: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Its class, one of `tvm_attn.backends.BACKENDS`."""
        return self.device.partition(":")[0]


class DeviceClass(ABC):
    """A class of devices at run time. The defaults are those of a GPU with one queue of work.

    Attributes:
        kind: its name, one of `tvm_attn.backends.BACKENDS`.
        dlpack: DLPack's number of it (`DLDeviceType`).
        in_host_memory: whether tensors can be read where they are, without a copy.
        has_streams: whether work goes to streams that the caller may choose.
    """

    kind: ClassVar[str]
    dlpack: ClassVar[int]
    in_host_memory: ClassVar[bool] = False
    has_streams: ClassVar[bool] = False

    @abstractmethod
    def find(self) -> list[Found]:
        """The devices of this machine, usable ones first. Starts no work on them.

        Raises:
            DeviceError: none is usable; says why.
        """

    @abstractmethod
    def obstacle(self, index: int = 0) -> str | None:
        """Why the device of that index cannot be used, in words; None where it can."""

    @abstractmethod
    def lacks(self, target: Any, device: Found, dtype: str, quant: str) -> Iterator[str]:
        """What a device lacks that a library needs, in words; nothing where the library runs.

        Args:
            target: what the library is compiled for, a target of this class.
            device: a usable device of this class.
            dtype, quant: the library's storage dtype and quantization.
        """

    def is_software(self, index: int = 0) -> bool:
        """Whether a device that exists is a program on the processor, such as Mesa's llvmpipe."""
        return False

    def capability(self, index: int = 0) -> tuple[int, int] | None:
        """What chooses between libraries, of a device that exists: see `Artifact.library`; None for no difference."""
        return None

    def select(self, index: int) -> None:  # noqa: B027  (nothing to do is the default)
        """Makes a device the current one of this thread, where there is such a thing."""

    def free_memory(self, device: Any) -> int | None:
        """Bytes that are free on a TVM device; None where it does not tell."""
        self.select(device.index)
        free = device.available_global_memory
        return None if free is None else int(free)

    def require(self, module: Any, index: int, name: str) -> None:  # noqa: B027
        """Checks a loaded library, a tvm_ffi.Module, against the device.

        Raises:
            DeviceError: the device lacks what a kernel needs; `name` is the library's in the message.
        """


def exists_in_tvm(kind: str, index: int) -> str | None:
    """Why TVM has no such device, in words; None where it has."""
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is None:
        return f"the {kind} runtime is missing"
    return None if tvm.runtime.device(kind, index).exist else f"there is no device {kind}:{index}"


def lacks_of_block(target: GpuTarget, threads: int, shared_bytes: int) -> Iterator[str]:
    """What a GPU lacks of a target's block (a workgroup), in words."""
    if threads < target.max_threads:
        yield f"blocks of {target.max_threads} threads (has {threads})"
    if shared_bytes < target.shared_bytes:
        yield f"{target.shared_bytes} bytes of shared memory (has {shared_bytes})"
