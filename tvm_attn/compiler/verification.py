"""Checking a compiled library against the PyTorch reference on the artifact's own weights.

One run of the reference over a whole context gives the expected logits of every prefix, since GPT-2 is causal. Each
function is compared at several lengths, on prompts and single tokens, for one sequence and a ragged batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tvm_attn.errors import VerificationError
from tvm_attn.model.params import effective_params
from tvm_attn.model.reference import Reference, RoundedReference
from tvm_attn.runtime.artifact import Artifact, open_artifact
from tvm_attn.runtime.device import parse_device
from tvm_attn.runtime.engine import CompiledEngine
from tvm_attn.runtime.logits import DeviceLogits
from tvm_attn.runtime.logprobs import MOST_LOGPROBS
from tvm_attn.runtime.model import load_opened

LENGTHS = (1, 7, 64)
"""Prompt lengths that are checked in addition to the full context and one token less."""
VERIFY_BATCH = 9
"""Slots of the checked engine: enough for a ragged batch of every length, and for more than one group of rows, which
has kernels of its own."""
_DECODE_STEPS = 4
# Tokens of the float64 run that measures the float32 reference's own error.
_FLOAT64_TOKENS = 64
_ROW_BLOCK = 128


@dataclass(frozen=True)
class Bounds:
    """How far a library's logits may be from the reference.

    Attributes:
        nmse: normalised mean squared error, ``sum((x - y)**2) / sum(y**2)``.
        max_abs: largest difference, relative to the root mean square of the expected logits.
    """

    nmse: float
    max_abs: float


# The reference uses the weights as they are stored, so differences come from the order of float32 sums and from
# rounding: keys and values to the storage dtype or to 8 bits, activations to bfloat16 if its dot products are used,
# activations to 8 bits with quantized weights. With u the rounding unit of the storage dtype (2**-11, 2**-8), the
# bounds on the NMSE are at most 4 u**2. The worst errors measured on the demo model and on random 124M weights (NMSE,
# max abs / RMS): float32 8e-13 and 9e-6, float16 6e-9 and 5e-4, bfloat16 5e-6 and 1.2e-2, a KV cache in int8 2e-6 and
# 8e-3, int8 and int4 6e-5 and 5e-2; tiny models with sharp attention reach 1.4e-7 in float16.
# tests/compiler/test_verification.py repeats the roundings in a float64 run of the reference.
BOUNDS = {
    "float32": Bounds(nmse=1e-11, max_abs=1e-4),
    "float16": Bounds(nmse=1e-6, max_abs=2e-2),
    "bfloat16": Bounds(nmse=5e-5, max_abs=1e-1),
    "int8 cache": Bounds(nmse=5e-5, max_abs=1e-1),
    "int8": Bounds(nmse=5e-4, max_abs=5e-1),
    "int4": Bounds(nmse=5e-4, max_abs=5e-1),
}

_INT8_CACHE = "int8 cache"


def bounds_of(artifact: Artifact) -> Bounds:
    """The bounds of an artifact's library, those of the coarsest rounding in it."""
    if artifact.quantization != "none":
        return BOUNDS[artifact.quantization]
    return BOUNDS[_INT8_CACHE if artifact.quantized_kv else artifact.dtype]


_LOGPROB_ERROR = 1e-4
"""Of a log-probability computed on a device, against float64 on the same logits, nats."""


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    Attributes:
        function: the function of the library.
        case: description of lengths and batch.
        max_abs: largest absolute difference of a logit.
        relative_max_abs: the same over the root mean square of the expected logits.
        nmse: normalised mean squared error.
        top1: share of rows whose largest logit is the reference's.
        passed: whether it is within the bounds of the dtype.
    """

    function: str
    case: str
    max_abs: float
    relative_max_abs: float
    nmse: float
    top1: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """All comparisons of one library.

    Attributes:
        checks: the comparisons, in the order they ran.
        bounds: the bounds of every check.
        reference_nmse: error of the float32 reference itself against its float64 run, on the first tokens.
        cause: why a check failed, if the model or the storage format is to blame and not the library; else None.
    """

    checks: tuple[Check, ...]
    bounds: Bounds
    reference_nmse: float
    cause: str | None = None

    def raise_if_failed(self, what: str) -> None:
        """Raises VerificationError naming the worst failed check; `what` names the library."""
        failed = [check for check in self.checks if not check.passed]
        if failed:
            worst = max(failed, key=lambda check: float("inf") if np.isnan(check.nmse) else check.nmse)
            figures = f"NMSE {worst.nmse:.1e} (bound {self.bounds.nmse:.0e}), max abs {worst.max_abs:.1e}"
            raise VerificationError(
                f"{what} disagrees with PyTorch in {len(failed)} of {len(self.checks)} checks; worst: "
                f"{worst.function}, {worst.case}: {figures}; "
                f"{self.cause or 'this is a bug in tvm_attn or TVM, please report it'}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The report for the manifest."""
        return asdict(self)


def prompt_lengths(context: int) -> list[int]:
    """The prompt lengths to check: short, odd, longer than a vector tile, the full context, and one token less."""
    return sorted({length for length in (*LENGTHS, context - 1, context) if 1 <= length <= context})


def verify(
    artifact: Artifact,
    engine: CompiledEngine,
    progress: Callable[[str], None] = lambda message: None,
    device: str = "cpu",
) -> Report:
    """Compares a library's functions with PyTorch in float32 on the artifact's weights.

    Args:
        artifact: the artifact with the weights.
        engine: the loaded library; slots 0, 1, ... are overwritten.
        progress: called with a message before each step.
        device: PyTorch's name of the device on which it computes.

    Returns:
        The report; nothing is raised for a failed check.

    Raises:
        VerificationError: PyTorch is not installed.
    """
    config = artifact.config
    bounds = bounds_of(artifact)
    params = _effective_params(artifact)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (2, config.n_positions), dtype=np.int32)
    progress("PyTorch reference, float32")
    reference = Reference(config, params, device=device)
    expected = [reference.logits(row[None])[0] for row in ids]
    progress("PyTorch reference, float64")
    count = min(_FLOAT64_TOKENS, config.n_positions)
    exact = Reference(config, params, "float64", device).logits(ids[:1, :count])[0]
    reference_nmse = _Accumulator().add(expected[0][:count], exact).nmse
    del reference, params
    artifact.parameters.close()

    checks = []
    for function, case, pairs in _comparisons(engine, ids, expected):
        progress(f"checking {function}, {case}")
        result = _Accumulator()
        for actual, wanted in pairs():
            result.add(actual, wanted)
        checks.append(result.check(function, case, bounds))
    failed = not all(check.passed for check in checks)
    cause = _cause(artifact, ids, expected, engine.library.device == "cpu", device) if failed else None
    return Report(tuple(checks), bounds, reference_nmse, cause)


def _effective_params(artifact: Artifact) -> dict[str, np.ndarray]:
    # In stored order. Otherwise, shards would be read again, and each copy kept in memory by the parameters in it.
    stored = {name: artifact.parameters.read(name) for name in artifact.parameters.names()}
    artifact.parameters.close()
    return dict(effective_params(artifact.config, stored.__getitem__, artifact.quantization))


def _cause(
    artifact: Artifact, ids: np.ndarray, expected: list[np.ndarray], on_processor: bool, device: str
) -> str | None:
    """Why a check failed, in words, if the model or the storage format is the reason; else None.

    It is the format if the reference, with only the roundings that the format implies, is out of bounds too.
    """
    if not all(np.isfinite(rows).all() for rows in expected):
        return "PyTorch's float32 logits are not finite either: the weights are too large"
    params = _effective_params(artifact)

    def fits(cache: str, inputs: str, name: str) -> tuple[bool, RoundedReference]:
        reference = RoundedReference(artifact.config, params, device=device, cache=cache, inputs=inputs)
        pairs = zip(reference.logits(ids[:1])[0], expected[0], strict=True)
        rows = (_Accumulator().add(row[None], wanted[None]).check("", "", BOUNDS[name]) for row, wanted in pairs)
        return all(row.passed for row in rows), reference

    dtype, quant = artifact.dtype, artifact.quantization
    kv = artifact.quantized_kv
    if kv and fits(dtype, "float32", dtype)[0] and not fits(kv, "float32", _INT8_CACHE)[0]:
        return f"a KV cache in {kv} is too coarse for this model: build it without --kv"
    stored, reference = fits(dtype, "float32", dtype)
    if stored:
        inputs = "int8" if quant != "none" else dtype
        # On a processor, float16 is a storage format only.
        if inputs == "float32" or (on_processor and inputs == "float16"):
            return None
        computed, reference = fits(dtype, inputs, dtype if quant == "none" else quant)
        if computed:
            return None
        if quant != "none":
            return f"{quant} is too coarse for this model's activations: build it without --quant"
    better = "bfloat16" if dtype == "float16" and fits("bfloat16", "bfloat16", "bfloat16")[0] else "float32"
    if reference.overflow is None:
        return f"{dtype} is too coarse for this model: build it with --dtype {better}"
    what, largest = reference.overflow
    end = float(ml_dtypes.finfo(dtype).max)
    return f"{what} reach {largest:.3g}, and {dtype} ends at {end:g}: build it with --dtype {better}"


def verify_artifact(
    folder: str | Path, device: str = "auto", progress: Callable[[str], None] = lambda message: None
) -> Report:
    """Checks an artifact's library for a device against PyTorch; see `verify`. Needs only TVM's runtime.

    Raises:
        ArtifactError: the artifact is damaged or cannot run here.
        DeviceError: the device is unknown.
        VerificationError: PyTorch is not installed.
    """
    parse_device(device)

    def check(artifact: Artifact) -> Report:
        loaded = load_opened(artifact, device, max_batch=VERIFY_BATCH, draft=False)
        return verify(artifact, loaded.engine, progress, reference_device(loaded.device))

    return open_artifact(folder, check)


def reference_device(device: str) -> str:
    """The device for PyTorch if a library runs on `device`: the same one if possible, else the processor."""
    if not device.startswith("cuda"):
        return "cpu"
    try:
        import torch
    except ImportError:
        return "cpu"  # `Reference` says what is missing
    return device if torch.cuda.is_available() else "cpu"


Pairs = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def _comparisons(
    engine: CompiledEngine, ids: np.ndarray, expected: list[np.ndarray]
) -> Iterator[tuple[str, str, Pairs]]:
    """Function, case, and a generator of (actual, expected) logits."""
    context = ids.shape[1]
    for length in prompt_lengths(context):
        yield "logits", f"{length} tokens", partial(_all_rows, engine, ids, expected, length)
    for length in prompt_lengths(context):
        yield "prefill", f"{length} tokens", partial(_last_rows, engine, ids, expected, [length])
    for length in prompt_lengths(context):
        steps = min(_DECODE_STEPS, context - length)
        if steps:
            case = f"{length} cached, {steps} more"
            yield "decode_one", case, partial(_decode, engine, ids, expected, [length], steps)
    batch = prompt_lengths(context)[: engine.max_batch]
    if len(batch) > 1:
        case = "ragged batch " + ", ".join(map(str, batch))
        yield "prefill", case, partial(_last_rows, engine, ids, expected, batch)
        room = [length for length in batch if length < context]
        steps = min(_DECODE_STEPS, context - max(room))
        case = f"ragged batch {', '.join(map(str, room))}, {steps} more"
        if len(room) > 1:
            yield "decode", case, partial(_decode, engine, ids, expected, room, steps)
    if len(batch) > 1 and context > 3:
        yield "prefill", f"{context} tokens in parts, the first copied", partial(_parts, engine, ids, expected)
    short = [length for length in batch if length <= LENGTHS[-1] and length < context]
    if engine.max_batch > len(batch) and short:
        many = [short[index % len(short)] for index in range(engine.max_batch)]
        steps = min(_DECODE_STEPS, context - max(many))
        case = f"batch of {len(many)}, each {' or '.join(map(str, short))} cached, {steps} more"
        yield "decode", case, partial(_decode, engine, ids, expected, many, steps)


def _all_rows(
    engine: CompiledEngine, ids: np.ndarray, expected: list[np.ndarray], length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield engine.logits([ids[0, :length]], [0])[0], expected[0][:length]


def _prompts(engine: CompiledEngine, ids: np.ndarray, lengths: list[int]) -> tuple[list[np.ndarray], list[int]]:
    """Prefixes of the given lengths, taken from the two sequences in turn, and slots in descending order."""
    prompts = [ids[index % 2, :length] for index, length in enumerate(lengths)]
    return prompts, list(range(len(lengths)))[::-1]


def _last_rows(
    engine: CompiledEngine, ids: np.ndarray, expected: list[np.ndarray], lengths: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    prompts, slots = _prompts(engine, ids, lengths)
    logits = engine.prefill(prompts, slots)
    wanted = np.stack([expected[index % 2][length - 1] for index, length in enumerate(lengths)])
    yield logits.numpy(), wanted
    _check_found(logits)


def _parts(
    engine: CompiledEngine, ids: np.ndarray, expected: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A prompt as a scheduler computes it: the beginning in another slot, then one token, then the rest in company."""
    context = ids.shape[1]
    first = context // 3
    yield engine.prefill([ids[0, :first]], [0]).numpy(), expected[0][first - 1 : first]
    engine.copy_prefix(0, 1, first)
    yield engine.prefill([ids[0, first : first + 1]], [1], [first]).numpy(), expected[0][first : first + 1]
    logits = engine.prefill([ids[1, :1], ids[0, first + 1 :]], [0, 1], [0, first + 1])
    yield logits.numpy(), np.stack([expected[1][0], expected[0][-1]])


def _decode(
    engine: CompiledEngine, ids: np.ndarray, expected: list[np.ndarray], lengths: list[int], steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cached decoding of the tokens that follow each prompt, against the reference's full recomputation."""
    prompts, slots = _prompts(engine, ids, lengths)
    engine.prefill(prompts, slots)
    sequences = np.arange(len(lengths)) % 2
    for step in range(steps):
        positions = np.array(lengths, np.int32) + step
        logits = engine.decode(ids[sequences, positions], np.array(slots, np.int32), positions.astype(np.int32))
        wanted = np.stack(
            [expected[sequence][position] for sequence, position in zip(sequences, positions, strict=True)]
        )
        yield logits.numpy(), wanted
        _check_found(logits)


def _check_found(logits: DeviceLogits) -> None:
    """Checks what the library finds in its own logits: the largest ones, and log-probabilities."""
    rows = logits.numpy().astype(np.float64)
    if np.isnan(rows).any():
        return  # the comparison with the reference fails
    if not np.array_equal(rows.argmax(-1), logits.argmax()):
        raise VerificationError("the compiled argmax does not find the largest logit; please report this bug")
    last = rows.shape[1] - 1
    found = logits.logprobs(np.full(len(rows), last, np.int32), MOST_LOGPROBS)
    rows -= rows.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    best = -np.sort(-rows, axis=-1)[:, :MOST_LOGPROBS]
    top, ids = found.top[:, : best.shape[1]], found.ids[:, : best.shape[1]]
    differences = found.chosen - rows[:, last], top - best, top - np.take_along_axis(rows, ids, -1)
    if not all((np.abs(difference) <= _LOGPROB_ERROR).all() for difference in differences):
        raise VerificationError("the compiled log-probabilities are not those of the logits; please report this bug")


class _Accumulator:
    """Sums up errors in float64, a block of rows at a time."""

    def __init__(self) -> None:
        self.error = self.power = self.max_abs = 0.0
        self.rows = self.agreeing = self.values = 0

    @property
    def nmse(self) -> float:
        return self.error / self.power if self.power else self.error

    def add(self, actual: np.ndarray, expected: np.ndarray) -> _Accumulator:
        for start in range(0, len(expected), _ROW_BLOCK):
            wanted = expected[start : start + _ROW_BLOCK].astype(np.float64)
            difference = np.abs(actual[start : start + _ROW_BLOCK] - wanted)
            self.error += float((difference**2).sum())
            self.power += float((wanted**2).sum())
            # Python's max ignores a NaN that is not its first operand.
            self.max_abs = float(np.max([self.max_abs, difference.max()]))
            self.agreeing += int((actual[start : start + _ROW_BLOCK].argmax(-1) == wanted.argmax(-1)).sum())
            self.rows += len(wanted)
            self.values += wanted.size
        return self

    def check(self, function: str, case: str, bounds: Bounds) -> Check:
        relative = self.max_abs / float(np.sqrt(self.power / self.values)) if self.power else self.max_abs
        # NaN compares false.
        passed = self.nmse <= bounds.nmse and relative <= bounds.max_abs
        return Check(function, case, self.max_abs, relative, self.nmse, self.agreeing / self.rows, passed)
