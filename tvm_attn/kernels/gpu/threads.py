"""What the loops and templates for GPUs share."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from tvm_attn.kernels.template import Chooser
from tvm_attn.targets import GpuTarget

PARTIALS = 16
"""Threads that reduce a vector in shared memory to one value each; one thread or every thread then reads those."""


def elementwise(schedule: s_tir.Schedule, block: Any, target: GpuTarget, choose: Chooser, lanes: int = 1) -> None:
    """One thread per `lanes` neighbouring elements of the last dimension."""
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    *outer, last = schedule.get_loops(block)
    last, lane = schedule.split(last, [None, lanes])
    block_x, thread = schedule.split(schedule.fuse(*outer, last), [None, threads])
    schedule.bind(block_x, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    if lanes > 1:
        schedule.vectorize(lane)
