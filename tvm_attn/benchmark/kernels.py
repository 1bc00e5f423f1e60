"""The time of each kernel within a call of the model."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

from tvm_attn import targets
from tvm_attn.benchmark.counts import Storage, Work, kernel_work
from tvm_attn.benchmark.system import MAX_CALLS, MIN_CALLS
from tvm_attn.runtime.artifact import MANIFEST, Artifact, Library
from tvm_attn.runtime.engine import threads_setter


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel within one call of the model.

    Attributes:
        name: its name in the library.
        family: its family.
        sizes: its main sizes, as text to print.
        calls: how often a call of the model calls it.
        seconds: seconds of all these calls together, the median over several calls of the model.
        work: work of all these calls together, including padding rows; None if it is not known.
    """

    name: str
    family: str
    sizes: str
    calls: int
    seconds: float
    work: Work | None


class SingleKernels:
    """An artifact's kernels for the processor, compiled once more and called one by one.

    In the artifact a layer of decode is one kernel (`tvm_attn.compiler.fusion`), whose parts cannot be timed. Here its
    parts are compiled separately, from the same templates and records; their times include starting threads for each.

    Args:
        artifact: the artifact.
        library: its library for the processor.
        storage: how the library holds its numbers.

    Attributes:
        machine: the functions of the library, unfused; takes the packed parameters and the cache of the library.
        set_threads: sets their number of threads.

    Raises:
        ArtifactError, TargetError: the manifest does not describe the library's target.
        CompileError: the kernels cannot be compiled here.
    """

    def __init__(self, artifact: Artifact, library: Library, storage: Storage) -> None:
        # Imported here because nothing else in this module needs the compiler.
        from tvm_attn.compiler.devices import layout_for
        from tvm_attn.compiler.pipeline import compile_program
        from tvm_attn.kernels.base import shape_of
        from tvm_attn.model.gpt2 import build_program
        from tvm_attn.schedule.records import Entry, Record, RecordBook

        described = next(entry for entry in artifact.manifest["libraries"] if entry["file"] == library.file)
        if "hardware" not in described:  # from before manifests described it
            raise artifact.error(f"its manifest does not describe the hardware of {library.file}")
        target = targets.from_table(described["hardware"], Path(f"{library.target}.toml"))
        records = (Record.from_line(line, MANIFEST) for line in described["records"])
        book = RecordBook(Entry(record, None, Path(MANIFEST)) for record in records)
        types = artifact.dtype, artifact.quantization, artifact.quantized_kv
        layout = replace(layout_for(artifact.config, target, *types), fuse_layers=False)
        program = build_program(artifact.config, layout, library.max_prefill_rows, library.max_batch)
        self._kernels = {name: shape_of(kernel) for name, kernel in program.kernels.items()}
        self._storage = storage
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / library.file
            compile_program(program, target, file, book=book)
            module = tvm.runtime.load_module(str(file))
        self.machine, self.set_threads = VirtualMachine(module, tvm.cpu()), threads_setter(module)

    def times(self, call: Callable[[], object], seconds: float) -> list[KernelTime]:
        """Time of each kernel within a call of the model, longest first.

        Args:
            call: calls the model on `machine`.
            seconds: about how long to go on, `MIN_CALLS` and `MAX_CALLS` permitting.
        """
        call()
        clock = _KernelClock(self._kernels, self._storage)
        self.machine.set_instrument(clock)
        try:
            calls, end = 0, time.perf_counter() + seconds
            while calls < MIN_CALLS or (time.perf_counter() < end and calls < MAX_CALLS):
                clock.start_call()
                call()
                calls += 1
        finally:
            self.machine._set_instrument(None)
        return clock.result()


class _KernelClock:
    """An instrument of the Relax VM: the time between its calls before and after each kernel."""

    def __init__(self, kernels: Mapping[str, Mapping[str, Any]], storage: Storage) -> None:
        self._kernels, self._storage = kernels, storage
        # One dictionary per call of the model: seconds by kernel.
        self._seconds: list[dict[str, float]] = []
        self._work: dict[str, list[Work | None]] = {}
        self._start = 0.0

    def start_call(self) -> None:
        """Notes that another call of the model begins."""
        self._seconds.append({})
        self._work = {}

    def __call__(self, function: Any, name: str, before: bool, result: Any, *args: Any) -> int:
        now = time.perf_counter()
        kernel = self._kernels.get(name)
        if kernel is None:
            return 0
        if not before:
            seconds = self._seconds[-1]
            seconds[name] = seconds.get(name, 0.0) + now - self._start
            return 0
        self._work.setdefault(name, []).append(_call_work(kernel, args, self._storage))
        self._start = time.perf_counter()
        return 0

    def result(self) -> list[KernelTime]:
        """The measured times, longest first."""
        times = []
        for name, works in self._work.items():
            kernel, known = self._kernels[name], [work for work in works if work is not None]
            total = sum(known, Work(0, 0, 0)) if len(known) == len(works) else None
            seconds = statistics.median(call[name] for call in self._seconds)
            times.append(KernelTime(name, kernel["family"], _sizes(kernel), len(works), seconds, total))
        return sorted(times, key=lambda entry: -entry.seconds)


def _call_work(kernel: Mapping[str, Any], args: tuple[Any, ...], storage: Storage) -> Work | None:
    family = kernel["family"]
    if family == "prefill_attention":
        table = np.from_dlpack(args[2])
        return kernel_work(kernel, 0, [(int(row[2]), int(row[3])) for row in table], storage)
    if family == "decode_attention":
        positions = np.from_dlpack(args[3]).reshape(-1)
        return kernel_work(kernel, 0, [(1, int(position)) for position in positions if position >= 0], storage)
    # The output is the last argument, (g, R, ...).
    shape = args[-1].shape
    return kernel_work(kernel, int(shape[0]) * int(shape[1]), [], storage)


def _sizes(kernel: Mapping[str, Any]) -> str:
    if "in_features" in kernel:
        return f"{kernel['in_features']} x {kernel['out_features']}"
    if "heads" in kernel:
        return f"{kernel['heads']} heads of {kernel['head_dim']}"
    return str(kernel.get("width", kernel.get("columns", "")))
