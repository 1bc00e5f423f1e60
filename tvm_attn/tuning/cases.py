"""The inputs and the float64 reference of measured calls, as files: a runner needs NumPy and TVM's runtime only.

A folder holds `calls.json`, and a file with the values of each array.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_attn.storage import numpy_dtype

if TYPE_CHECKING:
    from tvm_attn.tuning.calls import Call

_FILE = "calls.json"


@dataclass(frozen=True)
class StoredCall:
    """A call to measure, read from a folder.

    Attributes:
        name, bytes: as in `tvm_attn.tuning.calls.Call`.
        inputs, outputs, expected, in_place, nmse: as in `tvm_attn.kernels.Case`.
    """

    name: str
    bytes: int
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    in_place: tuple[int, ...]
    nmse: float


def write_calls(calls: Sequence[Call], folder: Path) -> None:
    """Writes the calls of a kernel into a new folder; `calls.json` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for number, call in enumerate(calls):
        case = call.case()
        entry: dict[str, Any] = {"name": call.name, "bytes": call.bytes, "in_place": case.in_place, "nmse": case.nmse}
        for role in ("inputs", "outputs", "expected"):
            entry[role] = []
            for index, array in enumerate(getattr(case, role)):
                name = f"{number}-{role}-{index}.bin"
                np.ascontiguousarray(array).tofile(folder / name)
                entry[role].append({"file": name, "shape": array.shape, "dtype": str(array.dtype)})
        described.append(entry)
    temporary = folder / f"{_FILE}.part"
    temporary.write_text(json.dumps(described), encoding="utf-8")
    os.replace(temporary, folder / _FILE)


def read_calls(folder: Path) -> list[StoredCall]:
    """Reads what `write_calls` wrote. Arrays are mapped from their files."""

    def array(entry: dict[str, Any]) -> np.ndarray:
        dtype, shape = numpy_dtype(entry["dtype"]), tuple(entry["shape"])
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(folder / entry["file"], dtype, "r", shape=shape)

    calls = []
    for entry in json.loads((folder / _FILE).read_text(encoding="utf-8")):
        arrays = {role: tuple(map(array, entry[role])) for role in ("inputs", "outputs", "expected")}
        calls.append(
            StoredCall(entry["name"], entry["bytes"], **arrays, in_place=tuple(entry["in_place"]), nmse=entry["nmse"])
        )
    return calls
