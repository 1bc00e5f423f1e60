"""Artifacts on a GPU: checks against PyTorch, with and without graphs; whole calls; the time to the first token."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

import tvm_attn
from benchmarks.gpu.processes import Entry, first_error
from benchmarks.gpu.systems import make_peer, open_compiled
from tvm_attn.benchmark.counts import decode_work, prefill_work
from tvm_attn.benchmark.device import DeviceLimits
from tvm_attn.benchmark.ours import CompiledGpuSystem
from tvm_attn.benchmark.system import CachedSystem, Case
from tvm_attn.compiler.verification import verify_artifact
from tvm_attn.model.params import effective_params
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.tensors import normalised_error

_PROMPTS = ((1, 2, 3), (5,), (7, 11, 13, 17, 19, 23, 29))
"""A ragged batch of token ids that are in every vocabulary."""
_TOKENS = 24


def verify(folder: Path, device: str) -> Iterator[Entry]:
    """Every comparison of `tvm-attn verify`."""
    report = verify_artifact(folder, device)
    for check in report.checks:
        yield {"what": "verify", "artifact": folder.name, **asdict(check)}


def compare_graph(folder: Path, device: str) -> Iterator[Entry]:
    """Compares the tokens of greedy decoding with CUDA graphs and with kernels launched one by one."""
    batches = {"one sequence": _PROMPTS[:1], "a ragged batch": _PROMPTS, "22 sequences": _PROMPTS * 7 + _PROMPTS[:1]}
    for name, prompts in batches.items():
        tokens = [_generate(folder, device, prompts, graph) for graph in (True, False)]
        same = [left == right for left, right in zip(*tokens, strict=True)]
        yield {
            "what": "graph",
            "artifact": folder.name,
            "case": name,
            "same": sum(same),
            "sequences": len(same),
            "passed": all(same),
        }


def _generate(folder: Path, device: str, prompts: tuple[tuple[int, ...], ...], graph: bool) -> list[tuple[int, ...]]:
    model = tvm_attn.load(folder, device, max_batch=len(prompts), graph=graph)
    limit = min(_TOKENS, model.config.n_positions - max(map(len, prompts)))
    # No id ends a sequence, so all run to the limit.
    completions = model.generate([list(prompt) for prompt in prompts], max_new_tokens=limit, stop_token_ids=())
    return [tuple(completion.token_ids) for completion in completions]


def measure(
    folder: Path, device: str, cases: list[Case], peers: list[str], limits: DeviceLimits | None, round_seconds: float
) -> Iterator[Entry]:
    """Measures whole calls of an artifact and its peers in turns.

    Args:
        folder: the artifact.
        device: "cuda:0".
        cases: the cases to run.
        peers: names in `GPU_PEERS`, or another device for the same artifact, "cuda:0"; a peer that fails is named and
            left out.
        limits: the limits of the device.
        round_seconds: about how long each system runs a case in each of two rounds.
    """
    batch = max(case.batch for case in cases)
    ours = open_compiled(folder, device, batch)
    systems: dict[str, CachedSystem] = {"tvm_attn": ours}
    failed: dict[str, str] = {}
    for name in peers:
        try:
            peer = open_compiled(folder, name, batch) if ":" in name else _peer(name, ours, device, batch)
            error = _disagreement(ours, peer)
        except Exception as problem:  # whatever PyTorch raises is the reason for leaving it out
            failed[name] = _line(problem)
            continue
        if not error <= _SAME_MODEL:
            failed[name] = f"not the same model: NMSE {error:.1e}"
        else:
            systems[name] = peer
    yield {"what": "peers", "artifact": folder.name, "failed": failed}
    for case in cases:
        yield _case_entry(folder.name, case, systems, limits, round_seconds)


_SAME_MODEL = 1e-1
"""NMSE of logits above which a peer runs another model; random logits give 2."""


def _peer(name: str, ours: CompiledGpuSystem, device: str, batch: int) -> CachedSystem:
    artifact = Artifact(ours.artifact.folder)
    dtype = "float16" if artifact.quantization != "none" else artifact.dtype
    read, quantization = artifact.parameters.read, artifact.quantization
    return make_peer(name, ours.config, lambda: effective_params(ours.config, read, quantization), dtype, device, batch)


def _disagreement(ours: CachedSystem, peer: CachedSystem) -> float:
    ids = np.random.default_rng(0).integers(0, ours.vocabulary, 33, dtype=np.int32)
    worst = 0.0
    for expected, given in zip(ours.logits(ids).values(), peer.logits(ids).values(), strict=True):
        worst = float(np.max([worst, normalised_error(given, expected)]))  # keeps NaN
    return worst


def _case_entry(
    artifact: str, case: Case, systems: dict[str, CachedSystem], limits: DeviceLimits | None, round_seconds: float
) -> Entry:
    ours = systems["tvm_attn"]
    assert isinstance(ours, CompiledGpuSystem)
    times: dict[str, list[float]] = {name: [] for name in systems}
    failed: dict[str, str] = {}
    for turn in range(2):
        for name, system in systems.items():
            if name in failed:
                continue
            try:
                if case.phase == "decode" and not (turn and name == "tvm_attn"):
                    system.fill(case)
                times[name] += system.time(case, round_seconds)
            except Exception as problem:
                failed[name] = _line(problem)
                if name == "tvm_attn":
                    raise
    count = case.tokens_per_call
    seconds = {name: statistics.median(values) for name, values in times.items() if values and name not in failed}
    config, storage = ours.config, ours.storage
    work = (
        prefill_work(config, case.tokens, storage)
        if case.phase == "prefill"
        else decode_work(config, case.tokens, case.batch, storage)
    )
    bound, binding = limits.bound(work) if limits else (None, None)
    return {
        "what": "model",
        "artifact": artifact,
        **case.to_dict(),
        "seconds": seconds,
        "tokens_per_second": {name: count / value for name, value in seconds.items()},
        "gbytes_per_second": work.bytes / seconds["tvm_attn"] / 1e9,
        "of_limit": None if bound is None else bound / seconds["tvm_attn"],
        "bound_by": binding,
        "of": {name: value / seconds["tvm_attn"] for name, value in seconds.items() if name != "tvm_attn"},
        "failed": failed,
    }


def _line(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


_FIRST_TOKEN = """
import json, sys, time
start = time.perf_counter()
import tvm_attn
model = tvm_attn.load(sys.argv[1], sys.argv[2])
loaded = time.perf_counter()
next(iter(model.stream_ids([1, 2, 3], max_new_tokens=2)))
first = time.perf_counter()
print(json.dumps({"load_seconds": loaded - start, "first_token_seconds": first - start}))
"""


def measure_load(folder: Path, device: str, runs: int = 3) -> Iterator[Entry]:
    """Time from a new process to the first token, the best of several runs; `first_token_seconds` starts at the import.

    In the first run, files may not be in memory yet.
    """
    for run in range(runs):
        start = time.perf_counter()
        command = [sys.executable, "-c", _FIRST_TOKEN, str(folder), device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        whole = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(first_error(done.stderr))
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        yield {"what": "load", "artifact": folder.name, "run": run, **measured, "process_seconds": whole}
