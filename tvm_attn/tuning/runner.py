"""A worker that checks candidates and measures them, here or on a machine behind TVM's RPC. Needs no compiler.

    python -m tvm_attn.tuning.runner DEVICE [--rpc HOST:PORT --key KEY]

| request | does | answer |
|---|---|---|
| `{"calls": FOLDER}` | reads the inputs of a kernel's calls | `{}` |
| `{"library": FILE}` | checks a candidate and times each call | `{"seconds": [...], "load": CORES}` |

"load" is the number of cores that other programs used meanwhile, or null if that is not known or does not matter.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn import vulkan
from tvm_attn.errors import TuningError, VerificationError
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.machine import thread_count
from tvm_attn.runtime.tensors import fill, normalised_error, to_device
from tvm_attn.runtime.tvm_import import import_tvm
from tvm_attn.tuning.cases import StoredCall, read_calls
from tvm_attn.tuning.load import Load
from tvm_attn.tuning.process import serve

# Calls cycle through copies of their inputs that are larger than a cache in total: in a model, weights and KV cache
# come from memory, because all the other layers were used in between.
_COLD_BYTES = 128 << 20
_SOFTWARE_COLD_BYTES = 16 << 20  # a copy by a software driver is slow, and such a device has no caches of its own
_MAX_COPIES = 1024
_MAX_COPIES_BYTES = 1 << 30
_REPEATS = 5
_REPEAT_SECONDS = 0.05
_DEVICE_REPEATS = 12
_DEVICE_SECONDS = 0.3
_LENDING_SECONDS = 20
_EVICT = "tvm_attn.tuning.evict"


class Processor:
    """This machine's processor; the host's clock.

    Attributes:
        device: TVM's device.
        uses_cores: whether it computes with this machine's cores, so that other programs on them matter.
    """

    def __init__(self, tvm: Any) -> None:
        self.device, self._tvm, self.uses_cores = tvm.cpu(), tvm, True

    def load(self, library: Path) -> Any:
        """The module of a candidate's library."""
        from tvm_attn.runtime.library import load_library

        module = load_library(np.fromfile(library, np.uint8), library.name)
        module["set_threads"](thread_count())
        return module

    def copies(self, bytes_: int, arrays: Sequence[np.ndarray]) -> int:
        """How many copies of a call's tensors are used in turn."""
        # A KV cache is larger than the part of it that a call reads.
        most = min(_MAX_COPIES, _MAX_COPIES_BYTES // max(1, sum(array.nbytes for array in arrays)))
        return max(1, min(most, math.ceil(_COLD_BYTES / bytes_)))

    def seconds(self, module: Any, copies: list[list[Any]]) -> float:
        """Time of a call: the best of several means, because other processes can only add to it."""
        function = module["main"]
        start = time.perf_counter()
        for arguments in copies:
            function(*arguments)
        once = (time.perf_counter() - start) / len(copies)
        rounds = max(1, math.ceil(_REPEAT_SECONDS / (once * len(copies))))
        best = math.inf
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for _ in range(rounds):
                for arguments in copies:
                    function(*arguments)
            best = min(best, (time.perf_counter() - start) / (rounds * len(copies)))
        return best


class Gpu(Processor):
    """A GPU of this machine; the device's own clock. A copy of a large buffer empties the caches before each call."""

    def __init__(self, tvm: Any, kind: str, index: int) -> None:
        import tvm_ffi

        super().__init__(tvm)
        self.device, self.uses_cores = tvm.runtime.device(kind, index), device_class(kind).is_software(index)
        bytes_ = _SOFTWARE_COLD_BYTES if self.uses_cores else _COLD_BYTES
        self._buffers = [tvm.runtime.empty((bytes_ // 4,), "float32", self.device) for _ in range(2)]
        tvm_ffi.register_global_func(
            _EVICT, lambda *_: self._buffers[0].copyto(self._buffers[1]) and None, override=True
        )

    def load(self, library: Path) -> Any:
        """See `Processor`."""
        from tvm_attn.runtime.library import load_library

        return load_library(np.fromfile(library, np.uint8), library.name)

    def copies(self, bytes_: int, arrays: Sequence[np.ndarray]) -> int:
        """One: TVM's evaluator takes one set of tensors."""
        return 1

    def seconds(self, module: Any, copies: list[list[Any]]) -> float:
        """The best of several calls."""
        return _device_seconds(module, self.device, copies[0], _EVICT)


class Remote:
    """A device behind TVM's RPC, which a tracker lends; that machine's clock."""

    def __init__(self, tvm: Any, kind: str, tracker: str, key: str) -> None:
        from tvm import rpc

        host, _, port = tracker.rpartition(":")
        lender = rpc.connect_tracker(host, int(port))
        end = time.monotonic() + _LENDING_SECONDS
        # A request waits until somebody gives a device back, which one that has died never does.
        while not int(lender.summary()["queue_info"].get(key, {}).get("free", 0)):
            if time.monotonic() > end:
                raise TuningError(f"the tracker has no free device with the key {key}")
            time.sleep(1)
        session = lender.request(key, priority=1, session_timeout=0)
        self._session, self.device, self._kind, self.uses_cores = session, session.device(kind, 0), kind, False

    def load(self, library: Path) -> Any:
        """See `Processor`."""
        # Under a new name: the far machine's linker gives the old library for a path that it knows.
        name = f"{os.getpid()}-{time.monotonic_ns()}-{library.name}"
        self._session.upload(str(library), name)
        module = self._session.load_module(name)
        self._session.remove(name)
        return module

    def copies(self, bytes_: int, arrays: Sequence[np.ndarray]) -> int:
        """See `Gpu`."""
        return 1

    def seconds(self, module: Any, copies: list[list[Any]]) -> float:
        """The best of several calls; on processors, the inputs after the first come from memory."""
        evict = "cache_flush_cpu_non_first_arg" if self._kind == "cpu" else ""
        return _device_seconds(module, self.device, copies[0], evict)


def _device_seconds(module: Any, device: Any, arguments: list[Any], evict: str) -> float:
    """The best of several calls by the device's clock; slow kernels are called less often."""
    once = float(min(module.time_evaluator("main", device, number=1, repeat=2, f_preproc=evict)(*arguments).results))
    repeats = int(min(_DEVICE_REPEATS, _DEVICE_SECONDS / max(once, 1e-9)))
    if repeats <= 2:
        return once
    timer = module.time_evaluator("main", device, number=1, repeat=repeats, f_preproc=evict)
    return min(once, float(min(timer(*arguments).results)))


class Runner:
    """Measures the candidates of one kernel after another at a place: `Processor`, `Gpu` or `Remote`."""

    def __init__(self, place: Any, tvm: Any) -> None:
        self._place, self._tvm = place, tvm
        self._calls: list[tuple[StoredCall, list[list[Any]]]] = []

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a request says.

        Raises:
            VerificationError: a result disagrees with the float64 reference.
        """
        if "calls" in request:
            self._calls = []
            for call in read_calls(Path(request["calls"])):
                arrays = [np.ascontiguousarray(array) for array in (*call.inputs, *call.outputs)]
                copies = self._place.copies(call.bytes, arrays)
                made = [[to_device(array, self._place.device) for array in arrays] for _ in range(copies)]
                self._calls.append((call, made))
            return {}
        module = self._place.load(Path(request["library"]))
        for call, copies in self._calls:
            self._check(module["main"], call, copies[0])
        before = Load()
        seconds = [self._place.seconds(module, copies) for _, copies in self._calls]
        if not all(0 < time < math.inf for time in seconds):
            raise TuningError(f"the device's clock measured {min(seconds)} s")
        return {"seconds": seconds, "load": before.since() if self._place.uses_cores else None}

    def _check(self, function: Any, call: StoredCall, arguments: list[Any]) -> None:
        inputs = len(call.inputs)
        # The previous candidate left its results there.
        for index, array in [*((i, call.inputs[i]) for i in call.in_place), *enumerate(call.outputs, inputs)]:
            fill(arguments[index], np.ascontiguousarray(array))
        function(*arguments)
        results = [arguments[index] for index in (*call.in_place, *range(inputs, len(arguments)))]
        for result, expected in zip(results, call.expected, strict=True):
            if not normalised_error(result.numpy(), expected) <= call.nmse:  # "not", because NaN compares false
                raise VerificationError(f"{call.name}: the result disagrees with the float64 reference")


def main() -> None:
    """Runs the worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("--rpc")
    parser.add_argument("--key", default="")
    options = parser.parse_args()
    kind, _, index = options.device.partition(":")

    runner: Runner | None = None

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal runner
        if runner is None:
            # With the first request, so that a device that cannot be reached is an answer and no silent end.
            import_tvm()
            import tvm

            vulkan.autoload()  # TVM finds it by itself only where this package is installed
            if not options.rpc and (reason := device_class(kind).obstacle(int(index or 0))):
                raise TuningError(f"{options.device} cannot be used: {reason}")
            if options.rpc:
                place: Any = Remote(tvm, kind, options.rpc, options.key)
            else:
                place = Processor(tvm) if kind == "cpu" else Gpu(tvm, kind, int(index or 0))
            runner = Runner(place, tvm)
        try:
            return runner.handle(request)
        except (TuningError, VerificationError):
            raise
        except Exception:
            if options.rpc:  # the connection is of no use any more, and another process makes a new one
                traceback.print_exc()
                os._exit(1)
            raise

    serve(handle)


if __name__ == "__main__":
    main()
