"""What a benchmark ran on, in words and numbers."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

import tvm_attn
from tvm_attn.runtime.machine import platform_name, usable_cores


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, cores, memory, operating system, threads used, and the load before anything was measured."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "platform": platform_name(),
        "kernel": platform.release(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


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
    """Versions of what computes here; peers report their own."""
    import tvm
    import tvm_ffi

    return {
        "python": platform.python_version(),
        "tvm_attn": tvm_attn.__version__,
        "tvm": tvm.__version__,
        "tvm_ffi": tvm_ffi.__version__,
        "numpy": np.__version__,
    }
