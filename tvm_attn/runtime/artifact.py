"""Reading an artifact: its manifest, libraries and parameters, checked before anything is used.

Every file is compared with the size and SHA-256 in the manifest, and the manifest with its own SHA-256. That finds
damage and mix-ups, but it is not a signature, and a library is machine code: load artifacts from people you trust.

A build may replace the folder at any time, so an artifact keeps its folder open and reads all of its files through it;
`open_artifact` starts again if the folder has been replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tvm_attn.config import TOKEN_IDS, GPT2Config
from tvm_attn.errors import ArtifactError, ConfigError, GenerationError, one_line, shorten
from tvm_attn.jsonfile import CONFIG_BYTES, TOKENIZER_BYTES, open_regular, parse_json, shorten_path
from tvm_attn.runtime.decoding import GenerationOptions
from tvm_attn.runtime.devices.cuda import Capability, code_rank
from tvm_attn.runtime.machine import cpu_features, platform_name
from tvm_attn.storage import DTYPES, KV_DTYPES, QUANTIZATIONS, numpy_dtype, stored_types

MANIFEST = "manifest.json"
DRAFT = "draft"
"""The folder of an artifact that holds its draft, an artifact too; see `tvm_attn.runtime.speculation`."""
PARAMS_INDEX = "params/tensor-cache.json"
FORMAT = 7
"""Version of the artifact's format; a reader accepts its own version only. In 5, a model has several end tokens, and no
library is compiled for them; the checkpoint's sampling options are recorded; libraries for processors have threads of
their own. In 7, the dtype of the KV cache is recorded."""


_LIBRARY_BYTES = 1 << 30
"""Largest library that is read, in bytes. That of GPT-2 124M has 1.4 MB for a CPU, 20 MB for all CUDA architectures."""
_MESSAGE = 500  # most characters that an error quotes
_TRIES = 100
_T = TypeVar("_T")


def digest(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its "sha256" entry, over its canonical JSON."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Library:
    """One compiled library of an artifact, as the manifest describes it.

    Attributes:
        file: the library's file name in the artifact's folder.
        target: name of the target it was compiled for.
        device: device class, e.g. "cpu".
        platform: operating system and architecture, see `platform_name`.
        features: instruction sets that it may use.
        rows: R, the rows of a group in its functions.
        vocabulary: V', the columns of its logits.
        max_prefill_rows, max_batch: the largest calls it was planned for, in rows.
        parameters: names of the canonical tensors, in the order in which its `transform_params` numbers them.
        architectures: for CUDA, the architectures it has machine code for, e.g. ("sm_80", "sm_90a"); else empty.
        ptx: for CUDA, the virtual architecture it has PTX for, e.g. "compute_80"; else None.
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
    parameters: tuple[str, ...]
    architectures: tuple[str, ...] = ()
    ptx: str | None = None

    def obstacle(self, capability: Capability | None = None) -> str | None:
        """Why the library cannot run on this machine, as text; None if it can.

        Args:
            capability: compute capability of the CUDA device; None skips that check.
        """
        if self.platform != platform_name():
            return f"it was built for {self.platform}, this is {platform_name()}"
        if missing := sorted(set(self.features) - cpu_features()):
            return f"this processor lacks {', '.join(missing)}"
        if capability is not None and self.rank(capability) is None:
            code = ", ".join([*self.architectures, *([f"PTX of {self.ptx}"] if self.ptx else [])])
            return f"it holds {code or 'no code'}, the device has compute capability {capability[0]}.{capability[1]}"
        return None

    def rank(self, capability: Capability) -> tuple[int, int] | None:
        """How well the library's code suits a CUDA device, see `code_rank`."""
        return code_rank(self.architectures, self.ptx, capability)


def identity(config: GPT2Config, dtype: str, quantization: str, kv: str, library: Library) -> str:
    """What a library was compiled for, as JSON: everything that its callers rely on.

    Every library returns this text from its function "identity". A manifest that was edited, or names another library,
    would otherwise call functions with tensors of the wrong shapes.
    """
    facts = config.to_dict() | {"dtype": dtype, "quantization": quantization, "kv": kv} | asdict(library)
    for name in ("file", *TOKEN_IDS):
        del facts[name]
    return json.dumps(facts, sort_keys=True)


class Artifact:
    """An artifact's folder. Construction reads and checks the manifest; files are checked when they are read.

    Args:
        folder: a folder written by `tvm_attn.build`.
        whole: the artifact whose draft this is.

    Raises:
        ArtifactError: the folder is not an artifact, its manifest is altered or malformed, or its format or TVM version
            differs.
    """

    def __init__(self, folder: str | Path, whole: Artifact | None = None) -> None:
        self.folder = _path(folder)
        self._descriptor = self._open_folder(whole)
        # Not at exit: a daemon thread may still read, and the system closes it.
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        self.manifest = self._read_manifest()
        try:
            self.config = GPT2Config.from_dict(self.manifest["model"])
            self.dtype: str = self.manifest["dtype"]
            self.quantization: str = self.manifest["quantization"]
            self.quantized_kv: str | None = self.manifest["kv"]
            self.generation: dict[str, Any] = _entry(self.manifest, "generation", dict)
            GenerationOptions(**self.generation)
            self.libraries = [_library(entry) for entry in _entry(self.manifest, "libraries", list)]
            self._files = _files(_entry(self.manifest, "files", dict))
            self._versions: dict[str, str] = _entry(self.manifest, "versions", dict)
        except (KeyError, TypeError) as error:
            raise self.error(f"{MANIFEST} lacks or garbles an entry ({one_line(error)})") from error
        except ConfigError as error:
            raise self.error(f"its model configuration is invalid: {error}") from error
        except GenerationError as error:
            raise self.error(f"its generation options are invalid: {one_line(error)}") from error
        if self.dtype not in DTYPES or self.quantization not in QUANTIZATIONS:
            raise self.error(
                f"dtype {shorten(self.dtype)} with quantization {shorten(self.quantization)} is not supported"
            )
        if self.quantized_kv not in (None, *KV_DTYPES):
            raise self.error(f"a KV cache in {shorten(self.quantized_kv)} is not supported")
        try:
            stored = set(self.types)
        except ConfigError as error:
            raise self.error(f"its model configuration is invalid: {error}") from error
        for library in self.libraries:
            if set(library.parameters) != stored:
                raise self.error(f"{library.file} was compiled for another model")

    @property
    def kv(self) -> str:
        """The dtype of the KV cache."""
        return self.quantized_kv or self.dtype

    @property
    def types(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every stored tensor, by name."""
        return stored_types(self.config, self.dtype, self.quantization)

    def error(self, what: str) -> ArtifactError:
        """An error that names the artifact and says what to do; `what` is cut to one line of bounded length."""
        what = " ".join(what[:_MESSAGE].split())
        return ArtifactError(f"artifact {shorten_path(self.folder)}: {what}; build it again with tvm-attn build")

    def _open_folder(self, whole: Artifact | None) -> int:
        place = shorten_path(self.folder)
        try:
            if whole is not None:
                return os.open(DRAFT, os.O_RDONLY | os.O_DIRECTORY, dir_fd=whole._descriptor)
            return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise ArtifactError(f"no such folder: {place}; tvm-attn build writes artifacts") from None
        except NotADirectoryError:
            raise ArtifactError(f"{place} is a file; name the folder that tvm-attn build wrote") from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"the folder {place} cannot be opened: {_reason(error)}") from None

    def _read_manifest(self) -> dict[str, Any]:
        content = self._content(MANIFEST, CONFIG_BYTES).tobytes()
        manifest = self._parsed(MANIFEST, content)
        if not isinstance(manifest, dict) or manifest.get("sha256") != digest(manifest):
            raise self.error(f"{MANIFEST} was altered or truncated")
        if manifest.get("format") != FORMAT:
            raise self.error(f"format {shorten(manifest.get('format'))} is not this version's format {FORMAT}")
        return manifest

    def _no_artifact(self) -> ArtifactError:
        place = shorten_path(self.folder)
        if (self.folder / "config.json").is_file():
            return ArtifactError(
                f"{place} is a checkpoint: build it first: tvm-attn build --model {place} --target cpu"
            )
        return ArtifactError(f"{place} is no artifact, {MANIFEST} is missing; name a folder that tvm-attn build wrote")

    def _parsed(self, name: str, content: bytes) -> Any:
        try:
            return parse_json(content.decode(), name, ArtifactError)
        except UnicodeDecodeError as error:
            raise self.error(f"{name} is not UTF-8 ({one_line(error)})") from None
        except ArtifactError as error:
            raise self.error(str(error)) from None

    def _content(self, name: str, limit: int, expected: int | None = None) -> np.ndarray:
        """The content of a file of the folder, as uint8 values.

        Raises:
            ArtifactError: the file is missing or unreadable, larger than `limit` bytes, or not of the `expected` size.
        """
        try:
            with open(open_regular(name, dir_fd=self._descriptor), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if expected is not None and size != expected:
                    raise self.error(f"{name} has {size} bytes instead of {expected}: truncated or altered")
                if size > limit:
                    raise self.error(f"{name} has {size} bytes, so it is not the file it should be")
                # NumPy uses huge pages and does not clear them: 4 ms per shard, where a bytearray takes 19 ms.
                content, done = np.empty(size, np.uint8), 0
                while done < size and (count := file.readinto(content[done:].data)):
                    done += count
        except FileNotFoundError:
            if name == MANIFEST:
                raise self._no_artifact() from None
            raise self.error(f"{name} is missing") from None
        except MemoryError:
            raise self.error(f"there is no memory for the {size} bytes of {name}") from None
        except (OSError, ValueError) as error:
            raise self.error(f"{name} cannot be read ({_reason(error)})") from None
        return content[:done]

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
                raise self.error(f"it was built with {name} {self._versions.get(name)}, here {version} is installed")

    def library(self, device: str, capability: Capability | None = None) -> Library:
        """The library to run on a device class: of those that can run here, the one that uses the most features.

        Args:
            device: the device class.
            capability: compute capability of a CUDA device. The library whose code suits it best is taken; if several
                have that code, the one made for the fewest architectures. None stands for a device that can run all of
                them.

        Raises:
            ArtifactError: there is no library for the device class, or none can run here; the message says why.
        """
        of_device = [library for library in self.libraries if library.device == device]
        if not of_device:
            targets = [library.target for library in self.libraries]
            raise ArtifactError(
                f"artifact {shorten_path(self.folder)} holds no library for {device!r} (it has: "
                f"{', '.join(targets) or 'none'}); build it again with --target {','.join([*targets, device])}"
            )
        usable = [library for library in of_device if library.obstacle(capability) is None]
        if not usable:
            reasons = (f"{library.file} cannot run here: {library.obstacle(capability)}" for library in of_device)
            raise self.error("; ".join(reasons))
        if capability is None:
            return max(usable, key=lambda library: len(library.features))
        return max(usable, key=lambda library: (library.rank(capability) or (), -len(library.architectures)))

    def check_identity(self, library: Library, text: str) -> None:
        """Compares a library's own description, see `identity`, with the manifest.

        Raises:
            ArtifactError: they differ; the message names the first difference.
        """
        expected = identity(self.config, self.dtype, self.quantization, self.kv, library)
        if text == expected:
            return
        try:
            wanted, found = json.loads(expected), json.loads(text)
            key = next(key for key in wanted if found[key] != wanted[key])
            difference = f"{key} {shorten(found[key])}, not {shorten(wanted[key])} as {MANIFEST} says"
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
            difference = f"something else than {MANIFEST} says"
        raise self.error(f"{library.file} was compiled for {difference}")

    def read(self, name: str) -> bytes:
        """The content of a file of the artifact, checked. Errors as in `read_array`."""
        return self.read_array(name).tobytes()

    def read_array(self, name: str, limit: int = _LIBRARY_BYTES) -> np.ndarray:
        """The content of a file of the artifact as uint8 values, checked.

        Raises:
            ArtifactError: the file is missing, unlisted, larger than `limit` bytes, or not what the manifest says.
        """
        if name not in self._files:
            raise self.error(f"{shorten(name)} is not listed in {MANIFEST}")
        expected = self._files[name]
        content = self._content(name, limit, expected["bytes"])
        if hashlib.sha256(content.data).hexdigest() != expected["sha256"]:
            raise self.error(f"the content of {name} is not what was built (SHA-256 differs)")
        return content

    def read_json(self, name: str) -> Any:
        """The parsed content of a JSON file of the artifact. Errors as in `read_array`, and if it is not JSON."""
        return self._parsed(name, self.read_array(name, CONFIG_BYTES).tobytes())

    def tokenizer_json(self) -> str | None:
        """The content of the tokenizer file, or None if the artifact has none.

        Raises:
            ArtifactError: the file is damaged.
        """
        if "tokenizer.json" not in self._files:
            return None
        try:
            return self.read_array("tokenizer.json", TOKENIZER_BYTES).tobytes().decode()
        except UnicodeDecodeError as error:
            raise self.error(f"tokenizer.json is not UTF-8 ({error})") from error

    def draft(self, library: Library) -> tuple[Artifact, Library] | None:
        """The draft for a library, and the draft's library; None if there is none.

        Raises:
            ArtifactError: the draft is damaged, or not of this model.
        """
        if f"{DRAFT}/{MANIFEST}" not in self._files or library.device != "cpu":
            return None
        self.read_array(f"{DRAFT}/{MANIFEST}", CONFIG_BYTES)
        draft = Artifact(self.folder / DRAFT, self)
        found = [other for other in draft.libraries if other.target == library.target]
        if not found or (draft.config, draft.dtype) != (self.config, self.dtype):
            raise self.error("its draft is that of another model")
        return draft, found[0]

    @cached_property
    def parameters(self) -> Parameters:
        """The canonical parameters."""
        return Parameters(self)


def open_artifact(folder: str | Path, use: Callable[[Artifact], _T]) -> _T:
    """`use(Artifact(folder))`, repeated if a build replaces the folder in the meantime.

    Raises:
        ArtifactError: as `Artifact` and `use` do.
    """
    place = _path(folder)
    for left in reversed(range(_TRIES)):
        before = _version(place)
        try:
            return use(Artifact(place))
        except ArtifactError:
            if not left or _version(place) == before:
                raise
    raise AssertionError("the last try returns or raises")


def _path(folder: str | Path) -> Path:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ArtifactError(f"an artifact is given as its folder, not {shorten(folder)}")
    return Path(folder)


def _version(folder: Path) -> tuple[int, ...] | None:
    """A value that differs between a folder and the one that replaced it; None if there is no folder."""
    try:
        status = os.stat(folder)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def _entry(table: Any, name: str | int, kind: type) -> Any:
    """`table[name]`, which must be of exactly that type: JSON's true is not an int.

    Raises:
        KeyError, TypeError: the entry is absent, or of another type.
    """
    value = table[name]
    if type(value) is not kind:
        raise TypeError(f"{shorten(name)} is {shorten(value)}, not {kind.__name__}")
    return value


def _library(entry: Any) -> Library:
    names = {name: _entry(entry, name, str) for name in ("file", "target", "device", "platform")}
    sizes = {name: _entry(entry, name, int) for name in ("rows", "vocabulary", "max_prefill_rows", "max_batch")}
    if min(sizes.values()) < 1:
        raise TypeError(f"{min(sizes, key=sizes.__getitem__)} is not positive")
    features, parameters, architectures = (
        _strings(_entry(entry, name, list)) for name in ("features", "parameters", "architectures")
    )
    ptx = None if entry["ptx"] is None else _entry(entry, "ptx", str)
    try:
        code_rank(architectures, ptx, (0, 0))
    except ValueError as error:
        raise TypeError(str(error)) from error
    return Library(**names, **sizes, features=features, parameters=parameters, architectures=architectures, ptx=ptx)


def _strings(values: list[Any]) -> tuple[str, ...]:
    return tuple(_entry(values, i, str) for i in range(len(values)))


def _files(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's table of files, checked: names inside the folder, each with a size and a SHA-256."""
    for name, entry in table.items():
        if not re.fullmatch(r"(draft/)?(params/)?\w[\w.-]*", name, re.ASCII):
            raise TypeError(f"{shorten(name)} is no file of an artifact")
        _entry(entry, "bytes", int), _entry(entry, "sha256", str)
    return table


class Parameters:
    """The canonical parameters of an artifact, read shard by shard.

    They are stored in the tensor-cache format of TVM and MLC-LLM (`tensor-cache.json`, `params_shard_*.bin`). The last
    shard read is kept, so reading the parameters in the order of `names` reads every file once.

    Raises:
        ArtifactError: the index is malformed; `read` raises it for shards that do not match it.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._types = artifact.types
        # The size of all parameters with the gaps between them: no shard is larger.
        self._bytes = sum(64 + numpy_dtype(dtype).itemsize * math.prod(shape) for shape, dtype in self._types.values())
        self._shard: tuple[str, np.ndarray] | None = None
        self._records: dict[str, tuple[str, dict[str, Any]]] = {}
        try:
            index = artifact.read_json(PARAMS_INDEX)
            for shard in index["records"]:
                for record in shard["records"]:
                    self._records[record["name"]] = (f"params/{shard['dataPath']}", record)
        except (KeyError, TypeError) as error:
            raise artifact.error(f"{PARAMS_INDEX} is malformed ({one_line(error)})") from error

    def names(self) -> list[str]:
        """The names of all parameters, in the order in which they are stored."""
        place = {name: index for index, name in enumerate(self._records)}
        return sorted(self._types, key=lambda name: place.get(name, -1))

    def read(self, name: str) -> np.ndarray:
        """One parameter, in its stored dtype: a view of the shard, valid until the shard is dropped.

        Raises:
            ArtifactError: the parameter is missing, or its record does not fit the shard.
        """
        if name not in self._records or name not in self._types:
            raise self._artifact.error(f"the parameter {name} is missing")
        path, record = self._records[name]
        if self._shard is None or self._shard[0] != path:
            self._shard = None
            self._shard = (path, self._artifact.read_array(path, self._bytes))
        content = self._shard[1]
        try:
            shape, stored = self._types[name]
            if record["shape"] != list(shape) or record["dtype"] != stored:
                raise ValueError(f"{record['dtype']} {record['shape']} instead of {stored} {list(shape)}")
            dtype, offset = numpy_dtype(stored), _entry(record, "byteOffset", int)
            size = dtype.itemsize * math.prod(shape)
            if record["nbytes"] != size or not 0 <= offset <= len(content) - size:
                raise ValueError(f"{record['nbytes']} bytes at {offset}")
            return content[offset : offset + size].view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise self._artifact.error(f"the record of parameter {name} is malformed ({one_line(error)})") from error

    def close(self) -> None:
        """Drops the shard in memory."""
        self._shard = None
