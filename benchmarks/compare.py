"""How fast a compiled model is compared with other runtimes on the same weights.

    python -m benchmarks.compare dist/gpt2 --against torch,onnxruntime

Also takes the options of `tvm-attn bench`. Systems take turns in short rounds; all but the one being measured are
stopped or asleep.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.table import Table

from benchmarks.peers import GPU_PEERS, PEERS
from benchmarks.peers.client import PeerProcess, PeerUnavailable
from benchmarks.peers.weights import write_weights
from tvm_attn import bench
from tvm_attn.benchmark import cases, session
from tvm_attn.benchmark.ours import CompiledSystem
from tvm_attn.benchmark.report import case_cells, describe_artifact
from tvm_attn.benchmark.session import OURS, Benchmark, Measurement, SystemInfo
from tvm_attn.benchmark.system import Case, Float32Array, Int32Array
from tvm_attn.cli import Parser, names, new_table, run
from tvm_attn.errors import BenchmarkError

# Largest normalised mean squared error of a peer's logits against ours, by the coarser of the two precisions. It
# distinguishes the same model from another one: random logits give 2, one wrong layer or scale gives 1e-2 or more.
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


class Peer(Protocol):
    """A runtime that is measured; `PeerProcess` explains the members."""

    name: str
    version: str
    precision: str

    def supports(self, case: Case) -> bool: ...

    def fill(self, case: Case) -> None: ...

    def time(self, case: Case, seconds: float) -> list[float]: ...

    def logits(self, ids: Int32Array) -> dict[str, Float32Array]: ...


@dataclass(frozen=True)
class Agreement:
    """How a peer's logits compare with ours on one prompt, the worse of prefill and decode.

    Attributes:
        nmse: normalised mean squared error.
        top1: whether the most likely token is the same.
        bound: upper bound of `nmse`.
    """

    nmse: float
    top1: bool
    bound: float


def parse_peer(text: str, ours: str, device: str = "cpu") -> tuple[str, str]:
    """Name and precision of a peer, from "NAME" or "NAME:PRECISION"; `ours` is the artifact's precision.

    Raises:
        BenchmarkError: there is no such peer or precision for the device.
    """
    name, _, wanted = text.partition(":")
    if device.startswith("cuda"):
        if name not in GPU_PEERS:
            raise BenchmarkError(f"unknown peer {name!r} on {device}; known: {', '.join(GPU_PEERS)}")
        if (wanted or "float16") not in _GPU_PRECISIONS:
            raise BenchmarkError(f"{name} cannot run {wanted!r}; it can run {', '.join(_GPU_PRECISIONS)}")
        # PyTorch has no 8- and 4-bit weights here: ours are compared with its 16-bit weights.
        return name, wanted or (ours if ours in _GPU_PRECISIONS else "float16")
    if name not in PEERS:
        raise BenchmarkError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    precision = PEERS[name].precision(wanted or None, ours)
    if precision is None:
        known = ", ".join(PEERS[name].precisions)
        raise BenchmarkError(f"{name} cannot run {wanted!r} here; it can run {known}")
    return name, precision


@dataclass(frozen=True)
class PeerSystem(SystemInfo):
    """A peer that was measured; `agreement` says that it runs the same model."""

    agreement: Agreement


class RunningPeers:
    """The peers that run the same model as ours; see `tvm_attn.benchmark.session.Peers`.

    Args:
        wanted: name and precision, by label.
        ours: our model, whose weights they use.
        threads: CPU threads per peer.
        python: the Python in which they are installed.
        stack: stops them when it is closed.
        progress: called with a description of each step.
    """

    def __init__(
        self,
        wanted: dict[str, tuple[str, str]],
        ours: CompiledSystem,
        threads: int,
        python: str,
        stack: ExitStack,
        progress: Callable[[str], None],
    ) -> None:
        self.systems: list[SystemInfo] = []
        self.skipped: list[str] = []
        self._peers: dict[str, Peer] = {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tvm-attn-weights-")))
        on_gpu = ours.device.startswith("cuda")
        if not on_gpu:
            progress("writing the weights for the peers")
            write_weights(ours.artifact, folder)
        for label, (name, precision) in wanted.items():
            progress(f"starting {label}")
            try:
                peer: Peer
                if on_gpu:
                    from benchmarks.gpu.peer import GpuPeer

                    peer = GpuPeer(name, precision, ours)
                else:
                    peer = PeerProcess(PEERS[name], folder, precision, threads, python)
                    stack.callback(peer.close)
                self.systems.append(check_same_model(label, ours, peer))
                self._peers[label] = peer
            except PeerUnavailable as reason:
                self.skipped.append(str(reason))

    def take_turn(self, measurement: Measurement, progress: Callable[[str], None]) -> None:
        """See `Peers.take_turn`. A peer that fails is dropped, and `skipped` says why."""
        case = measurement.case
        for label, peer in list(self._peers.items()):
            progress(f"{case}: {label}")
            try:
                if label not in measurement.rounds and not _prepare(peer, case):
                    continue
                times = peer.time(case, session.ROUND_SECONDS)
                measurement.rounds.setdefault(label, []).append(times)
            except PeerUnavailable as reason:
                self.skipped.append(f"{reason} (at {case})")
                del self._peers[label]


def _prepare(peer: Peer, case: Case) -> bool:
    """Fills a peer's cache for a case; False if the peer cannot run it."""
    if not peer.supports(case):
        return False
    if case.phase == "decode":
        peer.fill(case)
    return True


def check_same_model(label: str, ours: CompiledSystem, peer: Peer) -> PeerSystem:
    """Checks that a peer runs the same model.

    Raises:
        PeerUnavailable: it runs another model, or fails.
    """
    tokens = min(_AGREEMENT_TOKENS, ours.config.n_positions)
    ids: Int32Array = np.random.default_rng(0).integers(0, ours.vocabulary, tokens, dtype=np.int32)
    bound = max(_AGREEMENT[peer.precision], _AGREEMENT[ours.precision])
    agreement = compare_logits(ours.logits(ids), peer.logits(ids), bound)
    if not agreement.nmse <= bound:
        raise PeerUnavailable(
            f"{label}: not the same model: its logits differ from ours, NMSE {agreement.nmse:.1e}, bound {bound:.0e}"
        )
    return PeerSystem(label, peer.name, peer.version, peer.precision, agreement)


def compare_logits(expected: dict[str, Float32Array], given: dict[str, Float32Array], bound: float) -> Agreement:
    """The worst error of logits (V,) over the functions that both systems have."""
    errors, same = [], True
    for function, logits in given.items():
        reference = expected[function].astype(np.float64)
        difference = logits.astype(np.float64) - reference
        errors.append(float((difference**2).sum() / (reference**2).sum()))
        same = same and int(logits.argmax()) == int(reference.argmax())
    return Agreement(max(errors), same, bound)


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _compare_with(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.compare",
        description="Measure a compiled model beside other runtimes on the same weights.",
    )
    bench.add_arguments(parser)
    parser.add_argument(
        "--against",
        type=names,
        required=True,
        metavar="NAMES",
        help=f"{', '.join(PEERS)}, separated by commas, each NAME or NAME:PRECISION (default: the artifact's dtype); "
        f"on CUDA {', '.join(GPU_PEERS)}; those that are not installed are named and left out",
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="the Python that has the peers installed"
    )
    return parser


def _compare_with(args: argparse.Namespace) -> int:
    artifact, _ = cases.open_artifact(bench.options(args))
    precision = artifact.dtype if artifact.quantization == "none" else artifact.quantization
    if shutil.which(args.peer_python) is None:
        raise BenchmarkError(f"--peer-python {args.peer_python}: there is no such program")
    wanted = {text: parse_peer(text, precision, args.device) for text in args.against}

    @contextmanager
    def start(ours: CompiledSystem, threads: int, progress: Callable[[str], None]) -> Iterator[RunningPeers]:
        with ExitStack() as stack:
            yield RunningPeers(wanted, ours, threads, args.peer_python, stack, progress)

    return bench.measure(args, start, peer_tables)


def peer_tables(benchmark: Benchmark) -> Iterator[Table]:
    """The tables in addition to those of `tvm-attn bench`: agreement of the peers, and their times by phase."""
    if len(benchmark.systems) == 1:
        return
    table = new_table(
        "Logits of the peers against ours, same weights", ("peer", "runtime", "precision"), ("NMSE", "top-1")
    )
    for system in benchmark.systems:
        if isinstance(system, PeerSystem):
            figures = (f"{system.agreement.nmse:.1e}", "same" if system.agreement.top1 else "differs")
            table.add_row(system.label, f"{system.name} {system.version}", system.precision, *figures)
    yield table
    for phase in ("prefill", "decode"):
        measurements = [entry for entry in benchmark.measurements if entry.case.phase == phase]
        if measurements:
            yield _phase_table(benchmark, phase, measurements)


def _phase_table(benchmark: Benchmark, phase: str, measurements: list[Measurement]) -> Table:
    words = ("prompt tokens",) if phase == "prefill" else ("context", "batch")
    labels = [system.label for system in benchmark.systems]
    title = f"{phase.capitalize()}{describe_artifact(benchmark)}: tokens/s, and peer's time / ours"
    table = new_table(title, words, tuple(labels))
    for entry in measurements:
        ours = entry.median(OURS)
        cells = [f"{entry.case.tokens_per_call / ours:.1f}"]
        for label in labels[1:]:
            if label in entry.rounds:
                median = entry.median(label)
                cells.append(f"{entry.case.tokens_per_call / median:.1f}  {median / ours:.2f}x")
            else:
                cells.append("-")
        table.add_row(*case_cells(entry.case), *cells)
    table.caption = "medians; above 1x ours is faster"
    table.caption_justify = "left"
    return table


if __name__ == "__main__":
    sys.exit(main())
