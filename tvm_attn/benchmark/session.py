"""A benchmark of an artifact: the machine's limits, then every case, then single kernels.

Other systems may take turns with ours in short rounds, so that all see the machine in the same state. They implement
`Peers`; this package has none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from tvm_attn import targets
from tvm_attn.benchmark.cases import Options, open_artifact
from tvm_attn.benchmark.counts import Storage, Work, decode_work, prefill_work
from tvm_attn.benchmark.device import DeviceLimits, measure_device_limits, torch_device
from tvm_attn.benchmark.kernels import KernelTime
from tvm_attn.benchmark.limits import Limits
from tvm_attn.benchmark.machine import describe_machine, describe_versions
from tvm_attn.benchmark.ours import CompiledGpuSystem, CompiledSystem
from tvm_attn.benchmark.system import Case
from tvm_attn.config import GPT2Config
from tvm_attn.runtime.machine import thread_count
from tvm_attn.runtime.tvm_import import has_compiler
from tvm_attn.targets import CpuTarget

OURS = "tvm_attn"
ROUND_SECONDS = 0.3
"""About how many seconds each system runs a case per round."""


@dataclass(frozen=True)
class SystemInfo:
    """A system that was measured; figures refer to it by `label`."""

    label: str
    name: str
    version: str
    precision: str


@dataclass
class Measurement:
    """All times of one case.

    Attributes:
        case: the case.
        work: operations and bytes per call.
        rounds: seconds of every call, by system and round.
    """

    case: Case
    work: Work
    rounds: dict[str, list[list[float]]] = field(default_factory=dict)

    def median(self, label: str) -> float:
        """Median seconds of a system's calls."""
        return statistics.median(seconds for calls in self.rounds[label] for seconds in calls)

    def best(self, label: str) -> float:
        """The fastest call of a system."""
        return min(seconds for calls in self.rounds[label] for seconds in calls)


@dataclass(frozen=True)
class Benchmark:
    """The results of one run of the command.

    Attributes:
        machine, versions, artifact: descriptions of the machine, the software and the artifact.
        limits: the limits of the processor or CUDA device; None for other devices, whose limits are not measured.
        from_cache: whether the weights fit in the processor's caches, so that the speed of memory is no limit.
        arithmetic: the arithmetic of our matrix products, see `Storage.arithmetic`.
        systems: the measured systems, ours first.
        skipped: why other systems were left out, one line each.
        measurements: the measurements, one per case.
        kernels: times of kernels, by case; empty if they were not requested.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    artifact: dict[str, Any]
    limits: Limits | DeviceLimits | None
    from_cache: bool
    arithmetic: str
    systems: list[SystemInfo]
    skipped: list[str]
    measurements: list[Measurement]
    kernels: list[tuple[Case, list[KernelTime]]]


class Peers(Protocol):
    """Other systems that are measured together with ours.

    Attributes:
        systems: the systems that run.
        skipped: why others do not run, one line each.
    """

    systems: list[SystemInfo]
    skipped: list[str]

    def take_turn(self, measurement: Measurement, progress: Callable[[str], None]) -> None:
        """Adds to a measurement a round of each system that can run the case; called after each round of ours.

        Args:
            measurement: the measurement of the case.
            progress: called with a description of each step.
        """


StartPeers = Callable[[CompiledSystem, int, Callable[[str], None]], AbstractContextManager[Peers]]
"""Starts other systems; takes ours, the number of threads, and a function to call with a description of each step."""


def measure_limits(target: CpuTarget, threads: int) -> Limits:
    """See `tvm_attn.benchmark.probe`, which needs TVM's compiler."""
    from tvm_attn.benchmark import probe

    return probe.measure_limits(target, threads)


def run(options: Options, progress: Callable[[str, float], None], start_peers: StartPeers | None = None) -> Benchmark:
    """Runs the benchmark.

    Args:
        options: what to measure.
        progress: called with a description of each step, and the share that is done, 0 to 1.
        start_peers: starts the systems that take turns with ours; None if there are none.

    Raises:
        BenchmarkError: an option does not fit the model.
        ArtifactError, DeviceError, TargetError: our own model cannot be run.
    """
    artifact, cases = open_artifact(options)
    threads = thread_count(options.threads)
    machine = describe_machine(threads)
    limits = _limits(options.device, threads, artifact.dtype, progress)
    progress("loading the artifact", 0.02)
    kind = CompiledGpuSystem if options.device.startswith("cuda") else CompiledSystem
    ours = kind(options.artifact, threads, max((case.batch for case in cases), default=1), options.device)
    systems = [SystemInfo(OURS, ours.name, ours.version, ours.precision)]
    skipped: list[str] = []
    if start_peers is None:
        measurements = _measure(cases, ours, None, options.rounds, progress)
    else:
        with start_peers(ours, threads, lambda message: progress(message, 0.03)) as peers:
            measurements = _measure(cases, ours, peers, options.rounds, progress)
            systems, skipped = [*systems, *peers.systems], peers.skipped
    kernels = []
    for case in _kernel_cases(cases) if options.kernels else []:
        progress(f"kernels: {case}", 0.97)
        if case.phase == "decode":
            ours.fill(case)
        kernels.append((case, ours.kernel_times(case, 2 * ROUND_SECONDS)))
    if isinstance(limits, Limits):
        progress("measuring this machine's limits again", 0.99)
        limits = limits.best(measure_limits(targets.detect_cpu(), threads))
    described = {
        "folder": options.artifact.resolve().name,
        "model": artifact.config.to_dict(),
        "weights": artifact.manifest.get("weights"),
        "dtype": artifact.dtype,
        "quantization": artifact.quantization,
        "kv": artifact.kv,
        "target": ours.library.target,
        "device": ours.device,
        "weight_format": ours.storage.weights,
    }
    return Benchmark(
        machine=machine,
        versions=describe_versions(),
        artifact=described,
        limits=limits,
        from_cache=options.device == "cpu" and _fits(ours, machine["cache_bytes"]),
        arithmetic=ours.storage.arithmetic,
        systems=systems,
        skipped=skipped,
        measurements=measurements,
        kernels=kernels,
    )


def _limits(
    device: str, threads: int, dtype: str, progress: Callable[[str, float], None]
) -> Limits | DeviceLimits | None:
    progress("measuring limits", 0.0)
    if device == "cpu":
        return measure_limits(targets.detect_cpu(), threads) if has_compiler() else None
    if not device.startswith("cuda"):
        return None
    try:
        import torch
    except ImportError:
        return None
    return measure_device_limits(torch_device(device), dtype) if torch.cuda.is_available() else None


def _measure(
    cases: list[Case],
    ours: CompiledSystem,
    peers: Peers | None,
    rounds: int,
    progress: Callable[[str, float], None],
) -> list[Measurement]:
    """Times every case."""
    results = []
    for index, case in enumerate(cases):
        measurement = Measurement(case, _case_work(ours.config, case, ours.storage))
        results.append(measurement)
        for turn in range(rounds):
            share = 0.05 + 0.9 * (index + turn / rounds) / len(cases)
            progress(f"{case}: {OURS}", share)
            if case.phase == "decode" and not turn:
                ours.fill(case)
            measurement.rounds.setdefault(OURS, []).append(ours.time(case, ROUND_SECONDS))
            if peers is not None:
                peers.take_turn(measurement, lambda message, share=share: progress(message, share))  # type: ignore[misc]
    return results


def _case_work(config: GPT2Config, case: Case, storage: Storage) -> Work:
    if case.phase == "prefill":
        return prefill_work(config, case.tokens, storage)
    return decode_work(config, case.tokens, case.batch, storage)


def _fits(ours: CompiledSystem, cache_bytes: int | None) -> bool:
    """Whether all the data that one token needs, mostly weights, fits in the processor's caches."""
    return cache_bytes is not None and decode_work(ours.config, 1, 1, ours.storage).bytes <= cache_bytes


def _kernel_cases(cases: list[Case]) -> list[Case]:
    """The longest prompt, and the longest context of each batch size."""
    longest: dict[tuple[str, int], Case] = {}
    for case in cases:
        key = (case.phase, case.batch)
        if key not in longest or case.tokens > longest[key].tokens:
            longest[key] = case
    return list(longest.values())
