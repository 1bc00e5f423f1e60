"""What runs in the worker processes of a search: compiling a candidate, checking it, timing it.

A worker is a process of its own, so that a candidate that crashes or hangs stops nothing else.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.tirx import build as build_module

from tvm_attn.compiler.threads import export_with_threads
from tvm_attn.errors import VerificationError
from tvm_attn.kernels import Case, Kernel
from tvm_attn.runtime.machine import thread_count
from tvm_attn.tuning.calls import Call, calls_of

# Calls cycle through copies of their inputs that are larger than a cache in total: in a model, weights and KV cache
# come from memory, because all the other layers were used in between.
_COLD_BYTES = 128 << 20
_MAX_COPIES = 1024
_MAX_COPIES_BYTES = 1 << 30
PROCESSOR_SECONDS = 60
"""Processor time, of all threads together, after which compiling or measuring a candidate ends its worker."""
_REPEATS = 5
_REPEAT_SECONDS = 0.05


class _Prepared:
    """Several copies of the tensors of a call's case."""

    def __init__(self, call: Call) -> None:
        self.case = case = call.case()
        arrays = (*case.inputs, *case.outputs)
        # A KV cache is larger than the part of it that a call reads.
        most = min(_MAX_COPIES, _MAX_COPIES_BYTES // sum(array.nbytes for array in arrays))
        copies = max(1, min(most, math.ceil(_COLD_BYTES / call.bytes)))
        self.arguments = [[tvm.runtime.tensor(array) for array in arrays] for _ in range(copies)]


_prepared: list[_Prepared] = []


def start(log: str) -> None:
    """Starts a worker: output of TVM and LLVM goes to the log, and Ctrl-C is left to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


def limit_processor_time(seconds: int = PROCESSOR_SECONDS) -> None:
    """Ends this process when it has used so much more processor time, see `setrlimit(2)`."""
    usage, (_, hard) = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def start_runner(log: str, kernel: Kernel) -> None:
    """Starts a worker that measures candidates of a kernel, and creates the inputs."""
    start(log)
    _prepared.extend(_Prepared(call) for call in calls_of(kernel))


def build(module: tvm.IRModule, target: tvm.target.Target, library: str) -> str:
    """Compiles a candidate into a shared library, within the limit of processor time."""
    limit_processor_time()
    export_with_threads(build_module(module, target=target), Path(library))
    return library


def no_arguments(_device: Any, _args_info: Any, _repeats: int) -> list[Any]:
    """Stands in for MetaSchedule's random inputs; `start_runner` has made better ones."""
    return []


def run(library: Any, device: Any, config: Any, arguments: Any) -> list[float]:
    """As `measure`, within the limit of processor time."""
    limit_processor_time()
    return measure(library, device, config, arguments)


def measure(library: Any, _device: Any, _config: Any, _arguments: Any) -> list[float]:
    """Checks a candidate, and returns the time of each call in seconds.

    Raises:
        VerificationError: a result disagrees with the float64 reference.
    """
    library["set_threads"](thread_count())
    function = library["main"]
    for prepared in _prepared:
        _check(function, prepared.case, prepared.arguments[0])
    return [_seconds(function, prepared.arguments) for prepared in _prepared]


def _check(function: Any, case: Case, arguments: list[Any]) -> None:
    inputs = len(case.inputs)
    # The previous candidate left its results there.
    for index, array in [*((i, case.inputs[i]) for i in case.in_place), *enumerate(case.outputs, inputs)]:
        arguments[index].copyfrom(array)
    function(*arguments)
    results = [arguments[index] for index in (*case.in_place, *range(inputs, len(arguments)))]
    for result, expected in zip(results, case.expected, strict=True):
        error = np.square(result.numpy().astype(np.float64) - expected).sum()
        if not error <= case.nmse * np.square(expected).sum():  # "not", because NaN compares false
            raise VerificationError(f"{case.name}: the result disagrees with the float64 reference")


def _seconds(function: Any, copies: list[list[Any]]) -> float:
    """Time of a call: the best of several means, because other processes can only add to it."""
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
