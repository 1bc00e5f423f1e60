"""Writing an artifact: its parameters and its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tvm_attn.runtime.artifact import MANIFEST, PARAMS_INDEX, digest

# TVM's loaders read shards whole; parameters larger than half of this get a shard of their own.
_SHARD_BYTES = 32 << 20
# Parameters start at multiples of this, so that a shard in memory can be used in place.
_ALIGNMENT = 64


def packed_first(params: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Moves the small parameters, which are used as they are, after those that are packed.

    `transform_params` asks for them in that order, so every shard is read once.
    """
    unpacked = []
    for name, array in params:
        if array.ndim == 1 or name == "wpe.weight":
            unpacked.append((name, array))
        else:
            yield name, array
    yield from unpacked


def write_params(folder: Path, params: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes parameters in the tensor-cache convention of TVM and MLC-LLM, one shard in memory at a time.

    Args:
        folder: the artifact's folder; `params/` is created in it.
        params: names and C-contiguous arrays.
    """
    (folder / "params").mkdir()
    shards: list[dict[str, Any]] = []
    file: BinaryIO | None = None

    def start() -> None:
        nonlocal file
        finish()
        name = f"params_shard_{len(shards)}.bin"
        file = (folder / "params" / name).open("wb")
        shards.append({"dataPath": name, "format": "raw-shard", "nbytes": 0, "records": []})

    def finish() -> None:
        if file is not None:
            file.close()

    for name, array in params:
        # TVM's own loader wants no gap at the end of a shard, so the padding goes in front of the next parameter.
        padding = -shards[-1]["nbytes"] % _ALIGNMENT if shards else 0
        if not shards or shards[-1]["nbytes"] + padding + array.nbytes > _SHARD_BYTES:
            start()
            padding = 0
        assert file is not None
        shard = shards[-1]
        file.write(bytes(padding))
        file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        record = {
            "name": name,
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "format": "raw",
            "nbytes": array.nbytes,
            "byteOffset": shard["nbytes"] + padding,
        }
        shard["records"].append(record)
        shard["nbytes"] += padding + array.nbytes
    finish()
    for shard in shards:
        shard["md5sum"] = _hash(folder / "params" / shard["dataPath"], "md5")
    index = {"metadata": {"ParamSize": sum(len(shard["records"]) for shard in shards)}, "records": shards}
    (folder / PARAMS_INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Adds the size and SHA-256 of every file in the folder to the body, and writes it as the manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    body["files"] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash(path, "sha256")}
        for path in paths
    }
    body["sha256"] = digest(body)
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps(body, indent=2), encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def _hash(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, algorithm).hexdigest()
            if hasattr(hashlib, "file_digest")
            else _slow_hash(file, algorithm)
        )


def _slow_hash(file: BinaryIO, algorithm: str) -> str:
    """`hashlib.file_digest` for Python 3.10."""
    state = hashlib.new(algorithm)
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return state.hexdigest()
