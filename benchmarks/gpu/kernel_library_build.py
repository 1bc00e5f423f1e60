"""Compiles single kernels with their test cases for `benchmarks.gpu.kernel_library`; needs TVM's compiler.

python -m benchmarks.gpu.kernel_library_build cuda-sm90 dist/kernels
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from benchmarks.gpu.kernel_library import ARRAYS, INDEX, StoredCase
from tvm_attn import kernels, targets
from tvm_attn.cli import Parser, progress, run
from tvm_attn.compiler import cuda_module
from tvm_attn.compiler.cuda import compile_fatbin
from tvm_attn.compiler.devices import backend_for
from tvm_attn.errors import ScheduleError, TargetError
from tvm_attn.kernels import Advance, Case, Head, Kernel, Linear, PrefillAttention, QKVLinear, ResidualLinear
from tvm_attn.kernels.base import shape_of
from tvm_attn.kernels.template import activations_of
from tvm_attn.schedule import RecordBook, schedule, template_for
from tvm_attn.targets import CudaTarget, GpuTarget, Target

_KERNELS_PER_LIBRARY = 16
"""Limits how many kernels are lost if the device refuses a library."""
_LARGEST_CASE = 1 << 17
"""Most bytes of the arrays of a case that is not for tensor cores; larger cases are tested on other devices."""


_LEAST_FLOAT32_BOUND = 1e-12
"""Bounds from which expected results may be stored as float32, whose rounding is an NMSE below 4e-15."""


@dataclass(frozen=True)
class Timed:
    """A kernel for measuring.

    Attributes:
        purpose: the key by which it is looked up.
        kernel: the kernel.
    """

    purpose: str
    kernel: Kernel


def all_cases() -> Iterator[Case]:
    """Every case for tensor cores, and the small cases of other kernels, including those of float32 models."""
    for family in kernels.FAMILIES:
        for case in family.cases():
            is_small = sum(array.nbytes for array in (*case.inputs, *case.outputs, *case.expected)) <= _LARGEST_CASE
            if is_small or family is Advance or activations_of(case.kernel) != "float32":
                yield case


def timed_kernels() -> list[Timed]:
    """Kernels that `python -m benchmarks.gpu` compares with PyTorch: a square product, 124M's layers and attention."""
    found = []
    for dtype in ("float16", "bfloat16"):
        kernel = Linear(8192, 8192, 8, 1, dtype, activations=dtype, max_groups=1024)
        found.append(Timed(f"matmul 8192 {dtype}", kernel))
    dtype, width = "float16", 768
    common: dict[str, Any] = {"rows": 8, "columns": 1, "weights": dtype, "activations": dtype}
    found += [
        Timed("qkv", QKVLinear(width, 3 * width, **common, heads=12, context=1024, cache_dtype=dtype)),
        Timed("projection", ResidualLinear(width, width, **common)),
        Timed("mlp in", Linear(width, 4 * width, **common, activation="gelu_new")),
        Timed("mlp out", ResidualLinear(4 * width, width, **common)),
        Timed("head", Head(width, 50257, **common)),
        Timed("attention", PrefillAttention(12, 64, 1024, 8, dtype, 0.125, dtype)),
    ]
    return found


def write_kernel_library(
    target_name: str,
    folder: Path,
    progress: Callable[[str], None] = lambda message: None,
    cases: Iterable[Case] | None = None,
    timed: Iterable[Timed] | None = None,
) -> None:
    """Compiles kernels and writes them with their cases.

    Args:
        target_name: a CUDA target, e.g. "cuda" or "cuda-sm90", or one for processors, to try this without a GPU.
        folder: the folder to create.
        progress: called with a description of each step.
        cases: the cases; by default those of `all_cases()` for which the target has templates.
        timed: the kernels for measuring; by default `timed_kernels()`.

    Raises:
        TargetError: the target is not a CUDA target.
        CompileError: there is no compiler for CUDA, or a kernel does not compile.
    """
    target = targets.resolve(target_name)
    if isinstance(target, GpuTarget) and not isinstance(target, CudaTarget):
        raise TargetError(f"{target_name} is no CUDA target; known: {', '.join(_cuda_targets())}")
    folder.mkdir(parents=True)
    book = RecordBook.load(target)
    functions: dict[Kernel, tuple[str, tvm.tirx.PrimFunc]] = {}
    chosen = []
    for case in all_cases() if cases is None else cases:
        if _add(functions, case.kernel, target, book):
            chosen.append(case)
    measured = list(timed_kernels() if timed is None else timed)
    for entry in measured:
        _add(functions, entry.kernel, target, book)
    files = {}
    named = list(functions.values())
    for start in range(0, len(named), _KERNELS_PER_LIBRARY):
        part, file = dict(named[start : start + _KERNELS_PER_LIBRARY]), f"kernels-{start // _KERNELS_PER_LIBRARY}.so"
        progress(f"compiling kernels {start + 1} to {start + len(part)} of {len(named)} for {target.name}")
        _compile(part, target, folder / file)
        files.update(dict.fromkeys(part, file))
    _write(folder, target.name, chosen, measured, {kernel: name for kernel, (name, _) in functions.items()}, files)


def _cuda_targets() -> list[str]:
    return [name for name in targets.names() if isinstance(targets.read(name), CudaTarget)]


def _add(functions: dict[Kernel, Any], kernel: Kernel, target: Target, book: RecordBook) -> bool:
    """Schedules a kernel unless that is already done; False if the target has no template for it."""
    if kernel in functions:
        return True
    try:
        record = book.find(template_for(kernel, target), kernel)
        function = schedule(kernel, target, record.decisions if record else None)
    except ScheduleError:
        return False
    name = f"kernel_{len(functions)}"
    functions[kernel] = (name, function.with_attr("global_symbol", name))
    return True


def _compile(functions: dict[str, tvm.tirx.PrimFunc], target: Target, path: Path) -> None:
    if not isinstance(target, CudaTarget):
        tvm.tirx.build(tvm.IRModule(functions), target=backend_for(target).tvm_target(target)).export_library(str(path))
        return
    cuda_module.register_pipeline()
    with cuda_module.without_runtime():
        built = tvm.tirx.build(
            tvm.IRModule(functions), target=backend_for(target).tvm_target(target), pipeline=cuda_module.PIPELINE
        )
        source = cuda_module.device_source(built)
        cuda_module.export_library(built, path, compile_fatbin(source, target.images))


def _write(
    folder: Path, target: str, cases: list[Case], timed: list[Timed], names: dict[Kernel, str], files: dict[str, str]
) -> None:
    arrays: dict[str, np.ndarray] = {}

    def store(array: np.ndarray) -> tuple[str, str]:
        dtype = str(array.dtype)
        bits = np.ascontiguousarray(array).view(np.uint16) if dtype == "bfloat16" else array
        key = hashlib.sha256(f"{dtype}{array.shape}".encode() + bits.tobytes()).hexdigest()[:16]
        arrays[key] = bits
        return key, dtype

    entries = []
    for index, case in enumerate(cases):
        name = names[case.kernel]
        # Half the size, and exact enough for such bounds.
        precision = np.float32 if case.nmse >= _LEAST_FLOAT32_BOUND else np.float64
        stored = StoredCase(
            index=index,
            function=name,
            file=files[name],
            kernel=shape_of(case.kernel),
            name=case.name,
            inputs=tuple(store(array) for array in case.inputs),
            outputs=tuple(store(array) for array in case.outputs),
            expected=tuple(store(array.astype(precision)) for array in case.expected),
            in_place=case.in_place,
            nmse=case.nmse,
        )
        entries.append(stored.to_dict())
    measured = {
        entry.purpose: {
            "function": names[entry.kernel],
            "file": files[names[entry.kernel]],
            "kernel": shape_of(entry.kernel),
        }
        for entry in timed
        if entry.kernel in names
    }
    np.savez(folder / ARRAYS, allow_pickle=False, **arrays)
    index_text = json.dumps({"target": target, "cases": entries, "timed": measured}, indent=1)
    (folder / INDEX).write_text(index_text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        prog="python -m benchmarks.gpu.kernel_library_build",
        description="Compile every kernel's test cases for a CUDA target.",
    )
    parser.add_argument("target", help="e.g. cuda or cuda-sm90")
    parser.add_argument("folder", type=Path, help="created if there is none")
    args = parser.parse_args(argv)
    with progress() as show:
        write_kernel_library(args.target, args.folder, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
