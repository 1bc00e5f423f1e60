"""Lists the kernels that a model needs on a target, with the schedule of each."""

from __future__ import annotations

from pathlib import Path

from tvm_attn.compiler.devices import backend_for, layout_for
from tvm_attn.config import GPT2Config
from tvm_attn.model.gpt2 import build_program
from tvm_attn.model.layout import check_types
from tvm_attn.schedule import RecordBook
from tvm_attn.schedule.plan import Planned, plan
from tvm_attn.targets import Target


def kernel_plan(
    config: GPT2Config,
    target: Target,
    dtype: str = "float32",
    quant: str = "none",
    records: Path | None = None,
    kv: str | None = None,
) -> list[Planned]:
    """The kernels of a model's library for a target, each once, scheduled as a build with the same `records` would.

    Raises:
        TargetError: the target does not have the dtype or such a KV cache, there is no such quantization, or TVM
            refuses the target.
        ConfigError: the model cannot be quantized.
        ScheduleError: a kernel has no template, or a record does not fit, or `records` holds none.
    """
    check_types(target, dtype, quant, kv)
    backend_for(target).tvm_target(target)
    book = RecordBook.load(target, records)
    program = build_program(config, layout_for(config, target, dtype, quant, kv))
    return [plan(kernel, target, book) for kernel in program.kernels.values()]
