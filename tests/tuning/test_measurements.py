"""The file of measurements: what is read, what is left out, what cannot be written."""

import json
import os
from pathlib import Path

import pytest

from tvm_attn.errors import TuningError
from tvm_attn.tuning.measurements import FILE, Measurement, Measurements, key_of, shares

GOOD = Measurement({"a": 1}, (1e-3, 2e-3), 0.1)


def test_what_is_added_is_read_again(tmp_path: Path) -> None:
    log = Measurements(tmp_path)
    log.add("w", "linear", GOOD)
    log.add("w", "linear", Measurement({"a": 2}, None, error="crashed"))
    log.finish("w", "linear", 8)
    again = Measurements(tmp_path)
    assert again.known("w") == log.known("w")
    assert again.known("w")[key_of({"a": 2})].error == "crashed"
    assert (again.finished("w"), again.finished("other"), again.foreign) == (8, 0, 0)
    assert again.known("other") == {}


def test_of_two_measurements_the_shorter_times_count_and_a_failure_stays(tmp_path: Path) -> None:
    log = Measurements(tmp_path)
    log.add("w", "linear", GOOD)
    merged = log.add("w", "linear", Measurement({"a": 1}, (2e-3, 1e-3), 0.5))
    assert merged == Measurement({"a": 1}, (1e-3, 1e-3), 0.1)
    log.add("w", "linear", Measurement({"a": 1}, None, error="wrong"))
    assert log.add("w", "linear", GOOD).seconds is None


@pytest.mark.parametrize(
    "line",
    [
        '{"workload": "w", "kernel": "linear", "decisions": {"a": 1}, "secon',
        "no JSON",
        "[]",
        "[" * 100_000,
        '{"workload": "w", "kernel": "k", "decisions": {"a": 1.5}, "seconds": [1.0], "load": null}',
        '{"workload": "w", "kernel": "k", "decisions": {"a": 1}, "seconds": [], "load": null}',
        '{"workload": "w", "kernel": "k", "decisions": {"a": 1}, "seconds": [-1.0], "load": null}',
        '{"workload": "w", "kernel": "k", "decisions": {"a": 1}, "seconds": [1.0], "load": -2}',
        '{"workload": "w", "kernel": "k", "finished": 0}',
        '{"workload": 7, "kernel": "k", "finished": 1}',
    ],
)
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_that_is_no_measurement_is_left_out_and_kept(tmp_path: Path, line: str, end: str) -> None:
    Measurements(tmp_path).add("w", "linear", GOOD)
    with (tmp_path / FILE).open("a") as file:
        file.write(line + end)
    log = Measurements(tmp_path)
    assert log.foreign == 1
    assert list(log.known("w").values()) == [GOOD]
    log.add("w", "linear", Measurement({"a": 9}, (1.0,), None))
    again = Measurements(tmp_path)
    assert len(again.known("w")) == 2
    assert line in (tmp_path / FILE).read_text()
    assert json.loads((tmp_path / FILE).read_text().splitlines()[-1])["decisions"] == {"a": 9}


def test_what_cannot_be_written_or_read_is_an_error(tmp_path: Path) -> None:
    log = Measurements(tmp_path)
    os.symlink("/dev/full", tmp_path / FILE)
    with pytest.raises(TuningError, match="No space left on device; what was measured before is kept"):
        log.add("w", "linear", GOOD)
    with pytest.raises(TuningError, match="cannot be read"):
        Measurements(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(TuningError, match="not UTF-8"):
        Measurements(tmp_path)


def test_shares_of_the_limit() -> None:
    assert shares([1.0, 4.0], (2.0, 8.0)) == pytest.approx(0.5)
    assert shares([1.0, None], (2.0, 8.0)) is None
