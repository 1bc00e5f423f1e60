"""Single kernels for a GPU with their test cases, compiled on another machine: what `write_kernel_library` made.

A folder of `kernels.json`, `cases.npz` and libraries. Nothing is unpickled: bfloat16 arrays are stored as their bits.
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
from tvm_attn.storage import numpy_dtype

INDEX, ARRAYS = "kernels.json", "cases.npz"

Stored = tuple[str, str]
"""Key and dtype of an array."""


@dataclass(frozen=True)
class StoredCase:
    """A `tvm_attn.kernels.Case` without its arrays.

    Attributes:
        index: its place in the library.
        function: name of the kernel's function.
        file: the library that has it.
        kernel: family and static sizes.
        name: what is special about the input.
        inputs, outputs, expected: key and dtype of each array; equal arrays are stored once.
        in_place: indices of inputs that are results, too.
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
    """A case that ran.

    Attributes:
        case: its index.
        name: the kernel and the case, in words.
        nmse: the worst normalised mean squared error of its results; NaN where one holds NaN.
        bound: what it had to meet.
        passed: whether it did.
        seconds: of the call, with its first load of code.
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
        BenchmarkError: the folder holds none, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.target: str = index["target"]
            self.cases = [_case(position, entry) for position, entry in enumerate(index["cases"])]
            self.timed: dict[str, dict[str, Any]] = index["timed"]
            """Functions without cases, for measuring: name, file and kernel by what they are for."""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{folder} holds no kernels ({error}); python -m benchmarks.pack --kernels TARGET makes them"
            ) from error
        self._modules: dict[str, Any] = {}

    @cached_property
    def _arrays(self) -> Any:
        return np.load(self.folder / ARRAYS, allow_pickle=False)

    def function(self, file: str, name: str) -> Any:
        """A kernel, to be called with tensors."""
        import tvm

        if file not in self._modules:
            self._modules[file] = tvm.runtime.load_module(str(self.folder / file))
        return self._modules[file][name]

    def timed_function(self, purpose: str) -> tuple[Any, dict[str, Any]]:
        """A kernel that is there for measuring, and its family and sizes.

        Raises:
            BenchmarkError: there is none for this purpose.
        """
        if purpose not in self.timed:
            raise BenchmarkError(f"{self.folder} has no kernel for {purpose}")
        entry = self.timed[purpose]
        return self.function(entry["file"], entry["function"]), entry["kernel"]

    def arrays(self, stored: tuple[Stored, ...]) -> list[np.ndarray]:
        """Arrays of a case."""
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


def to_device(array: np.ndarray, device: Any) -> Any:
    """A TVM tensor with the array's content."""
    import tvm

    tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
    if str(array.dtype) == "bfloat16":
        tensor._create_view(array.shape, "uint16").copyfrom(array.view(np.uint16))
    else:
        tensor.copyfrom(array)
    return tensor


def normalised_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """``sum((x - y)**2) / sum(y**2)`` in float64; the numerator alone where y is zero."""
    wanted = expected.astype(np.float64)
    error, power = float(((actual.astype(np.float64) - wanted) ** 2).sum()), float((wanted**2).sum())
    return error / power if power else error


def _case(position: int, entry: dict[str, Any]) -> StoredCase:
    arrays = {name: tuple((key, dtype) for key, dtype in entry[name]) for name in ("inputs", "outputs", "expected")}
    return StoredCase(**{**entry, **arrays, "in_place": tuple(entry["in_place"]), "index": position})
