"""Reading a GPT-2 checkpoint: `config.json` and safetensors, one tensor in memory at a time.

A checkpoint is a folder in Hugging Face's layout, or an id on the hub. Everything about it is checked before it is
used: its configuration, the names, shapes and dtypes of its tensors (from the files' headers, when it is opened) and
their values (when they are read). Pickled weights are never read.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches numpy, and through it safetensors, the name "bfloat16"
import numpy as np
from safetensors import SafetensorError, safe_open

from tvm_attn.config import PRESETS, GPT2Config, param_shapes
from tvm_attn.errors import CheckpointError, ConfigError, one_line
from tvm_attn.jsonfile import CONFIG_BYTES, read_json
from tvm_attn.model.hub import CheckpointUnavailable, hub_id, hub_snapshot
from tvm_attn.model.tokenizer import tokenizer_json
from tvm_attn.storage import numpy_dtype

__all__ = [
    "RANDOM_SOURCE",
    "Checkpoint",
    "CheckpointUnavailable",
    "cast_params",
    "open_checkpoint",
    "random_params",
]

RANDOM_SOURCE = "random weights, seed 0"
"""What an artifact with `random_params` says of where its weights came from."""

_STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CONVERT = "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(FOLDER, safe_serialization=True)"
# Causal masks that older versions of transformers stored beside the weights.
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_CHUNK = 2**20  # values that one task of random_params draws
_NAMED_PROBLEMS = 4  # how many offending tensors a message lists


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor lies, and what the header of its file says about it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 checkpoint whose tensors have been checked against its configuration by name, shape and dtype.

    `source` says where it came from: the folder as it was given, or `hub-id@revision`.
    """

    config: GPT2Config
    source: str
    folder: Path
    _tensors: Mapping[str, _StoredTensor]

    def params(self) -> Iterator[tuple[str, np.ndarray]]:
        """Canonical name and array of every parameter, in canonical order, in the dtype in which it is stored.

        Each array is read when the iterator reaches it: float64, float32, float16 or ml_dtypes.bfloat16.

        Raises CheckpointError, naming the tensor, where a value is NaN or infinite, or where an `lm_head.weight` is
        stored that differs from the `wte.weight` to which the configuration ties it.
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
                        f"{tensor.key} in {tensor.file} has NaN or infinite values; get the file anew"
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

    def tokenizer_json(self) -> str | None:
        """The checkpoint's tokenizer as the text of a `tokenizer.json`, or None where it has none.

        Raises TokenizerError where its files are malformed or do not fit the vocabulary size.
        """
        return tokenizer_json(self.folder, self.config.vocab_size)


def open_checkpoint(model: str | Path, on_download: Callable[[str], None] | None = None) -> Checkpoint:
    """Open a checkpoint: a local folder, a preset's name (`gpt2`, `gpt2-xl`, ...) or a Hugging Face hub id.

    A model on the hub is taken from the local cache where it is there, and downloaded otherwise; `on_download` is
    called with its id before that. Weights are `model.safetensors`, or shards with `model.safetensors.index.json`,
    their names with or without the prefix `transformer.`.

    Raises CheckpointUnavailable where the model is not on this machine and cannot be had from the hub, CheckpointError
    where its files are missing, unreadable or do not fit, and ConfigError where its `config.json` is unsupported.
    """
    folder, source = _locate(model, on_download)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; a checkpoint needs it beside its safetensors files")
    files, index = _weight_files(folder)
    try:
        config = GPT2Config.from_dict(read_json(folder / "config.json", CONFIG_BYTES, CheckpointError))
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None
    stored = [tensor for file in files for tensor in _read_header(file)]
    if index is not None:
        _check_index(folder, index, stored)
    return Checkpoint(config, source, folder, _match(config, source, stored))


def random_params(config: GPT2Config, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Random parameters in canonical order, float32, at the scale of GPT-2's initialisation.

    Matrices are normal with a standard deviation of 0.02, those that write to the residual stream with
    0.02 / sqrt(2 n_layer) (GPT-2 paper, section 2.3). Biases and LayerNorm's parameters, which training starts at zero
    and one, vary by 0.1 here, so that a check against a reference sees them. Each tensor depends on `seed`, its own
    name and its shape only, not on the tensors before it.
    """
    with ThreadPoolExecutor() as pool:
        for name, shape in param_shapes(config).items():
            array = np.empty(shape, np.float32)
            fill = partial(_fill_normal, array.reshape(-1), [seed, zlib.crc32(name.encode())])
            for _ in pool.map(fill, range(0, array.size, _CHUNK)):
                pass
            if array.ndim == 1:
                array *= 0.1
            else:
                array *= 0.02 / sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                array += 1.0
            yield name, array


def _fill_normal(flat: np.ndarray, seeds: list[int], start: int) -> None:
    """Fill one chunk with standard normal values; chunks have streams of their own, so threads change nothing."""
    # SFC64 is numpy's fastest bit generator; its quality is far beyond what weights need.
    generator = np.random.Generator(np.random.SFC64([*seeds, start]))
    generator.standard_normal(dtype=np.float32, out=flat[start : start + _CHUNK])


def cast_params(params: Iterable[tuple[str, np.ndarray]], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Bring parameters to their stored form: matrices to `dtype`, vectors (biases, LayerNorm) always to float32.

    `dtype` is "float32", "float16" or "bfloat16" (ml_dtypes). Values round to nearest even.

    Raises CheckpointError, naming the tensor, where a finite value would become infinite.
    """
    for name, array in params:
        target = numpy_dtype(dtype if array.ndim > 1 else "float32")
        if array.dtype == target:
            yield name, array
            continue
        with np.errstate(over="ignore"):  # reported below, by name
            cast = array.astype(target)
        if not np.isfinite(cast).all():
            overflows = ~np.isfinite(cast) & np.isfinite(array)
            if overflows.any():
                value = float(array[overflows][0])
                raise CheckpointError(f"{name} holds {value:g}, too large for {target.name}; choose another --dtype")
        yield name, cast


def _locate(model: str | Path, on_download: Callable[[str], None] | None) -> tuple[Path, str]:
    """The checkpoint's folder, and the text that names its source."""
    folder = Path(model)
    # A preset's name means the preset, unless a folder of that name really is a checkpoint.
    if folder.is_dir() and (model not in PRESETS or (folder / "config.json").is_file()):
        return folder, str(model)
    if folder.is_file():
        raise CheckpointError(f"{model} is a file; pass the folder that holds it together with its config.json")
    repo_id = hub_id(model) if isinstance(model, str) else None
    if repo_id is None:
        raise CheckpointError(f"{model} is neither a folder here nor a model's id on the Hugging Face hub")
    snapshot = hub_snapshot(repo_id, _is_usable, on_download)
    return snapshot, f"{repo_id}@{snapshot.name}"


def _is_usable(folder: Path) -> bool:
    """Whether a folder has all the files that `open_checkpoint` needs, whatever is in them."""
    try:
        _weight_files(folder)
    except CheckpointError:
        return False
    return (folder / "config.json").is_file()


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint, and its index (tensor -> file name) where it is sharded."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS], None
    if (folder / _INDEX).is_file():
        index = _read_index(folder / _INDEX)
        files = [folder / name for name in sorted(set(index.values()))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing although {_INDEX} lists it; get the checkpoint anew")
        return files, index
    for pattern in _PICKLES:
        for file in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} has its weights only as a pickle ({file.name}), which is never read; convert it where you "
                f"trust it: {_CONVERT}"
            )
    raise CheckpointError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}; save the weights in that form: {_CONVERT}")


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path, CONFIG_BYTES, CheckpointError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; it should map each tensor to its file")
    for name, file in weight_map.items():
        # Plain names only: a path could lead out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file, re.ASCII):
            raise CheckpointError(
                f"{path} maps {name} to {file!r}, which is not the name of a safetensors file beside it"
            )
    return weight_map


@contextmanager
def _safetensors_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({one_line(error)}); get it anew") from None


def _opened(file: Path) -> Any:
    with _safetensors_errors(file):
        return safe_open(file, framework="numpy")


def _read_header(file: Path) -> list[_StoredTensor]:
    """Names, shapes and dtypes of a file's tensors; safetensors has checked that the data is as long as they say."""
    with _opened(file) as handle, _safetensors_errors(file):
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a dictionary
        return [_StoredTensor(file, key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()]


def _check_index(folder: Path, index: dict[str, str], stored: list[_StoredTensor]) -> None:
    found = {(tensor.key, tensor.file.name) for tensor in stored}
    problems = [f"{key} is not in {file}" for key, file in index.items() if (key, file) not in found]
    problems += [f"{key} is in {file} but not listed" for key, file in sorted(found) if index.get(key) != file]
    if problems:
        raise CheckpointError(f"{folder / _INDEX} does not fit its shards: {_listed(problems)}")


def _match(config: GPT2Config, source: str, stored: list[_StoredTensor]) -> dict[str, _StoredTensor]:
    """Canonical name -> stored tensor, for the parameters that `config` asks for and a stored copy of a tied head."""
    shapes = param_shapes(config)
    optional = {"lm_head.weight": shapes["wte.weight"]} if config.tie_word_embeddings else {}
    tensors: dict[str, _StoredTensor] = {}
    problems = []
    for tensor in stored:
        name = tensor.key.removeprefix("transformer.")
        expected = shapes.get(name) or optional.get(name)
        if _MASK_BUFFER.fullmatch(name):
            continue
        if expected is None:
            problems.append(f"{tensor.key} is not a parameter of this GPT-2")
        elif name in tensors:
            problems.append(f"{name} is there twice, as {tensors[name].key} and {tensor.key}")
        elif tensor.dtype not in _STORED_DTYPES:
            problems.append(f"{tensor.key} is {tensor.dtype}, not one of {', '.join(_STORED_DTYPES)}")
        elif tensor.shape != expected:
            problems.append(f"{tensor.key} is {tensor.shape}, expected {expected}")
        tensors.setdefault(name, tensor)
    problems += [f"{name} {shape} is missing" for name, shape in shapes.items() if name not in tensors]
    if problems:
        raise CheckpointError(f"{source} does not fit its config.json: {_listed(problems)}")
    return tensors


def _listed(problems: list[str]) -> str:
    more = len(problems) - _NAMED_PROBLEMS
    return "; ".join(problems[:_NAMED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
