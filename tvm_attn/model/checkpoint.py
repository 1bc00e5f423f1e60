"""Reads a GPT-2 checkpoint: `config.json` and safetensors, one tensor in memory at a time.

A checkpoint is a folder in Hugging Face's layout, or an id on the hub. Everything about it is checked before it is
used: its configuration, the names, shapes and dtypes of its tensors (from the files' headers, when it is opened) and
their values (when they are read). Pickled weights are never read.
"""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import sqrt
from pathlib import Path
from typing import Any

import ml_dtypes  # also teaches numpy, and through it safetensors, the name "bfloat16"
import numpy as np
from safetensors import SafetensorError, safe_open

from tvm_attn.config import PRESETS, GPT2Config, param_shapes
from tvm_attn.errors import CheckpointError, ConfigError, one_line, shorten
from tvm_attn.jsonfile import CONFIG_BYTES, exists, opened, read_json, shorten_path
from tvm_attn.model.ahead import ahead
from tvm_attn.model.generation import read_generation_config
from tvm_attn.model.hub import CheckpointUnavailable, hub_id, hub_snapshot
from tvm_attn.model.tokenizer import CheckpointTokenizer, read_tokenizer
from tvm_attn.quantization import relative_error
from tvm_attn.runtime.artifact import MANIFEST
from tvm_attn.storage import numpy_dtype

__all__ = [
    "RANDOM_SOURCE",
    "Checkpoint",
    "CheckpointUnavailable",
    "cast_params",
    "open_checkpoint",
    "random_params",
    "read_config",
]

RANDOM_SOURCE = "random weights, seed 0"
"""The source that an artifact with `random_params` records for its weights."""

_STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CONVERT = "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(FOLDER, safe_serialization=True)"
# Causal masks that older versions of transformers stored with the weights.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
# First parts of the names of GPT-2's own parameters; all other tensors belong to other heads.
_BODY = ("transformer", "wte", "wpe", "h", "ln_f", "lm_head")
# Prefixes that PyTorch's module wrappers add to the names of tensors.
_WRAPPERS = {
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_fsdp_wrapped_module": "FSDP",
    "_orig_mod": "torch.compile",
    "module": "DataParallel",
}
_CHUNK = 2**20  # values that one task of random_params draws
_NAMED_PROBLEMS = 4  # how many offending tensors a message lists


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor's file, and what the file's header says about it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 checkpoint whose tensors have been checked against its configuration by name, shape and dtype.

    Attributes:
        config: the hyperparameters, with the token ids of `generation_config.json`.
        source: where it came from: the folder as given by the user, or `hub-id@revision`.
        folder: the folder of its files.
        generation: its recommended sampling options, see `read_generation_config`.
        notes: what was left out of its files, one line each.
    """

    config: GPT2Config
    source: str
    folder: Path
    generation: Mapping[str, Any]
    notes: tuple[str, ...]
    _tensors: Mapping[str, _StoredTensor]

    def params(self) -> Iterator[tuple[str, np.ndarray]]:
        """Canonical name and array of every parameter, in canonical order and in its stored dtype.

        Each array is read when the iterator reaches it: float64, float32, float16 or ml_dtypes.bfloat16.

        Raises CheckpointError, naming the tensor, if a value is NaN or infinite, or if a stored `lm_head.weight`
        differs from the `wte.weight` to which the configuration ties it.
        """
        with ExitStack() as stack:
            handles = {
                file: stack.enter_context(_opened(file))
                for file in dict.fromkeys(t.file for t in self._tensors.values())
            }

            def read(name: str) -> np.ndarray:
                tensor = self._tensors[name]
                with _safetensors_errors(tensor.file):
                    array: np.ndarray = handles[tensor.file].get_tensor(tensor.key)
                if not np.isfinite(array).all():
                    raise CheckpointError(
                        f"{tensor.key} in {shorten_path(tensor.file)} has NaN or infinite values; get the file anew"
                    )
                return array

            stored_tied_head = self.config.tie_word_embeddings and "lm_head.weight" in self._tensors
            for name in param_shapes(self.config):
                array = read(name)
                if name == "wte.weight" and stored_tied_head and not np.array_equal(array, read("lm_head.weight")):
                    raise CheckpointError(
                        f"lm_head.weight of {self.source} differs from wte.weight although config.json ties them; "
                        'set "tie_word_embeddings": false there if the head is its own'
                    )
                yield name, array

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        """The checkpoint's tokenizer.

        Raises TokenizerError if its files are malformed or do not fit the vocabulary size.
        """
        return read_tokenizer(self.folder, self.config.vocab_size)


def open_checkpoint(model: str | Path, on_download: Callable[[str], None] | None = None) -> Checkpoint:
    """Open a checkpoint: a local folder, a preset's name (`gpt2`, `gpt2-xl`, ...) or a Hugging Face hub id.

    A model on the hub is taken from the local cache, or else downloaded; `on_download` is called with its id before a
    download. Weights are `model.safetensors`, or shards with `model.safetensors.index.json`; names may have the prefix
    `transformer.`. Weights of other heads are left out, with a note.

    Raises CheckpointUnavailable if the model is not on this machine and the hub does not provide it, CheckpointError if
    its files are missing, unreadable or do not fit, and ConfigError if its `config.json` is unsupported.
    """
    folder, source = _locate(model, on_download)
    config = read_config(folder)
    files, index = _weight_files(folder)
    config, generation, notes = read_generation_config(folder, config)
    stored = [tensor for file in files for tensor in _read_header(file)]
    if index is not None:
        _check_index(folder, index, stored)
    tensors, left_out = _match(config, source, stored)
    return Checkpoint(config, source, folder, generation, (*notes, *left_out), tensors)


def read_config(folder: Path) -> GPT2Config:
    """The configuration in a checkpoint's `config.json`.

    Raises CheckpointError if it is missing or unreadable, ConfigError if it is unsupported.
    """
    path = folder / "config.json"
    if exists(folder / MANIFEST, CheckpointError):
        raise CheckpointError(f"{shorten_path(folder)} is an artifact, which is built already; name its checkpoint")
    if not exists(path, CheckpointError):
        raise CheckpointError(
            f"{shorten_path(folder)} has no config.json; a checkpoint needs it beside its safetensors files"
        )
    try:
        return GPT2Config.from_dict(read_json(path, CONFIG_BYTES, CheckpointError))
    except ConfigError as error:
        raise ConfigError(f"{shorten_path(path)}: {error}") from None


def random_params(config: GPT2Config, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Random parameters in canonical order, float32, at the scale of GPT-2's initialisation.

    Matrices are normal with a standard deviation of 0.02, or 0.02 / sqrt(2 n_layer) if they write to the residual
    stream (GPT-2 paper, section 2.3). Biases and LayerNorm's parameters, which training starts at zero and one, vary by
    0.1 here, so that a check against a reference notices them. Each tensor depends only on `seed`, its name and its
    shape, not on the tensors before it.
    """
    with ThreadPoolExecutor() as pool:
        drawn = (_draw(pool, config, name, shape, seed) for name, shape in param_shapes(config).items())
        for name, array, chunks in ahead(drawn):
            for chunk in chunks:
                chunk.result()
            yield name, array


def _draw(
    pool: ThreadPoolExecutor, config: GPT2Config, name: str, shape: tuple[int, ...], seed: int
) -> tuple[str, np.ndarray, list[Future[None]]]:
    """Starts to draw a parameter: its name, its array, and the tasks that fill chunks of it."""
    array = np.empty(shape, np.float32)
    scale = 0.1 if array.ndim == 1 else 0.02
    if array.ndim > 1 and name.endswith("c_proj.weight"):
        scale /= sqrt(2 * config.n_layer)
    mean = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
    fill = partial(_fill_normal, array.reshape(-1), [seed, zlib.crc32(name.encode())], scale, mean)
    return name, array, [pool.submit(fill, start) for start in range(0, array.size, _CHUNK)]


def _fill_normal(flat: np.ndarray, seeds: list[int], scale: float, mean: float, start: int) -> None:
    """Fills one chunk with normal values; each chunk has its own stream, so threads change nothing."""
    # SFC64 is numpy's fastest bit generator; its quality is far beyond what weights need.
    generator = np.random.Generator(np.random.SFC64([*seeds, start]))
    chunk = flat[start : start + _CHUNK]
    generator.standard_normal(dtype=np.float32, out=chunk)
    chunk *= scale
    if mean:
        chunk += mean


def cast_params(params: Iterable[tuple[str, np.ndarray]], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Cast parameters to their stored form: matrices to `dtype`, vectors (biases, LayerNorm) always to float32.

    `dtype` is "float32", "float16" or "bfloat16" (ml_dtypes). Values round to nearest even.

    Raises CheckpointError, naming the tensor, if a finite value would become infinite, or most of a tensor would be
    lost because its values are smaller than the dtype's smallest.
    """
    for name, array in params:
        target = numpy_dtype(dtype if array.ndim > 1 else "float32")
        if array.dtype == target:
            yield name, array
            continue
        with np.errstate(over="ignore"):  # reported below, by name
            cast = array.astype(target)
        _require_fitting(name, array, cast)
        yield name, cast


# Square of bfloat16's rounding error: a tensor that loses more has values below the exponent range.
_COARSEST = 2.0**-18


def _require_fitting(name: str, array: np.ndarray, cast: np.ndarray) -> None:
    """Refuses values that become infinite, and tensors that are mostly too small for the dtype."""
    largest = float(np.abs(array).max(initial=0))
    if np.isfinite(largest) and not np.isfinite(cast).all():
        raise CheckpointError(
            f"{name} holds {largest:g}, too large for {cast.dtype.name}, whose largest number is "
            f"{float(ml_dtypes.finfo(cast.dtype).max):g}; {_other_dtype(cast.dtype)}"
        )
    smallest = float(ml_dtypes.finfo(cast.dtype).smallest_normal)
    if not 0 < float(np.abs(array).mean(dtype=np.float64)) < smallest:
        return
    if (error := relative_error(cast, array)) > _COARSEST:
        raise CheckpointError(
            f"{name} holds values up to {largest:.2g}, too small for {cast.dtype.name} (normalised squared error "
            f"{error:.1e}); {_other_dtype(cast.dtype)}"
        )


def _other_dtype(dtype: np.dtype) -> str:
    return "choose --dtype bfloat16 or float32" if dtype == np.float16 else "choose another --dtype"


def _locate(model: str | Path, on_download: Callable[[str], None] | None) -> tuple[Path, str]:
    """The checkpoint's folder, and the text that names its source."""
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"the model must be a folder or a name, not {shorten(model)}")
    folder = Path(model)
    # A preset's name means the preset, unless a folder of that name is a checkpoint.
    if exists(folder, CheckpointError) and (model not in PRESETS or exists(folder / "config.json", CheckpointError)):
        if not folder.is_dir():
            raise CheckpointError(
                f"{shorten_path(model)} is a file; pass the folder that holds it together with its config.json"
            )
        return folder, str(model)
    repo_id = hub_id(model) if isinstance(model, str) else None
    if repo_id is None:
        raise CheckpointError(f"no such folder: {shorten_path(model)}; nor is it a model's id on the Hugging Face hub")
    snapshot = hub_snapshot(repo_id, _is_usable, on_download)
    return snapshot, f"{repo_id}@{snapshot.name}"


def _is_usable(folder: Path) -> bool:
    """Whether a folder has all the files that `open_checkpoint` needs, regardless of their content."""
    try:
        _weight_files(folder)
        return exists(folder / "config.json", CheckpointError)
    except CheckpointError:
        return False


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint, and its index (tensor -> file name) if it is sharded."""
    if exists(folder / _WEIGHTS, CheckpointError):
        return [folder / _WEIGHTS], None
    if exists(folder / _INDEX, CheckpointError):
        index = _read_index(folder / _INDEX)
        files = [folder / name for name in sorted(set(index.values()))]
        for file in files:
            if not exists(file, CheckpointError):
                raise CheckpointError(
                    f"{shorten_path(file)} is missing although {_INDEX} lists it; get the checkpoint anew"
                )
        return files, index
    for pattern in _PICKLES:
        for file in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{shorten_path(folder)} has its weights only as a pickle ({shorten_path(file.name)}), which is never "
                f"read; convert it where you trust it: {_CONVERT}"
            )
    for file in sorted(folder.glob("*.onnx")):
        raise CheckpointError(
            f"{shorten_path(folder)} has its weights as ONNX; name the file itself: {shorten_path(file)}"
        )
    raise CheckpointError(
        f"{shorten_path(folder)} has neither {_WEIGHTS} nor {_INDEX}; save the weights in that form: {_CONVERT}"
    )


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path, CONFIG_BYTES, CheckpointError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{shorten_path(path)} has no weight_map; it should map each tensor to its file")
    for name, file in weight_map.items():
        # Plain names only: a path could lead out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file, re.ASCII):
            raise CheckpointError(
                f"{shorten_path(path)} maps {shorten_path(name)} to {shorten(file)}, which is not the name of a "
                "safetensors file beside it"
            )
    return weight_map


@contextmanager
def _safetensors_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{shorten_path(file)} is not a readable safetensors file ({one_line(error)}); get it anew"
        ) from None


def _opened(file: Path) -> Any:
    # safetensors would wait for the writer of a pipe, and reports an unreadable file as missing.
    with opened(file, CheckpointError), _safetensors_errors(file):
        return safe_open(file, framework="numpy")


def _read_header(file: Path) -> list[_StoredTensor]:
    """Names, shapes and dtypes of a file's tensors; safetensors has checked that the data is as long as they say."""
    with _opened(file) as handle, _safetensors_errors(file):
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a dictionary
        return [_StoredTensor(file, key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()]


def _check_index(folder: Path, index: dict[str, str], stored: list[_StoredTensor]) -> None:
    found = {(tensor.key, tensor.file.name) for tensor in stored}
    problems = [f"{shorten_path(key)} is not in {file}" for key, file in index.items() if (key, file) not in found]
    problems += [
        f"{shorten_path(key)} is in {file} but not listed" for key, file in sorted(found) if index.get(key) != file
    ]
    if problems:
        raise CheckpointError(f"{shorten_path(folder / _INDEX)} does not fit its shards: {_listed(problems)}")


def _match(config: GPT2Config, source: str, stored: list[_StoredTensor]) -> tuple[dict[str, _StoredTensor], list[str]]:
    """Canonical name -> stored tensor, and notes on what was left out.

    Stored tensors are the parameters of `config`, and possibly a copy of a tied head. Tensors of other heads, outside
    the transformer, are left out; unknown tensors inside it would change what it computes.
    """
    shapes = param_shapes(config)
    optional = {"lm_head.weight": shapes["wte.weight"]} if config.tie_word_embeddings else {}
    tensors: dict[str, _StoredTensor] = {}
    problems, heads, wrappers = [], [], set()
    for tensor in stored:
        shown, parts = shorten_path(tensor.key), tensor.key.split(".")
        wrappers |= _WRAPPERS.keys() & set(parts)
        key = ".".join(part for part in parts if part not in _WRAPPERS)
        name = key.removeprefix("transformer.")
        expected = shapes.get(name) or optional.get(name)
        if _MASK_BUFFER.fullmatch(name):
            continue
        if expected is None:
            if key == name and name.partition(".")[0] not in _BODY:
                heads.append(shown)
            else:
                problems.append(f"{shown} is not a parameter of this GPT-2")
        elif name in tensors:
            problems.append(f"{name} is there twice, as {shorten_path(tensors[name].key)} and {shown}")
        elif tensor.dtype not in _STORED_DTYPES:
            problems.append(f"{shown} is {tensor.dtype}, not one of {', '.join(_STORED_DTYPES)}")
        elif tensor.shape != expected:
            problems.append(f"{shown} is {tensor.shape}, expected {expected}{_transposed(tensor.shape, expected)}")
        tensors.setdefault(name, tensor)
    if config.tie_word_embeddings and "wte.weight" not in tensors and "lm_head.weight" in tensors:
        # safetensors' save_model stores only one of several tensors that share memory.
        tensors["wte.weight"] = tensors.pop("lm_head.weight")
    missing = [f"{name} {shape} is missing" for name, shape in shapes.items() if name not in tensors]
    if missing:  # then these are not heads but misnamed parameters
        problems += [f"{head} is not a parameter of this GPT-2" for head in heads]
    if problems or missing:
        raise CheckpointError(f"{shorten_path(source)} does not fit its config.json: {_listed(problems + missing)}")
    notes = [f"the checkpoint's other heads are left out: {_listed(heads)}"] if heads else []
    notes += [f"{part!r} in the tensors' names is left out: {_WRAPPERS[part]} added it" for part in sorted(wrappers)]
    return {name: tensors[name] for name in (*shapes, *optional) if name in tensors}, notes


def _transposed(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    is_transposed = len(shape) == 2 and shape == expected[::-1]
    return " (stored as torch.nn.Linear stores it; GPT-2's Conv1D is the transpose)" if is_transposed else ""


def _listed(problems: list[str]) -> str:
    more = len(problems) - _NAMED_PROBLEMS
    return "; ".join(problems[:_NAMED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
