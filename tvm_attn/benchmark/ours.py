"""The compiled model as a measured system."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import tvm_attn
from tvm_attn.benchmark.counts import Storage
from tvm_attn.benchmark.kernels import KernelTime, SingleKernels
from tvm_attn.benchmark.system import CachedSystem, Case, Float32Array, GreedySystem, Int32Array, prompts
from tvm_attn.errors import ArtifactError
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.logits import DeviceLogits


class CompiledSystem(CachedSystem):
    """An artifact's library for this machine.

    Args:
        folder: the artifact.
        threads: CPU threads.
        max_batch: most sequences of a case.
        device: the device, as `tvm_attn.load` takes it.

    Raises:
        ArtifactError: the artifact is damaged or cannot run here.
        DeviceError: an argument is out of range.
    """

    def __init__(self, folder: Path, threads: int, max_batch: int, device: str = "cpu") -> None:
        self.artifact = Artifact(folder)
        model = tvm_attn.load(folder, device, threads=threads, max_batch=max_batch, draft=False)
        self.device, self._engine = model.device, model.engine
        self.library = self._engine.library
        self.config = self._engine.config
        self.name, self.version = "tvm_attn", tvm_attn.__version__
        quantization = self.artifact.quantization
        self.precision = self.artifact.dtype if quantization == "none" else quantization
        self.vocabulary, self.positions = self.config.vocab_size, self.config.n_positions
        kernels = _manifest_kernels(self.artifact, self.library.file)
        self.storage = Storage(_weight_format(kernels, self.precision), self.artifact.dtype, self.artifact.kv)
        self.max_batch = max_batch
        # The number of valid positions per slot, so that one long prompt serves every shorter context.
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
        """See `System.fill`; a cache that is already filled far enough stays unchanged."""
        inputs = prompts(case, self.vocabulary)
        short = [slot for slot in range(case.batch) if self._filled[slot] < case.tokens]
        for slot in short:
            self._engine.prefill([inputs[slot]], [slot])
            self._filled[slot] = case.tokens

    def kernel_times(self, case: Case, seconds: float) -> list[KernelTime]:
        """Time of each kernel within the calls of a case, longest first; only on the processor.

        Args:
            case: what to run; for decode the cache is filled.
            seconds: as in `System.time`.

        Raises:
            TargetError, CompileError: see `SingleKernels`.
        """
        inputs, engine, single = prompts(case, self.vocabulary), self._engine, self._single_kernels
        self._engine = engine.on(single.machine, single.set_threads)
        try:
            return single.times(lambda: self.call(case, inputs), seconds)
        finally:
            self._engine = engine

    @cached_property
    def _single_kernels(self) -> SingleKernels:
        return SingleKernels(self.artifact, self.library, self.storage)


class CompiledGpuSystem(GreedySystem, CompiledSystem):
    """An artifact's library on a GPU, with the arguments of `CompiledSystem`."""

    def _run(self, case: Case, ids: Int32Array) -> list[float]:
        # As in real use: in the device's thread, with the next step started ahead.
        run: list[float] = self._engine.run(super()._run, case, ids)
        return run

    def step(self, token_ids: Int32Array, context: int, *, continues: bool) -> Int32Array:
        """See `GreedySystem.step`."""
        slots = np.arange(len(token_ids), dtype=np.int32)
        positions = np.full(len(token_ids), context, np.int32)
        return self._engine.decode(token_ids, slots, positions, ahead=continues).argmax()


def _manifest_kernels(artifact: Artifact, file: str) -> dict[str, dict[str, Any]]:
    """Family and static sizes of a library's kernels, by name."""
    for entry in artifact.manifest["libraries"]:
        if entry["file"] == file and "kernels" in entry:
            kernels: dict[str, dict[str, Any]] = entry["kernels"]
            return kernels
    raise ArtifactError(f"artifact {artifact.folder} does not describe its kernels; build it again with tvm-attn build")


def _weight_format(kernels: Mapping[str, Mapping[str, Any]], precision: str) -> str:
    """The format that the head takes its weight in."""
    formats = [kernel.get("weights", precision) for kernel in kernels.values() if kernel["family"] == "head"]
    return str(formats[0]) if formats else precision
