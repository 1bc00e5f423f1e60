"""The search of a kernel: which candidates, how it ends, and what becomes of candidates that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.conftest import FAKES, LINEAR, TARGET, Fake
from tvm_attn.errors import TuningError
from tvm_attn.targets import Peak
from tvm_attn.tuning import search as search_module
from tvm_attn.tuning import tuner
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.search import Place


def test_every_candidate_is_measured_once_and_the_best_ones_again(fake: Fake) -> None:
    seen: list[Any] = []
    tuned = fake.search(seen.append)
    (found,) = tuned.found
    assert found.record.decisions == {"prefetch_bytes": 0, "k_unroll": 1}
    assert (found.measured, found.failed, found.late) == (20, 0, 0)
    counts = {json.dumps(entry): fake.measured.count(entry) for entry in fake.measured}
    assert sorted(counts.values())[:16] == [1] * 16
    assert set(counts.values()) == {1, 3}
    assert seen[-1].done == seen[-1].total
    assert found.record.time_us == pytest.approx(1e3 * (1 + 1 / 16), rel=1e-3)
    assert found.speedup is not None
    assert found.speedup > 1


def test_the_same_search_measures_nothing_again(fake: Fake) -> None:
    first = fake.search()
    count, lines = len(fake.measured), fake.lines
    assert fake.search().found == first.found
    assert len(fake.measured) == count
    assert fake.lines == lines


def test_a_larger_search_goes_on(fake: Fake) -> None:
    fake.search(trials=3)
    before = {json.dumps(entry) for entry in fake.measured}
    assert len(before) == 3
    fake.search(trials=20)
    once = [entry for entry in fake.measured if json.dumps(entry) not in before]
    assert len({json.dumps(entry) for entry in once}) == 17


def test_it_ends_near_the_limit(fake: Fake) -> None:
    (call,) = calls_of(LINEAR)
    default = fake.search(trials=1).found[0].record
    # Memory at such a speed that the defaults are at the limit.
    peak = Peak(1e9, call.bytes / (default.time_us / 1e6) / 1e9)
    fake.work = fake.work.with_name("other")
    fake.target = replace(TARGET, peak=peak)  # type: ignore[assignment]
    assert fake.search().found[0].measured < 8


def test_it_ends_when_nothing_improves(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_PATIENCE", 3)
    assert fake.search(trials=12).found[0].measured < 12


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("crash", "ended the process with SIGSEGV"),
        ("spin", "took more than"),
        ("memory", "emory"),
        ("wrong", "disagrees with the float64 reference"),
        ("refuse", "compiling: that end with the reason"),
        ("spin-building", "compiling: took more than"),
    ],
)
def test_a_candidate_that_fails_is_recorded_and_the_search_goes_on(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    monkeypatch.setenv("FAULTS", f"k_unroll=1:{fault}")
    (found,) = fake.search(trials=8 if "spin" in fault or fault == "memory" else 20).found
    errors = [line["error"] for line in fake.lines if "error" in line]
    assert errors
    assert all(reason in error for error in errors)
    assert found.failed == len(errors)
    assert found.record.decisions["k_unroll"] != 1


def test_a_limit_of_time_is_no_result_on_a_busy_machine(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS", "k_unroll=8:sleep")
    monkeypatch.setattr(search_module.Worker.send, "__defaults__", (1.0,))
    monkeypatch.setattr(search_module.Load, "since", lambda _: 1.5)
    (found,) = fake.search(trials=8).found
    assert found.late >= 1
    assert not any("error" in line for line in fake.lines)
    # When the machine is calm again, the same command tries them.
    monkeypatch.setenv("FAULTS", "")
    (found,) = fake.search(trials=20).found
    assert found.late == 0
    assert found.measured == 20


def test_a_candidate_that_hangs_on_a_calm_machine_has_failed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS", "k_unroll=8:sleep")
    monkeypatch.setattr(search_module.Worker.send, "__defaults__", (1.0,))
    monkeypatch.setattr(search_module.Load, "since", lambda _: 0.0)
    (found,) = fake.search(trials=8).found
    assert (found.failed, found.late) == (sum("error" in line for line in fake.lines), 0)
    assert found.failed >= 1


def test_a_busy_machine_is_measured_again_when_it_is_calm(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOAD", "1.2")
    assert fake.search().found[0].load == 1.2
    count = len(fake.measured)
    monkeypatch.setenv("LOAD", "0.1")
    assert fake.search().found[0].load == 0.1
    # Only the best ones and the defaults.
    assert count < len(fake.measured) <= count + 8
    count = len(fake.measured)
    assert fake.search().found[0].load == 0.1
    assert len(fake.measured) == count


def test_a_full_disk_ends_the_search_in_one_line(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS", "k_unroll=2:full")
    with pytest.raises(TuningError, match="No space left on device: free some space; the same command"):
        fake.search()
    assert all("error" not in line for line in fake.lines)
    monkeypatch.setenv("FAULTS", "")
    again = fake.search().found[0]
    assert again.measured == 20, [line for line in fake.lines if "error" in line]


def test_nothing_can_be_measured(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS", "unreachable")
    with pytest.raises(TuningError, match=r"cannot measure linear.*no route to the device"):
        fake.search()
    monkeypatch.setenv("FAULTS", ",".join(f"k_unroll={value}:refuse" for value in (1, 2, 4, 8)))
    with pytest.raises(TuningError, match="no candidate could be measured: compiling: that end with the reason"):
        fake.search()


def test_a_device_that_dies_is_survived(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind RPC, a candidate on which a device was lost is tried again before it is blamed."""
    fake.place = Place("cpu", "boards", False, 2, ("127.0.0.1:1", "board"), 2)
    monkeypatch.setenv("FAULTS", "k_unroll=4:crash")
    (found,) = fake.search(trials=20).found
    tries = [entry for entry in fake.measured if entry["k_unroll"] == 4]
    assert found.failed == 5
    assert len(tries) == 10


def test_workers_and_files_go_when_it_ends(fake: Fake) -> None:
    fake.search(trials=2)
    assert not (fake.work / "libraries").exists()
    assert subprocess.run(["pgrep", "-f", str(FAKES)], capture_output=True, check=False).returncode == 1


_COMMAND = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.tuning.conftest import Fake
print("started", flush=True)
tuned = Fake(Path(sys.argv[1]), Path(os.environ["MEASURED"])).search()
print("interrupted" if tuned.interrupted else "done", flush=True)
"""


def _wait_for(condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_ended_at_any_moment(fake: Fake, monkeypatch: pytest.MonkeyPatch, signal_: signal.Signals) -> None:
    """Only what was in flight is lost; no worker stays; the same command goes on."""
    monkeypatch.setenv("SLEEP", "0.2")
    command = [sys.executable, "-c", _COMMAND, str(fake.work)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    _wait_for(lambda: len(fake.measured) >= 4)
    process.send_signal(signal_)
    out, _ = process.communicate(timeout=60)
    assert ("interrupted" in out) == (signal_ == signal.SIGINT)
    _wait_for(lambda: subprocess.run(["pgrep", "-f", str(FAKES)], capture_output=True, check=False).returncode == 1)
    stored = [line["decisions"] for line in fake.lines]
    assert len(stored) >= len(fake.measured) - 1
    count = len(fake.measured)
    monkeypatch.setenv("SLEEP", "0")
    again = fake.search().found[0]
    assert again.measured == 20, [line for line in fake.lines if "error" in line]
    twice = [entry for entry in fake.measured[count:] if entry in stored]
    assert len(twice) <= 8  # the finalists


def test_two_searches_in_one_folder(fake: Fake) -> None:
    with tuner._locked(fake.work), pytest.raises(TuningError, match="another search is using"):
        fake.search()


def test_a_work_folder_that_cannot_be_used(fake: Fake) -> None:
    fake.work.write_text("a file")
    with pytest.raises(TuningError, match="cannot use"):
        fake.search()


def test_minutes(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "0.3")
    tuned = fake.search(minutes=0.02)
    assert tuned.found[0].measured < 20
    assert "finished" not in fake.lines[-1]
    assert os.environ["SLEEP"] == "0.3"
