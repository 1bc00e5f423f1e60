"""Whole calls decide: records that win alone may lose in the model, where kernels follow each other and share caches.

A model is built with the records of before and with the new ones, and both take turns. While a call is slower with the
new records, the record with the smallest gain of those that it uses is withdrawn, and the call is measured again.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import relax

from tvm_attn.benchmark.ours import CompiledGpuSystem, CompiledSystem
from tvm_attn.benchmark.system import Case
from tvm_attn.config import GPT2Config
from tvm_attn.model.module import Program
from tvm_attn.schedule import Record
from tvm_attn.tuning.measurements import geometric_mean

_LEAST_ROUNDS, _MOST_ROUNDS = 6, 40
_ROUND_SECONDS = 0.4
_PRECISION = 0.005
"""Rounds go on until the standard error of the ratio is below this, or there are too many of them."""
_NOISE = 0.015
"""A call is slower if its ratio is below 1 by more than this, and by more than two standard errors."""

_FUNCTIONS = {
    "prefill": {"prefill"},
    "decode one": {"decode_one", "step_one"},
    "decode more": {"decode_group", "decode", "step_group", "step"},
}


@dataclass(frozen=True)
class WholeCall:
    """A call of the model, with the records of before and with the new ones.

    Attributes:
        case: the call, e.g. "prefill 1023".
        before, after: tokens/s, medians.
        ratios: after / before of each round, at least two.
    """

    case: str
    before: float
    after: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Geometric mean of the ratios."""
        return geometric_mean(self.ratios)

    @property
    def error(self) -> float:
        """Standard error of the ratio, relative."""
        return statistics.stdev(map(math.log, self.ratios)) / math.sqrt(len(self.ratios))

    @property
    def is_slower(self) -> bool:
        """Whether it is slower beyond noise."""
        return math.log(self.ratio) < -max(_NOISE, 2 * self.error)


@dataclass(frozen=True)
class Verdict:
    """What whole calls say of new records.

    Attributes:
        calls: the calls with the records that stay.
        kept: records that stay.
        withdrawn: records with which a call was slower.
    """

    calls: tuple[WholeCall, ...]
    kept: tuple[Record, ...]
    withdrawn: tuple[Record, ...]


def cases_of(config: GPT2Config) -> list[Case]:
    """The calls that decide: prompts of several lengths, decode at two contexts, alone and in a batch of eight."""
    most = config.n_positions - 1
    lengths = sorted({min(length, most) for length in (16, 128, 512, 1023)})
    contexts = sorted({min(length, max(1, most - 24)) for length in (128, 1000)})
    return [
        *(Case("prefill", length) for length in lengths),
        *(Case("decode", context, batch) for batch in (1, 8) for context in contexts),
    ]


def uses(program: Program) -> dict[str, Counter[str]]:
    """How often each kernel of a program is called, by the kernel's name and the function that calls it."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in program.kernels}
    for variable, function in program.module.functions_items():
        if isinstance(function, relax.Function):

            def visit(expression: Any, name: str = variable.name_hint) -> None:
                if isinstance(expression, relax.Call) and expression.args:
                    called = getattr(expression.args[0], "name_hint", None)
                    if called in counts:
                        counts[called][name] += 1

            relax.analysis.post_order_visit(function, visit)
    return counts


def functions_of(case: Case) -> set[str]:
    """The functions that a call may use."""
    kind = "prefill" if case.phase == "prefill" else "decode one" if case.batch == 1 else "decode more"
    return _FUNCTIONS[kind]


class Systems:
    """The model with the records of before, and with new ones.

    Args:
        before: the artifact with the records of before.
        build: builds an artifact with records and returns its folder.
        device: the device, as `tvm_attn.load` takes it.
        threads: CPU threads.
    """

    def __init__(self, before: Path, build: Callable[[Sequence[Record]], Path], device: str, threads: int) -> None:
        self._build, self._device, self._threads = build, device, threads
        self._before = self._open(before)
        self._after = self._before

    def _open(self, folder: Path) -> CompiledSystem:
        kind = CompiledGpuSystem if self._device.startswith("cuda") else CompiledSystem
        return kind(folder, self._threads, 8, self._device)

    def use(self, records: Sequence[Record]) -> None:
        """Builds the model with these records."""
        self._after = self._open(self._build(records))

    def measure(self, case: Case) -> WholeCall:
        """Measures a call with both, in turns."""
        systems = (self._before, self._after)
        if case.phase == "decode":
            for system in systems:
                system.fill(case)
        rounds: list[tuple[float, ...]] = []
        while True:
            order = systems if len(rounds) % 2 else systems[::-1]
            seconds = {id(system): statistics.median(system.time(case, _ROUND_SECONDS)) for system in order}
            rounds.append(tuple(case.tokens_per_call / seconds[id(system)] for system in systems))
            if len(rounds) >= _LEAST_ROUNDS:
                before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
                call = WholeCall(str(case), before, after, tuple(new / old for old, new in rounds))
                if call.error < _PRECISION or len(rounds) >= _MOST_ROUNDS:
                    return call


def judge(
    systems: Any,
    cases: Sequence[Case],
    records: Sequence[Record],
    gains: Mapping[tuple[str, int, str], float],
    functions: Mapping[tuple[str, int, str], set[str]],
    progress: Callable[[str, float], None] = lambda message, share: None,
) -> Verdict:
    """Withdraws records until no whole call is slower beyond noise.

    Args:
        systems: builds and measures, see `Systems`.
        cases: the calls.
        records: the new records.
        gains: how much faster than before each kernel is alone, by the record's key.
        functions: the functions that call each kernel, by the record's key.
        progress: called with a description of each step, and the share that is done.
    """
    kept, withdrawn = list(records), list[Record]()
    calls: dict[Case, WholeCall] = {}
    left = list(cases)
    while kept:
        progress(f"building with {len(kept)} records", 0.0)
        systems.use(kept)
        for number, case in enumerate(left):
            progress(f"whole calls: {case}", number / len(left))
            calls[case] = systems.measure(case)
        slower = [case for case in left if calls[case].is_slower]
        suspects = {
            record.key: record for case in slower for record in kept if functions[record.key] & functions_of(case)
        }
        if not suspects:
            break
        worst = min(suspects.values(), key=lambda record: gains[record.key])
        kept.remove(worst)
        withdrawn.append(worst)
        # Calls that do not use the kernel are what they were.
        left = [case for case in cases if functions[worst.key] & functions_of(case)]
    ordered = tuple(calls[case] for case in cases if case in calls) if kept else ()
    return Verdict(ordered, tuple(kept), tuple(withdrawn))
