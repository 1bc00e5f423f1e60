"""One benchmark: limits, then every case on our model and on its peers in turns, then kernels.

Systems take turns in short rounds, so that all see the machine in the same state; all but the one that is measured are
stopped or asleep.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn import targets
from tvm_attn.benchmark.counts import Storage, Work, decode_work, prefill_work
from tvm_attn.benchmark.gpu.limits import DeviceLimits, measure_device_limits
from tvm_attn.benchmark.gpu.peer import GpuPeer, torch_device
from tvm_attn.benchmark.gpu.systems import GPU_PEERS, CompiledGpuSystem
from tvm_attn.benchmark.kernels import KernelTime
from tvm_attn.benchmark.limits import Limits
from tvm_attn.benchmark.machine import describe_machine, describe_versions
from tvm_attn.benchmark.ours import CompiledSystem
from tvm_attn.benchmark.peers import PEERS
from tvm_attn.benchmark.peers.client import PeerProcess, PeerUnavailable
from tvm_attn.benchmark.peers.weights import write_weights
from tvm_attn.benchmark.system import Case, Float32Array, Int32Array
from tvm_attn.config import GPT2Config
from tvm_attn.errors import BenchmarkError
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.machine import set_threads
from tvm_attn.targets import CpuTarget

OURS = "tvm_attn"
PREFILL, DECODE, BATCH = (1, 16, 128, 512, 1023), (1, 128, 512, 1000), (1, 8)
"""Default lengths and batch sizes, cut to the model's context."""
ROUND_SECONDS = 0.3
"""About how long each system runs a case in one round."""
# Largest normalised mean squared error of a peer's logits against ours, by the coarser of the two precisions. It tells
# the same model from another one; random logits have 2, and one wrong layer or scale has 1e-2 and more.
# float32 leaves room for llama.cpp, whose GELU is a table of float16: 2e-8.
_AGREEMENT = {
    "float32": 1e-5,
    "float16": 1e-4,
    "bfloat16": 5e-3,
    "int8": 5e-2,
    "q8_0": 5e-3,
    "int4": 1e-1,
    "q4_0": 1e-1,
}
_AGREEMENT_TOKENS = 33
_GPU_PRECISIONS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        artifact: folder of the artifact.
        prefill, decode: prompt lengths and contexts; None takes the defaults that fit the model.
        batch: sequences of a decode call.
        against: peers, each "NAME" or "NAME:PRECISION".
        peer_python: the Python that has the peers installed.
        threads: CPU threads of every system; None takes what `set_threads` does.
        rounds: turns of each system a case.
        kernels: measure single kernels as well; of the processor only.
        device: where our model runs, as `tvm_attn.load` takes it. On CUDA the peers are `GPU_PEERS`, on the same
            device; else they run on the processor.
    """

    artifact: Path
    prefill: tuple[int, ...] | None
    decode: tuple[int, ...] | None
    batch: tuple[int, ...]
    against: tuple[str, ...]
    peer_python: str
    threads: int | None
    rounds: int
    kernels: bool
    device: str = "cpu"


@dataclass(frozen=True)
class Agreement:
    """How a peer's logits compare with ours on one prompt, the worst of prefill and decode.

    Attributes:
        nmse: normalised mean squared error.
        top1: whether the most likely token is the same.
        bound: what `nmse` had to meet.
    """

    nmse: float
    top1: bool
    bound: float


@dataclass(frozen=True)
class SystemInfo:
    """A system that was measured; `label` is what figures go by, `agreement` is None for ours."""

    label: str
    name: str
    version: str
    precision: str
    agreement: Agreement | None


@dataclass
class Measurement:
    """All times of one case.

    Attributes:
        case: the case.
        work: operations and bytes of a call.
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
    """Everything that one run of the command found out.

    Attributes:
        machine, versions, artifact: what ran where.
        limits: the processor's limits, or a CUDA device's; None for other devices, whose limits are not measured.
        arithmetic: what our matrix products are computed in, see `Storage.arithmetic`.
        systems: ours first.
        skipped: why peers were left out, a line each.
        measurements: a case each.
        kernels: times of kernels, by case; empty where they were not asked for.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    artifact: dict[str, Any]
    limits: Limits | DeviceLimits | None
    arithmetic: str
    systems: list[SystemInfo]
    skipped: list[str]
    measurements: list[Measurement]
    kernels: list[tuple[Case, list[KernelTime]]]


def make_cases(config: GPT2Config, options: Options) -> list[Case]:
    """The cases to measure.

    Raises:
        BenchmarkError: a length or batch size does not fit the model.
    """
    longest = config.n_positions
    prefill = _lengths("--prefill", options.prefill, PREFILL, longest)
    decode = _lengths("--decode", options.decode, DECODE, longest - 1)
    if min(options.batch, default=1) < 1:
        raise BenchmarkError(f"--batch must be positive, not {min(options.batch)}")
    cases = [Case("prefill", tokens) for tokens in prefill]
    return cases + [Case("decode", tokens, batch) for batch in options.batch for tokens in decode]


def _lengths(option: str, given: Sequence[int] | None, default: Sequence[int], longest: int) -> list[int]:
    if given is None:
        fitting = [length for length in default if length <= longest]
        return fitting if len(fitting) == len(default) else [*fitting, longest]
    if outside := [length for length in given if not 1 <= length <= longest]:
        raise BenchmarkError(f"{option} {outside[0]} does not fit the model: lengths are 1 to {longest}")
    return list(given)


def measure_limits(target: CpuTarget, threads: int) -> Limits:
    """See `tvm_attn.benchmark.probe`, which needs TVM's compiler."""
    from tvm_attn.benchmark import probe

    return probe.measure_limits(target, threads)


def parse_peer(text: str, ours: str, device: str = "cpu") -> tuple[str, str]:
    """Name and precision of a peer that is given as "NAME" or "NAME:PRECISION"; `ours` is the artifact's precision.

    Raises:
        BenchmarkError: there is no such peer or precision for the device.
    """
    name, _, wanted = text.partition(":")
    if device.startswith("cuda"):
        if name not in GPU_PEERS:
            raise BenchmarkError(f"unknown peer {name!r} on {device}; known: {', '.join(GPU_PEERS)}")
        if (wanted or "float16") not in _GPU_PRECISIONS:
            raise BenchmarkError(f"{name} cannot run {wanted!r}; it can run {', '.join(_GPU_PRECISIONS)}")
        # There is no PyTorch for weights of 8 and 4 bits: those are compared with its 16 bits.
        return name, wanted or (ours if ours in _GPU_PRECISIONS else "float16")
    if name not in PEERS:
        raise BenchmarkError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    precision = PEERS[name].precision(wanted or None, ours)
    if precision is None:
        known = ", ".join(PEERS[name].precisions)
        raise BenchmarkError(f"{name} cannot run {wanted!r} here; it can run {known}")
    return name, precision


def run(options: Options, progress: Callable[[str, float], None]) -> Benchmark:
    """Runs the benchmark.

    Args:
        options: what to measure.
        progress: told what happens next, and the share that is done, 0 to 1.

    Raises:
        BenchmarkError: an option does not fit the model, or names an unknown peer.
        ArtifactError, DeviceError, TargetError: our own model cannot be run.
    """
    if options.kernels and options.device != "cpu":
        raise BenchmarkError(f"--kernels times kernels of the processor only, not of {options.device}")
    artifact = Artifact(options.artifact)
    cases = make_cases(artifact.config, options)
    quantized = artifact.quantization != "none"
    precision = artifact.quantization if quantized else artifact.dtype
    wanted = {text: parse_peer(text, precision, options.device) for text in options.against}
    threads = set_threads(options.threads)
    machine = describe_machine(threads)
    limits = _limits(options.device, threads, artifact.dtype, progress)
    progress("loading the artifact", 0.02)
    kind = CompiledGpuSystem if options.device.startswith("cuda") else CompiledSystem
    ours = kind(options.artifact, threads, max((case.batch for case in cases), default=1), options.device)
    infos = [SystemInfo(OURS, ours.name, ours.version, ours.precision, None)]
    skipped: list[str] = []
    with ExitStack() as stack:
        peers = _start_peers(wanted, ours, threads, options.peer_python, stack, infos, skipped, progress)
        measurements = _measure(cases, ours, peers, options.rounds, skipped, progress)
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
        "target": ours.library.target,
        "device": ours.device,
        "weight_format": ours.storage.weights,
    }
    return Benchmark(
        machine,
        describe_versions(),
        described,
        limits,
        ours.storage.arithmetic,
        infos,
        skipped,
        measurements,
        kernels,
    )


def _limits(
    device: str, threads: int, dtype: str, progress: Callable[[str, float], None]
) -> Limits | DeviceLimits | None:
    progress("measuring limits", 0.0)
    if device == "cpu":
        return measure_limits(targets.detect_cpu(), threads)
    if not device.startswith("cuda"):
        return None
    try:
        import torch
    except ImportError:
        return None
    return measure_device_limits(torch_device(device), dtype) if torch.cuda.is_available() else None


Peer = PeerProcess | GpuPeer


def _start_peers(
    wanted: dict[str, tuple[str, str]],
    ours: CompiledSystem,
    threads: int,
    python: str,
    stack: ExitStack,
    infos: list[SystemInfo],
    skipped: list[str],
    progress: Callable[[str, float], None],
) -> dict[str, Peer]:
    """The peers that run the same model, ended when `stack` is closed; the others go to `skipped`."""
    peers: dict[str, Peer] = {}
    if not wanted:
        return peers
    on_gpu = ours.device.startswith("cuda")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tvm-attn-weights-")))
    if not on_gpu:
        progress("writing the weights for the peers", 0.02)
        write_weights(ours.artifact, folder)
    for label, (name, precision) in wanted.items():
        progress(f"starting {label}", 0.03)
        peer: Peer
        try:
            if on_gpu:
                peer = GpuPeer(name, precision, ours)
            else:
                peer = PeerProcess(PEERS[name], folder, precision, threads, python)
                stack.callback(peer.close)
            infos.append(_compare(label, ours, peer))
            peers[label] = peer
        except PeerUnavailable as reason:
            skipped.append(str(reason))
    return peers


def _compare(label: str, ours: CompiledSystem, peer: Peer) -> SystemInfo:
    """Checks that a peer runs the same model.

    Raises:
        PeerUnavailable: it does not, or it fails.
    """
    tokens = min(_AGREEMENT_TOKENS, ours.config.n_positions)
    ids: Int32Array = np.random.default_rng(0).integers(0, ours.vocabulary, tokens, dtype=np.int32)
    bound = max(_AGREEMENT[peer.precision], _AGREEMENT[ours.precision])
    agreement = compare_logits(ours.logits(ids), peer.logits(ids), bound)
    ours.settle()
    if not agreement.nmse <= bound:
        raise PeerUnavailable(
            f"{label}: not the same model: its logits differ from ours, NMSE {agreement.nmse:.1e}, bound {bound:.0e}"
        )
    return SystemInfo(label, peer.name, peer.version, peer.precision, agreement)


def compare_logits(expected: dict[str, Float32Array], given: dict[str, Float32Array], bound: float) -> Agreement:
    """The worst error of logits (V,), over the functions that both systems have."""
    errors, same = [], True
    for function, logits in given.items():
        reference = expected[function].astype(np.float64)
        difference = logits.astype(np.float64) - reference
        errors.append(float((difference**2).sum() / (reference**2).sum()))
        same = same and int(logits.argmax()) == int(reference.argmax())
    return Agreement(max(errors), same, bound)


def _measure(
    cases: list[Case],
    ours: CompiledSystem,
    peers: dict[str, Peer],
    rounds: int,
    skipped: list[str],
    progress: Callable[[str, float], None],
) -> list[Measurement]:
    """Times every case. A peer that fails is dropped from `peers`, and `skipped` says why."""
    results = []
    for index, case in enumerate(cases):
        measurement = Measurement(case, _case_work(ours.config, case, ours.storage))
        results.append(measurement)
        prepared: set[str] = set()
        for turn in range(rounds):
            share = 0.05 + 0.9 * (index + turn / rounds) / len(cases)
            progress(f"{case}: {OURS}", share)
            if case.phase == "decode" and not turn:
                ours.fill(case)
            measurement.rounds.setdefault(OURS, []).append(ours.time(case, ROUND_SECONDS))
            for label, peer in list(peers.items()):
                progress(f"{case}: {label}", share)
                ours.settle()
                try:
                    if label not in prepared and not _prepare(peer, case):
                        continue
                    prepared.add(label)
                    times = peer.time(case, ROUND_SECONDS)
                    measurement.rounds.setdefault(label, []).append(times)
                except PeerUnavailable as reason:
                    skipped.append(f"{reason} (at {case})")
                    del peers[label]
    return results


def _case_work(config: GPT2Config, case: Case, storage: Storage) -> Work:
    if case.phase == "prefill":
        return prefill_work(config, case.tokens, storage)
    return decode_work(config, case.tokens, case.batch, storage)


def _prepare(peer: Peer, case: Case) -> bool:
    """Fills a peer's cache for a case; False where the peer cannot run it."""
    if not peer.supports(case):
        return False
    if case.phase == "decode":
        peer.fill(case)
    return True


def _kernel_cases(cases: list[Case]) -> list[Case]:
    """The longest prompt, and the longest context of each batch size."""
    longest: dict[tuple[str, int], Case] = {}
    for case in cases:
        key = (case.phase, case.batch)
        if key not in longest or case.tokens > longest[key].tokens:
            longest[key] = case
    return list(longest.values())
