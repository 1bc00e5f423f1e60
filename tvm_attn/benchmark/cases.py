"""What a benchmark measures: its options, and the cases that follow from them and the model. Needs no TVM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_attn.benchmark.system import Case
from tvm_attn.config import GPT2Config
from tvm_attn.errors import BenchmarkError
from tvm_attn.runtime.artifact import Artifact

PREFILL, DECODE, BATCH = (1, 16, 128, 512, 1023), (1, 128, 512, 1000), (1, 8)
"""Default lengths and batch sizes, limited by the model's context."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        artifact: folder of the artifact.
        prefill, decode: prompt lengths and contexts; None takes the defaults that fit the model.
        batch: sequences of a decode call.
        threads: CPU threads of every system; None takes what `thread_count` does.
        rounds: turns of each system a case.
        kernels: measure single kernels as well; of the processor only.
        device: where our model runs, as `tvm_attn.load` takes it.
    """

    artifact: Path
    prefill: tuple[int, ...] | None = None
    decode: tuple[int, ...] | None = None
    batch: tuple[int, ...] = BATCH
    threads: int | None = None
    rounds: int = 3
    kernels: bool = False
    device: str = "cpu"


def open_artifact(options: Options) -> tuple[Artifact, list[Case]]:
    """The artifact and the cases to measure.

    Raises:
        BenchmarkError: an option does not fit the model.
        ArtifactError: the folder holds no artifact.
    """
    if options.kernels and options.device != "cpu":
        raise BenchmarkError(f"--kernels times kernels of the processor only, not of {options.device}")
    artifact = Artifact(options.artifact)
    return artifact, make_cases(artifact.config, options)


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
