"""The model that a build compiles: configuration, parameters, tokenizer; from a checkpoint or with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_attn._resources import resource_dir
from tvm_attn.config import PRESETS, GPT2Config
from tvm_attn.errors import CheckpointError, GenerationError, one_line, shorten
from tvm_attn.model.checkpoint import (
    RANDOM_SOURCE,
    Checkpoint,
    CheckpointUnavailable,
    open_checkpoint,
    random_params,
    read_config,
)
from tvm_attn.model.generation import GENERATION_CONFIG
from tvm_attn.runtime.decoding import GenerationOptions

if TYPE_CHECKING:
    from tvm_attn.onnx.checkpoint import OnnxCheckpoint

_RANDOM = (
    "random weights: right for measuring speed, but the text means nothing; the artifact will have no tokenizer: "
    "prompts are token ids (--prompt-ids 1,2,3)"
)


@dataclass(frozen=True)
class Weights:
    """A model to build.

    Attributes:
        name: a short name, the default name of the artifact's folder; random weights do not have the checkpoint's name.
        config: its configuration.
        source: where the parameters come from.
        checkpoint: the checkpoint or ONNX file with the parameters; None for random ones.
        generation: options that the checkpoint's generation_config.json asks for.
        notes: what the user should know before a build, one line each.
    """

    name: str
    config: GPT2Config
    source: str
    checkpoint: Checkpoint | OnnxCheckpoint | None
    generation: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def params(self) -> Iterator[tuple[str, np.ndarray]]:
        """Canonical name and array of every parameter; see `Checkpoint.params` and `random_params`."""
        return random_params(self.config) if self.checkpoint is None else self.checkpoint.params()

    def tokenizer_json(self) -> str | None:
        """The text of `tokenizer.json`; None if there is no tokenizer."""
        return None if self.checkpoint is None else self.checkpoint.tokenizer.text


def open_weights(model: str | Path, random: bool = False, on_download: Callable[[str], None] | None = None) -> Weights:
    """The model that `--model` names.

    Args:
        model: a published size ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), a checkpoint's folder, a Hugging Face
            hub id, "demo", the small model that comes with tvm_attn, or an ONNX file of GPT-2.
        random: use random weights of that size, the same ones every time, instead of its own, and no tokenizer. Only
            config.json of a folder is read; hub ids are not looked up.
        on_download: called with the hub id before a download.

    Raises:
        CheckpointError, ConfigError: the checkpoint is not usable.
        CheckpointUnavailable: it is not on this machine, and the hub does not provide it.
        OnnxError: the ONNX file is not readable, or does not hold GPT-2.
    """
    name = _name(Path(os.path.abspath(model)))  # "." and ".." have names too
    if str(model) == "":
        raise CheckpointError("the model's name is empty; name a size such as gpt2, a folder, or demo")
    # As for a published size: only a checkpoint of that name is meant instead, not an artifact built there.
    if str(model) == "demo" and not os.path.isfile(Path(model) / "config.json"):
        model = resource_dir("models/demo")
    try:
        if random:
            return Weights(f"{name}-random", _config(model), RANDOM_SOURCE, None, notes=(_RANDOM,))
        checkpoint = _open_onnx(model) if _is_onnx(model) else open_checkpoint(model, on_download=on_download)
    except CheckpointUnavailable as error:
        if str(model) not in PRESETS:
            raise
        raise CheckpointUnavailable(f"{error}; or measure its speed with --random-weights") from None
    except OSError as error:  # the name is too long, or the folder may not be searched
        raise CheckpointError(f"{shorten(str(model), 120)} cannot be read ({error.strerror}); name another") from None
    generation, notes = dict(checkpoint.generation), [*checkpoint.notes, *checkpoint.tokenizer.notes]
    try:
        GenerationOptions(**generation)
    except GenerationError as error:
        notes.append(f"the sampling settings of {GENERATION_CONFIG} are left out: {one_line(error)}")
        generation = {}
    return Weights(name, checkpoint.config, checkpoint.source, checkpoint, generation, tuple(notes))


def open_config(model: str | Path) -> GPT2Config:
    """The configuration of the model that `--model` names; for a published size no checkpoint is needed.

    Raises:
        CheckpointError, ConfigError: there is none, or it is not usable.
    """
    return _preset(model) or open_weights(model).config


def _preset(model: str | Path) -> GPT2Config | None:
    """The configuration of a published size, unless a folder of that name is a checkpoint."""
    return None if str(model) not in PRESETS or (Path(model) / "config.json").is_file() else PRESETS[str(model)]


def _config(model: str | Path) -> GPT2Config:
    folder = Path(model)
    if preset := _preset(model):
        return preset
    if _is_onnx(model):
        return _open_onnx(model).config
    if not folder.is_dir():
        raise CheckpointError(
            f"random weights need a size, and {model} is neither a folder nor one of {', '.join(PRESETS)}"
        )
    return read_config(folder)


def _is_onnx(model: str | Path) -> bool:
    return Path(model).suffix.lower() == ".onnx" and not os.path.isdir(model)


def _name(path: Path) -> str:
    """A model's short name: an ONNX file's without its suffix, or its folder's if every such file is called so."""
    if not _is_onnx(path):
        return path.name
    return (
        path.parent.name or path.stem if path.stem in ("model", "decoder_model", "decoder_model_merged") else path.stem
    )


def _open_onnx(model: str | Path) -> OnnxCheckpoint:
    from tvm_attn.onnx.checkpoint import open_onnx

    return open_onnx(model)
