"""How busy other programs keep the cores that this process may use, by Linux's `/proc/stat`."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Load:
    """The cores that other processes use from now on."""

    def __init__(self) -> None:
        self._start = _read()

    def since(self) -> float | None:
        """Their mean number since then; None if the system does not say."""
        if self._start is None or (end := _read()) is None:
            return None
        wall, busy, own = (after - before for after, before in zip(end, self._start, strict=True))
        return round(max(0.0, busy - own) / wall, 2) if wall > 0 else None


def _read() -> tuple[float, float, float] | None:
    """Seconds of the clock, of the cores together, and of this process."""
    try:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines()]
    except (OSError, AttributeError):
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user
    busy = sum(int(value) for name, *times in lines if name in cores for value in (*times[:3], *times[5:8]))
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()
