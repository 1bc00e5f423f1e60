"""Searches with workers that compile and measure nothing."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tvm_attn import targets
from tvm_attn.kernels import Linear
from tvm_attn.targets import CpuTarget
from tvm_attn.tuning.search import Place
from tvm_attn.tuning.space import Space
from tvm_attn.tuning.tuner import Options, Progress, Task, Tuned, search

FAKES = Path(__file__).with_name("fakes")
TARGET = replace(targets.read("cpu-x86-64-v3"), peak=None)
LINEAR = Linear(64, 32, 1, 16, "float32", groups=1)
"""Its choices are prefetch_bytes (5 values) and k_unroll (4)."""
PLACE = Place("cpu", "a processor", True, 2)


@dataclass
class Fake:
    """A search of one kernel in a work folder, see `fakes/`."""

    work: Path
    measured_file: Path
    target: CpuTarget = TARGET  # type: ignore[assignment]
    place: Place = PLACE

    def search(self, progress: Callable[[Progress], None] = lambda progress: None, **options: Any) -> Tuned:
        fakes = Options(builder=str(FAKES / "builder.py"), runner=str(FAKES / "runner.py"))
        task = Task(Space.of(LINEAR, self.target), 1.0)
        return search([task], self.target, self.target.name, self.place, self.work, replace(fakes, **options), progress)

    @property
    def measured(self) -> list[dict[str, int]]:
        """The decisions of every measurement so far."""
        if not self.measured_file.exists():
            return []
        return [json.loads(line) for line in self.measured_file.read_text().splitlines()]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of the file of measurements."""
        return [json.loads(line) for line in (self.work / "measurements.jsonl").read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    for name in ("FAULTS", "SLEEP", "LOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEASURED", str(tmp_path / "measured"))
    yield Fake(tmp_path / "work", tmp_path / "measured")
