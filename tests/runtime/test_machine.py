"""The cores that a process may use, with made-up control groups, and the threads that TVM runs."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_attn.errors import DeviceError
from tvm_attn.runtime import machine
from tvm_attn.runtime.machine import cpu_features, platform_name, thread_count, usable_cores

CORES = 64


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(CORES)), raising=False)


def cores(tmp_path: Path, groups: str | bytes | None, files: dict[str, str | bytes]) -> int:
    """`usable_cores` of a process in these groups (/proc/self/cgroup), with these files under /sys/fs/cgroup."""
    process, root = tmp_path / "proc", tmp_path / "cgroup"
    process.mkdir()
    root.mkdir()
    if groups is not None:
        (process / "cgroup").write_bytes(groups if isinstance(groups, bytes) else groups.encode())
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return usable_cores(root, process)


V2 = "0::/machine/pod\n"
V1 = "11:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, CORES),
        ({"machine/pod/cpu.max": "400000 100000\n"}, 4),
        ({"machine/pod/cpu.max": "350000 100000\n"}, 4),  # rounded up
        ({"machine/pod/cpu.max": "301000 100000\n"}, 4),
        ({"machine/pod/cpu.max": "10000 100000\n"}, 1),
        ({"machine/pod/cpu.max": "90000 30000\n"}, 3),
        ({"machine/pod/cpu.max": "max 100000\n"}, CORES),
        ({"machine/pod/cpu.max": "99999900000 100000\n"}, CORES),
        # Every group above also limits, and "max" in one does not lift another's limit.
        ({"machine/pod/cpu.max": "400000 100000\n", "machine/cpu.max": "200000 100000\n"}, 2),
        ({"machine/pod/cpu.max": "max 100000\n", "machine/cpu.max": "200000 100000\n"}, 2),
        ({"machine/pod/cpu.max": "200000 100000\n", "machine/cpu.max": "max 100000\n"}, 2),
        ({"machine/cpu.max": "800000 100000\n", "cpu.max": "500000 100000\n"}, 5),
        # In a container the path is the host's, and the container's own group is at the root.
        ({"cpu.max": "300000 100000\n"}, 3),
        # Neither another group's limit nor one further down counts.
        ({"other/cpu.max": "100000 100000\n", "machine/pod/inner/cpu.max": "100000 100000\n"}, CORES),
        # Version 1's folder means nothing to a process in version 2's hierarchy.
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
    ],
)
def test_version_2(tmp_path: Path, files: dict[str, str | bytes], expected: int) -> None:
    assert cores(tmp_path, V2, files) == expected


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, CORES),
        ({"cpu/docker/x": (250000, 100000)}, 3),
        ({"cpu/docker/x": (-1, 100000)}, CORES),
        ({"cpu/docker/x": (-1, 100000), "cpu/docker": (200000, 100000)}, 2),
        ({"cpu/docker/x": (600000, 100000), "cpu": (500000, 100000)}, 5),
        ({"cpu": (100000, 50000)}, 2),
        ({"memory/docker/x": (100000, 100000)}, CORES),
    ],
)
def test_version_1(tmp_path: Path, quotas: dict[str, tuple[int, int]], expected: int) -> None:
    files: dict[str, str | bytes] = {}
    for folder, (quota, period) in quotas.items():
        files |= {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}
    assert cores(tmp_path, V1, files) == expected


def test_both_versions_at_once(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "cpu/docker/x/cpu.cfs_quota_us": "200000\n",
        "cpu/docker/x/cpu.cfs_period_us": "100000\n",
        "docker/x/cpu.max": "700000 100000\n",
    }
    assert cores(tmp_path, V1 + "0::/docker/x\n", files) == 2


@pytest.mark.parametrize(
    "content", ["", "\n", "max", "x y", "1 2 3", "100000 0", "100000 x", "1e5 100000", b"\xff\xfe", b"\0"]
)
def test_malformed_quota_is_no_limit(tmp_path: Path, content: str | bytes) -> None:
    assert cores(tmp_path, V2, {"machine/pod/cpu.max": content}) == CORES


@pytest.mark.parametrize("groups", [None, "", "\n", "x", ":", "::", "0", "0::", b"0::/\xff\xfe\n", b"\xff:\xff:\xff"])
def test_malformed_groups(tmp_path: Path, groups: str | bytes | None) -> None:
    assert cores(tmp_path, groups, {}) == CORES


def test_group_whose_name_is_not_utf8(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {os.fsdecode(b"caf\xe9/cpu.max"): "200000 100000\n"}
    assert cores(tmp_path, b"0::/caf\xe9\n", files) == 2


def test_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 9, 11}, raising=False)
    assert cores(tmp_path, V2, {"machine/pod/cpu.max": "800000 100000\n"}) == 3


def test_system_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 1


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert platform_name() == f"{sys.platform}-{os.uname().machine}"
    if platform_name() == "linux-x86_64":
        assert {"fpu", "sse2", "lm"} <= cpu_features()


@pytest.mark.parametrize(
    "threads", [0, -1, -(10**9), 1.5, "2", True, 2**16 + 1, 2**70, pytest.param(10**5000, id="huge"), np.array([2])]
)
def test_number_of_threads_out_of_range(threads: Any) -> None:
    with pytest.raises(DeviceError, match=r"^threads is .*; it must be an integer from 1 to 65536$") as caught:
        thread_count(threads)
    assert len(str(caught.value)) < 200


def test_number_of_threads_is_one_a_core_at_most() -> None:
    assert [thread_count(threads) for threads in (1, np.uint8(3), CORES, CORES + 1, 2**16)] == [1, 3, *[CORES] * 3]


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", " ", "²", "0x2", pytest.param("9" * 5000, id="huge")])
def test_malformed_environment_variable(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", given)
    with pytest.raises(DeviceError, match=r"^TVM_NUM_THREADS is .*; it must be an integer from 1 to 65536$"):
        thread_count(None)


# Prints how many threads computed something for each model.
BUSY_THREADS = """
import json, os, sys, threading, time
import tvm_attn
# A thread of the runtime makes the calls; who asks for them waits.

def user_ticks():
    ticks = {}
    for task in set(os.listdir("/proc/self/task")) - {str(os.getpid()), str(threading.get_native_id())}:
        with open(f"/proc/self/task/{task}/stat") as file:
            ticks[task] = int(file.read().rpartition(")")[2].split()[11])  # utime; a thread that waits has system time
    return ticks

def run(model):
    ids = [list(range(model.config.n_positions))]
    model.logits(ids)
    before, spent, deadline = user_ticks(), {}, time.monotonic() + 60
    # A busy machine may give the helpers little, and a wrong number is seen once the caller has worked for a while.
    while max(spent.values(), default=0) < 30 or (len(spent) < model.engine._threads and time.monotonic() < deadline):
        model.logits(ids)
        spent = {task: ticks - before.get(task, 0) for task, ticks in user_ticks().items()}
        spent = {task: ticks for task, ticks in spent.items() if ticks >= 6}
    counts.append(len(spent))

counts = []
models = [tvm_attn.load(sys.argv[1], threads=threads) for threads in json.loads(sys.argv[2])]
for model in models:
    thread = threading.Thread(target=run, args=[model])
    thread.start()
    thread.join()
print(json.dumps(counts))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("given", "variable", "wanted"),
    [
        ([1], "2", [1]),
        ([2], "1", [2]),
        ([None], "1", [1]),
        ([None], None, None),
        ([10_000], None, None),
        ([2, 1, 2], None, [2, 1, 2]),
    ],
)
def test_threads_that_work(
    demo_artifact: Path,
    given: list[int | None],
    variable: str | None,
    wanted: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    if wanted is None:
        wanted = [len(os.sched_getaffinity(0)) if given[0] else usable_cores()]
    if max(wanted) > usable_cores():
        pytest.skip("needs more cores")
    environment = {name: value for name, value in os.environ.items() if name != "TVM_NUM_THREADS"}
    environment |= {"TVM_USE_RUNTIME_LIB": "1"} | ({"TVM_NUM_THREADS": variable} if variable else {})
    command = [sys.executable, "-c", BUSY_THREADS, str(demo_artifact), json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


def test_features_of_an_arm_processor(tmp_path: Path) -> None:
    """Made-up auxiliary vectors; the bits are those of Linux's <asm/hwcap.h>."""
    file = tmp_path / "auxv"

    def features(*entries: tuple[int, int]) -> set[str]:
        file.write_bytes(b"".join(struct.pack("<QQ", *entry) for entry in (*entries, (0, 0))))
        return set(machine._arm_features(file))

    assert features((6, 4096)) == set()
    assert features((16, 0b11)) == {"fp", "asimd"}
    # What a Cortex-A76 tells, Armv8.2 with dot products.
    assert {"asimd", "asimdhp", "asimddp", "fphp"} <= features((16, 0x107FFF), (26, 0))
    assert features((16, 1 << 1), (26, 1 << 13 | 1 << 14)) == {"asimd", "i8mm", "bf16"}
    file.write_bytes(b"short")
    assert machine._arm_features(file) == frozenset()
    assert machine._arm_features(tmp_path / "missing") == frozenset()
