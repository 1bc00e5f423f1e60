"""This machine: its instruction sets, and the cores that this process may use. Standard library only."""

from __future__ import annotations

import functools
import math
import os
import platform
import struct
import sys
from pathlib import Path

from tvm_attn.errors import DeviceError
from tvm_attn.numbers import integer

_MOST_THREADS = 1 << 16  # more than any machine has


def platform_name() -> str:
    """Operating system and architecture that a library is built for, e.g. "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine()}"


@functools.cache
def cpu_features() -> frozenset[str]:
    """The CPU's instruction sets, as Linux names them in /proc/cpuinfo; empty on other systems."""
    if platform.machine() == "aarch64" and (found := _arm_features()):
        return found
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    # x86 has "flags", Arm has "Features"; every core repeats the line.
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


# Bits of AT_HWCAP and AT_HWCAP2 in Linux's <uapi/asm/hwcap.h> for arm64, those that a target may ask for.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_HWCAP = {
    0: "fp",
    1: "asimd",
    3: "aes",
    7: "crc32",
    8: "atomics",
    9: "fphp",
    10: "asimdhp",
    12: "asimdrdm",
    13: "jscvt",
}
_HWCAP |= {14: "fcma", 15: "lrcpc", 20: "asimddp", 22: "sve", 23: "asimdfhm"}
_HWCAP2 = {1: "sve2", 9: "svei8mm", 12: "svebf16", 13: "i8mm", 14: "bf16"}


def _arm_features(vector: Path = Path("/proc/self/auxv")) -> frozenset[str]:
    """A 64-bit Arm processor's instruction sets, from what the kernel tells every process, see getauxval(3).

    An emulator such as qemu-user answers for the processor that it emulates, but shows the host's /proc/cpuinfo.
    """
    try:
        content = vector.read_bytes()
    except OSError:
        return frozenset()
    entries = dict(struct.iter_unpack("<QQ", content[: len(content) // 16 * 16]))
    names = [(_AT_HWCAP, _HWCAP), (_AT_HWCAP2, _HWCAP2)]
    return frozenset(name for tag, bits in names for bit, name in bits.items() if entries.get(tag, 0) >> bit & 1)


def usable_cores(cgroup_root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self")) -> int:
    """The number of cores this process may use: its affinity mask, limited by its container's CPU quota, rounded up.

    Follows Linux's documentation of control groups: `cpu.max` (version 2) of the process's own group and of every group
    above it, or `cpu.cfs_quota_us` and `cpu.cfs_period_us` (version 1).
    """
    return max(1, min([_affinity(), *_quotas(cgroup_root, process)]))


def _affinity() -> int:
    """The cores of this thread's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path, process: Path) -> list[int]:
    try:
        # A group's name is bytes, like any file name.
        groups = os.fsdecode((process / "cgroup").read_bytes()).splitlines()
    except OSError:
        return []
    quotas = []
    for line in groups:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        group = base / path.lstrip("/")
        # In a container the path may be the host's; the container's own group is then mounted at the root.
        for folder in [group, *group.parents]:
            if base in (folder, *folder.parents):
                quotas += _read_quota(folder)
    return quotas


def _read_quota(folder: Path) -> list[int]:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
        return [] if quota.strip() in ("max", "-1") else [math.ceil(int(quota) / int(period))]
    except (OSError, ValueError, ZeroDivisionError):
        return []


def thread_count(threads: int | None = None) -> int:
    """The number of threads that compute a call, at most one a core: `threads`, else TVM_NUM_THREADS, else all cores
    that the process may use.

    Raises:
        DeviceError: `threads`, or TVM_NUM_THREADS, is not an integer from 1 to 65536.
    """
    name = "threads"
    if threads is None:
        name, given = "TVM_NUM_THREADS", os.environ.get("TVM_NUM_THREADS", "")
        if not given:
            return usable_cores()
        threads = int(given) if given.isdecimal() and len(given) < 10 else given  # type: ignore[assignment]
    return min(integer(name, threads, 1, _MOST_THREADS, DeviceError), _affinity())
