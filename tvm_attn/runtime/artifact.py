"""Reading an artifact: its manifest, libraries and parameters, checked before anything is used.

Every file is compared with the size and SHA-256 in the manifest, and the manifest with its own SHA-256. That finds
damage and mix-ups; it is no signature, and a library is machine code: load artifacts from people you trust.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn.config import GPT2Config
from tvm_attn.errors import ArtifactError, ConfigError
from tvm_attn.runtime.machine import cpu_features, platform_name

MANIFEST = "manifest.json"
PARAMS_INDEX = "params/tensor-cache.json"
FORMAT = 1
"""Version of the artifact's format; a reader accepts its own version only."""

_DTYPES = ("float32", "float16", "bfloat16")


def digest(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its "sha256" entry, over its canonical JSON."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Library:
    """One compiled library of an artifact.

    Attributes:
        file: its name in the folder.
        target: name of the target it was compiled for.
        device: device class, e.g. "cpu".
        platform: operating system and architecture, see `platform_name`.
        features: instruction sets that it may use.
        rows: R, the rows of a group in its functions.
        vocabulary: V', the columns of its logits.
        max_prefill_rows, max_batch: the largest calls it was planned for, in rows.
    """

    file: str
    target: str
    device: str
    platform: str
    features: tuple[str, ...]
    rows: int
    vocabulary: int
    max_prefill_rows: int
    max_batch: int

    def obstacle(self) -> str | None:
        """Why it cannot run on this machine, in words; None where it can."""
        if self.platform != platform_name():
            return f"it was built for {self.platform}, this is {platform_name()}"
        if missing := sorted(set(self.features) - cpu_features()):
            return f"this processor lacks {', '.join(missing)}"
        return None


class Artifact:
    """An artifact's folder. Construction reads and checks the manifest; files are checked when they are read.

    Args:
        folder: what `tvm_attn.build` wrote.

    Raises:
        ArtifactError: no artifact, an altered or malformed manifest, or one of another format or TVM version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        try:
            self.config = GPT2Config.from_dict(self.manifest["model"])
            self.dtype: str = self.manifest["dtype"]
            self.quantization: str = self.manifest["quantization"]
            self.libraries = [_library(entry) for entry in self.manifest["libraries"]]
            self._files: dict[str, dict[str, Any]] = self.manifest["files"]
            self._versions: dict[str, str] = self.manifest["versions"]
        except (KeyError, TypeError, AttributeError) as error:
            raise self._error(f"{MANIFEST} lacks or garbles an entry ({error})") from error
        except ConfigError as error:
            raise self._error(f"its model configuration is invalid: {error}") from error
        if self.dtype not in _DTYPES or self.quantization != "none":
            raise self._error(f"dtype {self.dtype!r} with quantization {self.quantization!r} is not supported")

    def _error(self, what: str) -> ArtifactError:
        return ArtifactError(f"artifact {self.folder}: {what}; build it again with python -m tvm_attn.build")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise self._error(f"{MANIFEST} is missing, so this is no artifact") from error
        except (OSError, ValueError) as error:
            raise self._error(f"{MANIFEST} cannot be read ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("sha256") != digest(manifest):
            raise self._error(f"{MANIFEST} was altered or truncated")
        if manifest.get("format") != FORMAT:
            raise self._error(f"format {manifest.get('format')!r} is not this version's format {FORMAT}")
        return manifest

    def check_versions(self) -> None:
        """Compares the TVM versions that built the artifact with the installed ones.

        Raises:
            ArtifactError: they differ.
        """
        import tvm
        import tvm_ffi

        installed = {"tvm": tvm.__version__, "tvm_ffi": tvm_ffi.__version__}
        for name, version in installed.items():
            if self._versions.get(name) != version:
                raise self._error(f"it was built with {name} {self._versions.get(name)}, here {version} is installed")

    def library(self, device: str) -> Library:
        """The library to run on a device class: of those that this machine can run, the one with most features.

        Raises:
            ArtifactError: there is none for the device class, or this machine can run none; says why.
        """
        of_device = [library for library in self.libraries if library.device == device]
        if not of_device:
            available = ", ".join(library.target for library in self.libraries)
            raise self._error(f"it holds no library for {device!r} (it has: {available})")
        usable = [library for library in of_device if library.obstacle() is None]
        if not usable:
            raise self._error(
                "; ".join(f"{library.file} cannot run here: {library.obstacle()}" for library in of_device)
            )
        return max(usable, key=lambda library: len(library.features))

    def read(self, name: str) -> bytearray:
        """The content of a file of the artifact, checked.

        Raises:
            ArtifactError: it is missing, unlisted, or not what the manifest says.
        """
        content = bytearray(self._expected_size(name))
        path = self.folder / name
        try:
            with path.open("rb", buffering=0) as file:
                size = path.stat().st_size
                if size != len(content):
                    raise self._error(f"{name} has {size} bytes instead of {len(content)}: truncated or altered")
                view, done = memoryview(content), 0
                while done < size and (count := file.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise self._error(f"{name} cannot be read ({error.strerror})") from error
        if hashlib.sha256(content).hexdigest() != self._files[name]["sha256"]:
            raise self._error(f"the content of {name} is not what was built (SHA-256 differs)")
        return content

    def _expected_size(self, name: str) -> int:
        try:
            return int(self._files[name]["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(f"{name} is not listed in {MANIFEST}") from error

    def tokenizer_json(self) -> str | None:
        """The tokenizer file's content, or None where the artifact has none."""
        return self.read("tokenizer.json").decode() if "tokenizer.json" in self._files else None

    @cached_property
    def parameters(self) -> Parameters:
        """The canonical parameters."""
        return Parameters(self)


def _library(entry: dict[str, Any]) -> Library:
    return Library(
        file=entry["file"],
        target=entry["target"],
        device=entry["device"],
        platform=entry["platform"],
        features=tuple(entry["features"]),
        rows=entry["rows"],
        vocabulary=entry["vocabulary"],
        max_prefill_rows=entry["max_prefill_rows"],
        max_batch=entry["max_batch"],
    )


class Parameters:
    """The canonical parameters of an artifact, read shard by shard.

    They are stored in the tensor-cache convention of TVM and MLC-LLM (`tensor-cache.json`, `params_shard_*.bin`). The
    last shard read is kept, so parameters read in stored order read every file once.

    Raises:
        ArtifactError: the index is malformed; `read` raises it for shards that do not fit.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._shard: tuple[str, bytearray] | None = None
        self._records: dict[str, tuple[str, dict[str, Any]]] = {}
        try:
            index = json.loads(artifact.read(PARAMS_INDEX))
            for shard in index["records"]:
                for record in shard["records"]:
                    self._records[record["name"]] = (f"params/{shard['dataPath']}", record)
        except (ValueError, KeyError, TypeError) as error:
            raise artifact._error(f"{PARAMS_INDEX} is malformed ({error})") from error

    def read(self, name: str) -> np.ndarray:
        """One parameter, in its stored dtype; a view of the shard, valid until it is dropped.

        Raises:
            ArtifactError: it is missing, or its record does not fit the shard.
        """
        from tvm_attn.runtime.dtypes import numpy_dtype

        if name not in self._records:
            raise self._artifact._error(f"the parameter {name} is missing")
        path, record = self._records[name]
        if self._shard is None or self._shard[0] != path:
            self._shard = None
            self._shard = (path, self._artifact.read(path))
        content = self._shard[1]
        try:
            dtype, shape, offset = numpy_dtype(record["dtype"]), record["shape"], record["byteOffset"]
            size = dtype.itemsize * math.prod(shape)
            if record["nbytes"] != size or not 0 <= offset <= len(content) - size:
                raise ValueError(f"{record['nbytes']} bytes at {offset}")
            return np.frombuffer(content, np.uint8, size, offset).view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise self._artifact._error(f"the record of parameter {name} is malformed ({error})") from error

    def close(self) -> None:
        """Drops the shard in memory."""
        self._shard = None
