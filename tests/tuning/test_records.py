"""Record files: what a search writes, the compiler reads; the newer of two stays."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tvm_attn import _resources, targets
from tvm_attn._resources import resource_dir
from tvm_attn.config import PRESETS
from tvm_attn.errors import ScheduleError, TuningError
from tvm_attn.kernels import Linear
from tvm_attn.kernels.base import shape_of
from tvm_attn.schedule import Record, RecordBook, template_for
from tvm_attn.schedule.records import user_folder
from tvm_attn.targets import Peak
from tvm_attn.tuning import tune
from tvm_attn.tuning.records import merge, records_folder, to_record
from tvm_attn.tuning.space import Space
from tvm_attn.tuning.tune import Job

KERNEL = Linear(32, 64, 8, 32, "float32")
TARGET = targets.detect_cpu()
RECORD = Record("cpu.matmul", 2, shape_of(KERNEL), {"k_unroll": 2}, 10.0, 0.5, "0", "2026-01-01")


def test_a_written_record_is_found_by_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(RECORD, shape=shape_of(replace(KERNEL, in_features=64)))
    (file,) = merge(tmp_path / TARGET.name, [RECORD, other])
    assert file == tmp_path / TARGET.name / "cpu.matmul.jsonl"
    monkeypatch.setattr(_resources, "resource_dir", lambda name: {"schedules": tmp_path}.get(name, resource_dir(name)))
    assert RecordBook.load(TARGET).find(template_for(KERNEL, TARGET), KERNEL) == RECORD
    assert RecordBook.load(replace(TARGET, name="another")).find(template_for(KERNEL, TARGET), KERNEL) is None
    assert sorted(path.name for path in file.parent.iterdir()) == [".lock", file.name]


def test_the_newer_record_stays_and_others_are_kept(tmp_path: Path) -> None:
    """Times of two days do not compare: what was measured before is a candidate of the newer search."""
    other = replace(RECORD, version=3)
    merge(tmp_path, [RECORD, other])
    (file,) = merge(tmp_path, [replace(RECORD, time_us=11.0, decisions={"k_unroll": 4})])
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(record["version"], record["time_us"]) for record in kept] == [(2, 11.0), (3, 10.0)]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "cpu.matmul.jsonl").write_text("{}\n")
    with pytest.raises(ScheduleError, match=r"cpu\.matmul\.jsonl:1"):
        merge(tmp_path, [RECORD])
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match=r"cannot write"):
        merge(tmp_path / "file", [RECORD])


WRITER = """
import json, sys
from pathlib import Path
from tvm_attn.schedule import Record
from tvm_attn.tuning.records import merge
for number in range(40):
    shape = {"family": sys.argv[2], "size": number}
    merge(Path(sys.argv[1]), [Record("cpu.matmul", 2, shape, {"k_unroll": 2}, 1.0, None, "0", "2026-01-01")])
"""


def test_two_searches_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    searches = [subprocess.Popen([*command, name]) for name in ("first", "second")]
    assert [search.wait() for search in searches] == [0, 0]
    kept = [json.loads(line)["shape"] for line in (tmp_path / "cpu.matmul.jsonl").read_text().splitlines()]
    assert len(kept) == 80
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "cpu.matmul.jsonl"]


def test_a_search_finds_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "search", None)

    def search(out: Path) -> None:
        Job(PRESETS["gpt2"], TARGET.name, "float32", "none", ["pack_plain"], out).run(print, print)

    (tmp_path / TARGET.name).mkdir()
    (tmp_path / TARGET.name / "cpu.pack.jsonl").write_text(RECORD.to_line() + "\n{")
    with pytest.raises(ScheduleError, match=r"cpu\.pack\.jsonl:2 is not a tuned record"):
        search(tmp_path)
    with pytest.raises(TuningError, match=r"cannot write .*Not a directory; choose another --out"):
        search(tmp_path / TARGET.name / "cpu.pack.jsonl")
    with pytest.raises(TuningError, match=r"cannot write .*File name too long"):
        search(tmp_path / ("n" * 300))


def test_a_failed_write_keeps_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(tmp_path, [RECORD])
    before = (tmp_path / "cpu.matmul.jsonl").read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TuningError, match="No space left on device; choose another --out"):
        merge(tmp_path, [replace(RECORD, time_us=1.0)])
    assert (tmp_path / "cpu.matmul.jsonl").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "cpu.matmul.jsonl"]


def test_the_folder_of_records(tmp_path: Path) -> None:
    assert records_folder("there", "cpu-x") == Path("there/cpu-x")
    assert records_folder(None, "cpu-x") == user_folder() / "cpu-x"


def test_time_and_fraction_are_geometric_means() -> None:
    space = Space.of(KERNEL, replace(TARGET, peak=Peak(float32_gflops=1.0, memory_gbytes=1e9)))
    # 16, 128 and 1024 rows at 1 GFLOP/s take 66, 524 and 4194 us.
    record = to_record(space, {"k_unroll": 2}, (2e-4, 1e-3, 5e-3))
    assert record.time_us == pytest.approx((2e2 * 1e3 * 5e3) ** (1 / 3), rel=1e-3)
    assert record.fraction_of_peak == pytest.approx((0.32768 * 0.524288 * 4.194304 / 5) ** (1 / 3), abs=1e-3)
    assert record.decisions == {"k_unroll": 2}
    unknown = Space.of(KERNEL, replace(TARGET, peak=None))
    assert to_record(unknown, {}, (2e-4, 1e-3, 5e-3)).fraction_of_peak is None
