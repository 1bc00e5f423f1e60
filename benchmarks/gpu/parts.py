"""The parts of `python -m benchmarks.gpu`: the work of each in its process, their order and time limits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import Entry, Outcome, emit, run_child
from tvm_attn.config import param_shapes
from tvm_attn.errors import TvmAttnError
from tvm_attn.runtime.artifact import Artifact

_VULKAN = "vulkan:0"
_TINY, _LARGE = 50_000_000, 500_000_000
"""Numbers of parameters: smaller models are tiny, larger ones large."""
_LEAST_SECONDS = 5.0
"""A part that would get less time is left out."""


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark measures, and where.

    Attributes:
        device: the device, e.g. "cuda:0".
        artifacts: folder with artifacts; those with a library for CUDA are run.
        kernels: folder that `write_kernel_library` made.
        quick: whether to use smaller sizes and fewer cases.
    """

    device: str
    artifacts: Path
    kernels: Path
    quick: bool


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Attributes:
        name: its work, and after a colon the artifact, if any.
        seconds: its time limit.
        correctness: whether the run fails if it fails.
    """

    name: str
    seconds: float
    correctness: bool = False


def artifacts_of(folder: Path) -> list[Artifact]:
    """The artifacts in a folder that have a library for CUDA or Vulkan, smallest model first."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            artifact = Artifact(path)
        except TvmAttnError:
            continue  # not an artifact, or one of another version
        if has_library(artifact, "cuda") or has_library(artifact, "vulkan"):
            found.append(artifact)
    return sorted(found, key=parameter_count)


def has_library(artifact: Artifact, device: str) -> bool:
    """Whether an artifact has a library for a class of devices, e.g. "cuda"."""
    return any(library.device == device for library in artifact.libraries)


def parameter_count(artifact: Artifact) -> int:
    """The number of parameters of an artifact's model."""
    return sum(math.prod(shape) for shape in param_shapes(artifact.config).values())


def plan(settings: Settings, artifacts: Sequence[Artifact], sanitize: bool = False) -> list[Part]:
    """The parts in order: correctness before speed, and the smallest model first."""

    def name(artifact: Artifact) -> str:
        return artifact.folder.name

    parts = [Part("device", 90)]  # importing PyTorch for the first time takes long
    if (settings.kernels / "kernels.json").is_file():
        parts.append(Part("kernels", 120, correctness=True))
    cuda = [artifact for artifact in artifacts if has_library(artifact, "cuda")]
    vulkan = [artifact for artifact in artifacts if has_library(artifact, "vulkan")]
    parts += [Part(f"check:{name(artifact)}", 90 if is_large(artifact) else 60, True) for artifact in cuda]
    if (settings.kernels / "kernels.json").is_file():
        parts += [Part("products", 60), Part("attention", 40)]
    # Tiny models say nothing about speed; float16 comes first, then other models that are not quantized.
    measured = [artifact for artifact in cuda if parameter_count(artifact) >= _TINY] or list(cuda)
    measured.sort(key=lambda artifact: (artifact.quantization != "none", artifact.dtype != "float16"))
    plain = [artifact for artifact in measured if artifact.quantization == "none" and artifact.dtype == "float16"]
    parts += [Part(f"load:{name(artifact)}", 40) for artifact in plain]
    parts += [Part(f"model:{name(artifact)}", 100) for artifact in measured]
    if not settings.quick:
        parts += [Part(f"compiled:{name(artifact)}", 100) for artifact in plain[:1]]
    parts += [Part(f"vulkan:{name(artifact)}", 60, True) for artifact in vulkan]
    if sanitize and (settings.kernels / "kernels.json").is_file():
        parts.append(Part("sanitize", 400, correctness=True))
    return parts


def run_parts(
    parts: Sequence[Part],
    command: Callable[[Part, float], Sequence[str]],
    seconds: float,
    progress: Callable[[str], None] = lambda message: None,
    changed: Callable[[dict[str, dict[str, Any]]], None] = lambda result: None,
) -> dict[str, dict[str, Any]]:
    """Runs each part in its own process.

    Args:
        parts: the parts in order.
        command: returns the command of a part with a time limit; it prints entries, see `benchmarks.gpu.processes`.
        seconds: time limit of all parts together; when it is used up, the remaining parts are left out.
        progress: called with a description of each step.
        changed: called with what there is of the result after every entry and every part, the last one too if an
            exception such as KeyboardInterrupt ends it.

    Returns:
        For each part "seconds", "error" (None if it went well), "entries", and "correctness".
    """
    start, result = time.monotonic(), {}
    for part in parts:
        left = seconds - (time.monotonic() - start)
        outcome = Outcome()

        def update(_: Entry | None = None, part: Part = part, outcome: Outcome = outcome) -> None:
            result[part.name] = {**asdict(outcome), "correctness": part.correctness}
            changed(result)

        try:
            if left < _LEAST_SECONDS:
                outcome.error = "left out: no time was left"
            else:
                limit = min(part.seconds, left)
                progress(f"{time.monotonic() - start:6.1f} s  {part.name}, at most {limit:.0f} s")
                run_child(command(part, limit), limit, update, outcome)
        finally:
            update()
    return result


def has_failed(parts: dict[str, dict[str, Any]]) -> bool:
    """Whether a part that checks correctness did not finish, or found an error."""
    return any(
        part["error"] is not None or any(entry.get("passed") is False for entry in part["entries"])
        for part in parts.values()
        if part["correctness"]
    )


def run_part(name: str, settings: Settings, seconds: float) -> Iterator[Entry]:
    """Does the work of a part, in its own process.

    Args:
        name: name of the part.
        settings: settings of the run.
        seconds: time limit of the part.
    """
    kind, _, artifact_name = name.partition(":")
    if kind in ("kernels", "sanitize", "products", "attention"):
        yield from _run_kernels(kind, settings, seconds)
    elif kind == "device":
        yield from _device(settings)
    else:
        yield from _run_model(kind, settings.artifacts / artifact_name, settings)


def _run_kernels(kind: str, settings: Settings, seconds: float) -> Iterator[Entry]:
    from benchmarks.gpu import cases
    from benchmarks.gpu.kernel_library import KernelLibrary

    folder, device = settings.kernels, settings.device
    if kind == "kernels":
        # Results are printed as they come, and some time is kept in case a case hangs.
        results = cases.run_cases(
            folder, device, seconds - 3, lambda result: emit({"what": "kernel", **asdict(result)})
        )
        total = len(KernelLibrary(folder).cases)
        yield {"what": "kernels", "ran": len(results), "cases": total, "passed": len(results) == total}
        return
    if kind == "sanitize":
        for tool, verdict in cases.sanitize(folder, device, seconds - 5).items():
            absent = "not installed" in verdict
            yield {
                "what": "sanitize",
                "tool": tool,
                "verdict": verdict,
                "passed": absent or verdict.startswith("0 errors"),
            }
        return
    from benchmarks.gpu import timing
    from benchmarks.gpu.devices import tvm_device

    tvm_device(device)  # loads TVM's runtime
    library = KernelLibrary(folder)
    if kind == "products":
        yield from timing.compare_products(library, device, settings.quick)
    else:
        yield from timing.compare_attention(library, device)


def _device(settings: Settings) -> Iterator[Entry]:
    from benchmarks.gpu.devices import describe, tvm_device
    from tvm_attn.benchmark import device as limits
    from tvm_attn.benchmark.machine import describe_versions

    tvm_device(settings.device)
    yield {"what": "device", **describe(settings.device), "versions": describe_versions()}
    yield {"what": "limit", "name": "copy_gbytes", "value": limits.measure_copy(settings.device)}
    for dtype in ("float16", "bfloat16"):
        gflops = limits.measure_product(settings.device, dtype, 4096 if settings.quick else 8192)
        yield {"what": "limit", "name": f"{dtype}_tflops", "value": gflops / 1e3}


def _run_model(kind: str, folder: Path, settings: Settings) -> Iterator[Entry]:
    from benchmarks.gpu import models
    from benchmarks.gpu.devices import tvm_device
    from tvm_attn.benchmark.device import DeviceLimits, measure_copy, measure_product

    artifact, device = Artifact(folder), settings.device
    facts = {
        "parameters": parameter_count(artifact),
        "dtype": artifact.dtype,
        "quantization": artifact.quantization,
        "device": "vulkan" if kind == "vulkan" else "cuda",
    }
    entries: Iterator[Entry]
    if kind == "vulkan":
        tvm_device(_VULKAN)
        cases = model_cases(artifact, quick=True)
        entries = chain(models.verify(folder, _VULKAN), models.measure(folder, _VULKAN, cases, [device], None, 0.2))
    elif kind == "check":
        entries = chain(models.verify(folder, device), models.compare_graph(folder, device))
    elif kind == "load":
        entries = models.measure_load(folder, device)
    else:
        tvm_device(device)
        # In the same process, so that the limit is that of the same minute.
        limits = DeviceLimits(
            device, artifact.dtype, measure_product(device, artifact.dtype, 4096), measure_copy(device)
        )
        peers = ["torch-compile"] if kind == "compiled" else model_peers(artifact, settings.quick)
        cases = model_cases(artifact, settings.quick)
        entries = models.measure(folder, device, cases, peers, limits, 0.2 if settings.quick else 0.25)
    yield from ({**entry, **facts} for entry in entries)


def model_cases(artifact: Artifact, quick: bool) -> list[Any]:
    """The cases of a model's part: prompts and contexts, with one sequence and with 64."""
    from tvm_attn.benchmark.system import Case

    longest = artifact.config.n_positions
    context, long = min(128, longest // 2), min(1000, longest - 24)
    large = is_large(artifact)
    decode = [Case("decode", context), Case("decode", long)]
    if not large:  # KV caches of the largest models for 64 sequences exceed the memory of some devices
        decode.append(Case("decode", context, 64))
    if quick:
        return [decode[0], *decode[2:]]
    return [*decode, Case("prefill", context), Case("prefill", longest - 1)]


def is_large(artifact: Artifact) -> bool:
    """Whether the model is so large that loading takes a large part of its time limit."""
    return parameter_count(artifact) > _LARGE


def model_peers(artifact: Artifact, quick: bool) -> list[str]:
    """The peers of a model's part."""
    if quick or is_large(artifact):
        return ["torch", "torch-graph"]
    if artifact.dtype == "float32" or artifact.quantization != "none":
        return ["torch-graph"]
    return ["torch", "transformers", "torch-flash", "torch-cudnn", "torch-graph"]


def write_json(result: dict[str, Any], path: Path) -> None:
    """Writes a run's result, completely or not at all. NaN becomes null, because JSON has no NaN."""
    from tvm_attn.benchmark.report import write_file

    write_file(path, json.dumps(_finite(result), indent=1, allow_nan=False).encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
