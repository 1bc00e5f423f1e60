"""A description of the machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

import tvm_attn
from tvm_attn.runtime.machine import platform_name, usable_cores


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, cores, cache, memory, operating system, threads used, and the load before the measurements."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": threads,
        "cache_bytes": cache_bytes(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "platform": platform_name(),
        "kernel": platform.release(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Bytes of the last-level caches of the cores that this process may use; None if Linux does not say."""
    caches: dict[str, int] = {}
    try:
        for core in os.sched_getaffinity(0):
            levels = {(path / "level").read_text(): path for path in (root / f"cpu{core}" / "cache").glob("index*")}
            last = levels[max(levels)]
            # Cores that share a cache list the same cores.
            caches[(last / "shared_cpu_list").read_text()] = _bytes((last / "size").read_text().strip())
    except (OSError, ValueError):  # also if no cache level is listed
        return None
    return sum(caches.values())


def _bytes(size: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(size[:-1]) * units[size[-1]] if size[-1:] in units else int(size)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """Versions of the software that our model runs on; peers report their own."""
    import tvm
    import tvm_ffi

    return {
        "python": platform.python_version(),
        "tvm_attn": tvm_attn.__version__,
        "tvm": tvm.__version__,
        "tvm_ffi": tvm_ffi.__version__,
        "numpy": np.__version__,
    }
