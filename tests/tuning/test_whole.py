"""Whole calls decide which records stay."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tvm_attn import targets
from tvm_attn.benchmark.system import Case
from tvm_attn.compiler.devices import layout_for
from tvm_attn.config import PRESETS
from tvm_attn.model.gpt2 import build_program
from tvm_attn.schedule import Record
from tvm_attn.tuning.whole import Systems, WholeCall, cases_of, functions_of, judge, uses

CASES = [Case("prefill", 128), Case("decode", 128), Case("decode", 128, 8)]


def record(name: str) -> Record:
    return Record(name, 1, {"family": name}, {"a": 1}, 1.0, None, "0", "2026-01-01")


class FakeSystems:
    """A model in which some records slow down calls of some functions."""

    def __init__(self, slow: dict[str, set[str]]) -> None:
        self._slow = slow
        self.built: list[list[str]] = []

    def use(self, records: Sequence[Record]) -> None:
        self.built.append([entry.template for entry in records])

    def measure(self, case: Case) -> WholeCall:
        slow = any(self._slow.get(name, set()) & functions_of(case) for name in self.built[-1])
        ratio = 0.9 if slow else 1.1
        return WholeCall(str(case), 100.0, 100 * ratio, (ratio,) * 6)


RECORDS = [record("prefill"), record("one"), record("both")]
FUNCTIONS = {
    RECORDS[0].key: {"prefill"},
    RECORDS[1].key: {"decode_one"},
    RECORDS[2].key: {"decode_one", "prefill"},
}
GAINS = {RECORDS[0].key: 1.5, RECORDS[1].key: 1.2, RECORDS[2].key: 1.3}


def test_records_stay_if_no_call_is_slower() -> None:
    systems = FakeSystems({})
    verdict = judge(systems, CASES, RECORDS, GAINS, FUNCTIONS)
    assert list(verdict.kept) == RECORDS
    assert verdict.withdrawn == ()
    assert [call.case for call in verdict.calls] == [str(case) for case in CASES]
    assert len(systems.built) == 1


def test_the_record_that_slows_a_call_goes() -> None:
    systems = FakeSystems({"both": {"decode_one"}})
    verdict = judge(systems, CASES, RECORDS, GAINS, FUNCTIONS)
    # The smallest gain goes first, then the guilty one.
    assert [entry.template for entry in verdict.withdrawn] == ["one", "both"]
    assert [entry.template for entry in verdict.kept] == ["prefill"]
    assert not any(call.is_slower for call in verdict.calls)
    assert systems.built[-1] == ["prefill"]


def test_a_slow_call_that_no_record_is_used_in_is_noise() -> None:
    class Noisy(FakeSystems):
        def measure(self, case: Case) -> WholeCall:
            slow = case.batch == 8
            return WholeCall(str(case), 100.0, 90.0 if slow else 101.0, (0.9 if slow else 1.01,) * 6)

    assert len(judge(Noisy({}), CASES, RECORDS, GAINS, FUNCTIONS).kept) == 3


def test_nothing_stays() -> None:
    systems = FakeSystems({"one": {"decode_one"}})
    verdict = judge(systems, CASES, [RECORDS[1]], GAINS, FUNCTIONS)
    assert (verdict.kept, verdict.calls) == ((), ())


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ((0.9,) * 6, True),
        ((0.9,) * 5 + (1.1,), True),
        ((0.9,) * 4 + (1.1,) * 2, False),
        ((0.99,) * 6, False),
        ((1.1,) * 6, False),
    ],
)
def test_slower_beyond_noise(ratios: tuple[float, ...], slower: bool) -> None:
    assert WholeCall("decode 1", 1.0, 1.0, ratios).is_slower == slower


@pytest.mark.parametrize("target", ["cpu-x86-64-v3", "vulkan-generic", "cuda-sm90"])
def test_every_kernel_is_used_by_a_function(target: str) -> None:
    resolved = targets.read(target)
    dtype = "float16" if resolved.device == "cuda" else "float32"
    config = replace(PRESETS["gpt2"], n_layer=3)
    program = build_program(config, layout_for(config, resolved, dtype, "none"))
    counts = uses(program)
    assert set(counts) == set(program.kernels)
    assert all(counts.values())
    linear = [name for name, kernel in program.kernels.items() if kernel.family == "linear"]
    # The last layer computes one row of a prompt: the kernel is called in each of the other layers, and then for it.
    assert any(counts[name]["prefill"] >= 2 for name in linear)
    names = {name for found in counts.values() for name in found}
    for case in cases_of(config):
        assert functions_of(case) & names


def test_cases_fit_small_models() -> None:
    for positions in (2, 16, 1024):
        cases = cases_of(replace(PRESETS["gpt2"], n_positions=positions))
        assert cases
        assert all(1 <= case.tokens < positions for case in cases)


class FakeModel:
    """A model whose calls take given times in turn."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self.calls = seconds, 0

    def fill(self, case: Case) -> None:
        pass

    def time(self, case: Case, seconds: float) -> list[float]:
        self.calls += 1
        return [self._seconds[self.calls % len(self._seconds)]]


@pytest.mark.parametrize(
    ("before", "after", "rounds", "slower"),
    [
        ((1.0,), (1.1,), 6, True),
        ((1.0,), (0.9,), 6, False),
        # Noise is measured until the end; it does not hide 10 %.
        ((1.0, 1.1), (1.0, 1.1, 1.1, 1.0), 40, False),
        ((1.0, 1.1), (1.15, 1.25, 1.25), 40, True),
    ],
)
def test_rounds_go_on_until_the_ratio_is_known(
    before: tuple[float, ...], after: tuple[float, ...], rounds: int, slower: bool
) -> None:
    systems = Systems.__new__(Systems)
    systems._before, systems._after = FakeModel(*before), FakeModel(*after)  # type: ignore[assignment]
    call = systems.measure(CASES[1])
    assert (len(call.ratios), call.is_slower) == (rounds, slower)
