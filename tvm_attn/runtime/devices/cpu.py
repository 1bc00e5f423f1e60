"""This machine's CPU."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

from tvm_attn.runtime.devices.base import DeviceClass, Found
from tvm_attn.runtime.machine import cpu_features, usable_cores


class Processor(DeviceClass):
    """The CPU. There is one: `cpu`, or `cpu:0`."""

    kind, dlpack = "cpu", 1
    in_host_memory = True
    prefill_chunk = 128

    def find(self) -> list[Found]:
        """See `DeviceClass`; lists the features that any target asks for."""
        from tvm_attn import targets

        name = platform.processor() or platform.machine()
        try:
            from tvm.target.codegen import llvm_get_system_cpu

            name = f"{platform.machine()} ({llvm_get_system_cpu()})"
        except (ImportError, AttributeError):  # only TVM's runtime is loaded
            pass
        asked = {feature for target in targets.read_all() for feature in target.features}
        return [Found("cpu", name, None, tuple(sorted(cpu_features() & asked)), {"cores": usable_cores()})]

    def obstacle(self, index: int = 0) -> str | None:
        """See `DeviceClass`."""
        return None if index == 0 else f"there is no device cpu:{index}"

    def lacks(self, target: Any, device: Found, dtype: str, quant: str) -> Iterator[str]:
        """See `DeviceClass`; there is one processor."""
        yield from target.missing(cpu_features())

    def free_memory(self, device: Any) -> int | None:
        """None: memory is taken only as it is used."""
        return None


DEVICE_CLASS = Processor()
