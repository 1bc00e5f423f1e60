"""Single kernels for a GPU with their test cases, which `write_kernel_library` compiled on another machine.

A folder with `kernels.json`, `cases.npz` and libraries. Nothing is unpickled: bfloat16 arrays are stored as bits.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn.errors import BenchmarkError
from tvm_attn.runtime.tensors import normalised_error, to_device
from tvm_attn.storage import numpy_dtype

INDEX, ARRAYS = "kernels.json", "cases.npz"

Stored = tuple[str, str]
"""Key and dtype of a stored array."""


@dataclass(frozen=True)
class StoredCase:
    """A `tvm_attn.kernels.Case` without its arrays.

    Attributes:
        index: its index in the library.
        function: name of the kernel's function.
        file: the library with the function.
        kernel: family and static sizes of the kernel.
        name: what is special about the input.
        inputs, outputs, expected: key and dtype of each array; equal arrays are stored once.
        in_place: indices of the inputs that are also results.
        nmse: bound on the normalised mean squared error of each result.
    """

    index: int
    function: str
    file: str
    kernel: dict[str, Any]
    name: str
    inputs: tuple[Stored, ...]
    outputs: tuple[Stored, ...]
    expected: tuple[Stored, ...]
    in_place: tuple[int, ...]
    nmse: float

    def __str__(self) -> str:
        sizes = ", ".join(f"{key}={value}" for key, value in self.kernel.items() if key != "family")
        return f"{self.kernel['family']}({sizes}): {self.name}"

    def to_dict(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CaseResult:
    """The result of a case.

    Attributes:
        case: index of the case.
        name: the kernel and the case, in words.
        nmse: the worst normalised mean squared error of its results; NaN if one holds NaN.
        bound: upper bound of `nmse`.
        passed: whether `nmse` is within the bound.
        seconds: seconds of the call, including the first load of its code.
    """

    case: int
    name: str
    nmse: float
    bound: float
    passed: bool
    seconds: float


class KernelLibrary:
    """The libraries and cases in a folder.

    Raises:
        BenchmarkError: the folder holds no library, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.target: str = index["target"]
            self.cases = [_case(position, entry) for position, entry in enumerate(index["cases"])]
            self.timed: dict[str, dict[str, Any]] = index["timed"]
            """Functions without cases, for measuring: name, file and kernel, by purpose."""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{folder} holds no kernels ({error}); python -m benchmarks.pack --kernels TARGET makes them"
            ) from error
        self._modules: dict[str, Any] = {}

    @cached_property
    def _arrays(self) -> Any:
        return np.load(self.folder / ARRAYS, allow_pickle=False)

    def function(self, file: str, name: str) -> Any:
        """A kernel's function, which takes tensors."""
        import tvm

        if file not in self._modules:
            self._modules[file] = tvm.runtime.load_module(str(self.folder / file))
        return self._modules[file][name]

    def timed_function(self, purpose: str) -> tuple[Any, dict[str, Any]]:
        """A kernel for measuring, and its family and sizes.

        Raises:
            BenchmarkError: there is no kernel for this purpose.
        """
        if purpose not in self.timed:
            raise BenchmarkError(f"{self.folder} has no kernel for {purpose}")
        entry = self.timed[purpose]
        return self.function(entry["file"], entry["function"]), entry["kernel"]

    def arrays(self, stored: tuple[Stored, ...]) -> list[np.ndarray]:
        """The arrays of a case."""
        return [
            self._arrays[key].view(numpy_dtype(dtype)) if dtype == "bfloat16" else self._arrays[key]
            for key, dtype in stored
        ]

    def check(self, case: StoredCase, device: Any) -> CaseResult:
        """Runs a case on a TVM device and compares it with NumPy float64."""
        function = self.function(case.file, case.function)
        inputs = [to_device(array, device) for array in self.arrays(case.inputs)]
        outputs = [to_device(array, device) for array in self.arrays(case.outputs)]
        device.sync()
        start = time.perf_counter()
        function(*inputs, *outputs)
        device.sync()
        seconds = time.perf_counter() - start
        results = [inputs[i] for i in case.in_place] + outputs
        pairs = zip(results, self.arrays(case.expected), strict=True)
        worst = float(np.max([normalised_error(result.numpy(), expected) for result, expected in pairs]))
        return CaseResult(case.index, str(case), worst, case.nmse, worst <= case.nmse, seconds)


def _case(position: int, entry: dict[str, Any]) -> StoredCase:
    arrays = {name: tuple((key, dtype) for key, dtype in entry[name]) for name in ("inputs", "outputs", "expected")}
    return StoredCase(**{**entry, **arrays, "in_place": tuple(entry["in_place"]), "index": position})
