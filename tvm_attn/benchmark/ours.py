"""The compiled model as a measured system, and the time that each of its kernels takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tvm_attn
from tvm_attn.benchmark.counts import Storage, Work, kernel_work
from tvm_attn.benchmark.system import MAX_CALLS, MIN_CALLS, CachedSystem, Case, Float32Array, Int32Array, prompts
from tvm_attn.errors import ArtifactError
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.engine import DeviceLogits

_SETTLED = 0.1
"""Share of one core below which the thread pool counts as asleep."""


class CompiledSystem(CachedSystem):
    """An artifact's library for this machine.

    Args:
        folder: the artifact.
        threads: CPU threads.
        max_batch: most sequences of a case.

    Raises:
        ArtifactError: the artifact is damaged or cannot run here.
        DeviceError: an argument is out of range.
    """

    def __init__(self, folder: Path, threads: int, max_batch: int) -> None:
        self.artifact = Artifact(folder)
        self.library = self.artifact.library("cpu")
        self._engine = tvm_attn.load(folder, "cpu", threads=threads, max_batch=max_batch).engine
        self.config = self._engine.config
        self.name, self.version = "tvm_attn", tvm_attn.__version__
        quantization = self.artifact.quantization
        self.precision = self.artifact.dtype if quantization == "none" else quantization
        self.vocabulary = self.config.vocab_size
        self._kernels = _manifest_kernels(self.artifact, self.library.file)
        self.storage = Storage(_weight_format(self._kernels, self.precision), self.artifact.dtype)
        # Valid positions of each slot, so that one long prompt serves every shorter context.
        self._filled = [0] * max_batch

    def prefill(self, prompts: Int32Array) -> DeviceLogits:
        """See `CachedSystem.prefill`."""
        for slot in range(len(prompts)):
            self._filled[slot] = max(self._filled[slot], prompts.shape[1])
        return self._engine.prefill(list(prompts), range(len(prompts)))

    def decode(self, token_ids: Int32Array, context: int) -> DeviceLogits:
        """See `CachedSystem.decode`."""
        slots = np.arange(len(token_ids), dtype=np.int32)
        return self._engine.decode(token_ids, slots, np.full(len(token_ids), context, np.int32))

    def argmax(self, logits: DeviceLogits) -> Int32Array:
        """See `CachedSystem.argmax`; computed by the library."""
        return logits.argmax()

    def numpy(self, logits: DeviceLogits) -> Float32Array:
        """See `CachedSystem.numpy`."""
        return logits.numpy()

    def fill(self, case: Case) -> None:
        """See `System.fill`; a cache that is filled far enough stays as it is."""
        inputs = prompts(case, self.vocabulary)
        short = [slot for slot in range(case.batch) if self._filled[slot] < case.tokens]
        for slot in short:
            self._engine.prefill([inputs[slot]], [slot])
            self._filled[slot] = case.tokens

    def settle(self) -> None:
        """Waits until the thread pool sleeps: its threads spin for a while after work, on the next one's cores."""
        deadline, used = time.monotonic() + 2.0, time.process_time()
        while time.monotonic() < deadline:
            time.sleep(0.02)
            before, used = used, time.process_time()
            if used - before < _SETTLED * 0.02:
                return

    def kernel_times(self, case: Case, seconds: float) -> list[KernelTime]:
        """Time of each kernel within the calls of a case, the longest first.

        Args:
            case: what to run; for decode the cache is filled.
            seconds: as in `System.time`.
        """
        clock = _KernelClock(self._kernels, self.storage)
        inputs, machine = prompts(case, self.vocabulary), self._engine._vm
        self.call(case, inputs)
        machine.set_instrument(clock)
        try:
            calls, end = 0, time.perf_counter() + seconds
            while calls < MIN_CALLS or (time.perf_counter() < end and calls < MAX_CALLS):
                clock.start_call()
                self.call(case, inputs)
                calls += 1
        finally:
            machine._set_instrument(None)
        return clock.result()


def _manifest_kernels(artifact: Artifact, file: str) -> dict[str, dict[str, Any]]:
    """Family and static sizes of a library's kernels, by name."""
    for entry in artifact.manifest["libraries"]:
        if entry["file"] == file and "kernels" in entry:
            kernels: dict[str, dict[str, Any]] = entry["kernels"]
            return kernels
    raise ArtifactError(
        f"artifact {artifact.folder} does not describe its kernels; build it again with python -m tvm_attn.build"
    )


def _weight_format(kernels: Mapping[str, Mapping[str, Any]], precision: str) -> str:
    """The format that the head takes its weight in."""
    formats = [kernel.get("weights", precision) for kernel in kernels.values() if kernel["family"] == "head"]
    return str(formats[0]) if formats else precision


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel within one call of the model.

    Attributes:
        name: its name in the library.
        family: its family.
        sizes: its main sizes, for people.
        calls: times that a call of the model calls it.
        seconds: all of those together, the median over several calls of the model.
        work: all of those together, padding rows included; None where it is not known.
    """

    name: str
    family: str
    sizes: str
    calls: int
    seconds: float
    work: Work | None


class _KernelClock:
    """An instrument of the Relax VM: the time between its calls before and after each kernel."""

    def __init__(self, kernels: Mapping[str, Mapping[str, Any]], storage: Storage) -> None:
        self._kernels, self._storage = kernels, storage
        # One dictionary a call of the model: seconds by kernel.
        self._seconds: list[dict[str, float]] = []
        self._work: dict[str, list[Work | None]] = {}
        self._start = 0.0

    def start_call(self) -> None:
        """Tells that another call of the model begins."""
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
        """What was measured, the longest first."""
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
