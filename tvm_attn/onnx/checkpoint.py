"""GPT-2 in an ONNX file, as a checkpoint: the graph is followed from its inputs to its logits.

The graph is traced twice where it can be, without past keys and values and with some, on a few tokens; both must be the
same GPT-2. Nothing depends on the names of nodes or weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn.config import TOKEN_IDS, GPT2Config
from tvm_attn.errors import CheckpointError, ConfigError, OnnxError, TokenizerError, TvmAttnError, one_line
from tvm_attn.jsonfile import CONFIG_BYTES, exists, parse_json, read_json, shorten_path
from tvm_attn.model.generation import read_generation_config
from tvm_attn.model.tokenizer import CheckpointTokenizer, read_tokenizer
from tvm_attn.onnx import fused
from tvm_attn.onnx.inputs import Inputs
from tvm_attn.onnx.reader import OnnxFile, read_onnx
from tvm_attn.onnx.recover import Recovered, recover
from tvm_attn.onnx.trace import Refused, Trace

_PAST = 3  # past tokens of the second trace


@dataclass(frozen=True, eq=False)
class OnnxCheckpoint:
    """A GPT-2 that was recognised in an ONNX file; the same interface as `tvm_attn.model.checkpoint.Checkpoint`.

    Attributes:
        config: the hyperparameters; token ids are those of a `config.json` in the file's metadata or beside it.
        source: the file as given by the user.
        folder: its folder, where a tokenizer may be.
        generation: recommended sampling options, see `read_generation_config`.
        notes: what the user should know, one line each.
    """

    config: GPT2Config
    source: str
    folder: Path
    generation: Mapping[str, Any]
    notes: tuple[str, ...]
    _params: Mapping[str, np.ndarray]
    _inputs: Inputs
    _tokens: str

    def params(self) -> Iterator[tuple[str, np.ndarray]]:
        """Canonical name and array of every parameter, in canonical order and in the file's dtype.

        Raises OnnxError, naming the parameter, if a value is NaN or infinite.
        """
        for name, array in self._params.items():
            if not np.isfinite(array).all():
                raise OnnxError(f"{name} in {shorten_path(self.source)} has NaN or infinite values; get the file anew")
            yield name, array

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer beside the file; none if it does not fit."""
        try:
            return read_tokenizer(self.folder, self.config.vocab_size)
        except TokenizerError as error:
            return CheckpointTokenizer(None, (f"the tokenizer beside the file is left out: {one_line(error)}",))

    @property
    def rounds(self) -> bool:
        """Whether the file computes with activations of 8 bits."""
        return fused.ROUNDED in self.notes

    def original(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Token ids (B, T) and the logits (B, T, vocab_size) that ONNX Runtime computes for them with the file itself.

        None if the file has no logits, or needs past keys and values.

        Raises:
            OnnxError: ONNX Runtime refuses the file.
        """
        if "the file ends before the head" in " ".join(self.notes):
            return None
        return self._inputs.original(Path(self.source), self._tokens, self.config.vocab_size)


def open_onnx(path: str | Path) -> OnnxCheckpoint:
    """Recognises GPT-2 in an ONNX file.

    Raises:
        OnnxError: onnx is not installed, the file is not readable, or it does not hold GPT-2; the message names the
            first node that does not fit.
        ConfigError, CheckpointError: a `config.json` beside it is unreadable.
    """
    file = read_onnx(path)
    try:
        recovered, inputs = _recognise(file)
    except Refused as reason:
        raise OnnxError(f"{shorten_path(path)} is not a GPT-2 that can be imported: {reason}") from None
    except (MemoryError, RecursionError) as error:
        raise OnnxError(f"{shorten_path(path)} needs too much memory ({type(error).__name__})") from None
    folder = Path(path).parent
    config, notes = _with_token_ids(recovered.config, file, folder)
    config, generation, more = read_generation_config(folder, config)
    return OnnxCheckpoint(
        config,
        str(path),
        folder,
        generation,
        (*recovered.notes, *notes, *more),
        recovered.params,
        inputs,
        recovered.tokens,
    )


def _recognise(file: OnnxFile) -> tuple[Recovered, Inputs]:
    first: tuple[Recovered, Inputs] | None = None
    for past in Inputs.past_lengths(file.graph, _PAST):
        inputs = Inputs(file.graph, past)
        trace = Trace(file.opset, inputs.batch, inputs.length, inputs.past)
        output = inputs.logits
        trace.only([output])
        (logits,) = trace.run(file.graph, inputs.values(trace.space), [output])
        found = recover(trace, logits)
        if first is None:
            first = found, inputs
        elif found.config != first[0].config or not all(
            array is first[0].params[name] or np.array_equal(array, first[0].params[name], equal_nan=True)
            for name, array in found.params.items()
        ):
            raise Refused("with past keys and values it computes another model than without")
    if first is None:
        raise Refused("it takes no past of any length")
    return first


def _with_token_ids(config: GPT2Config, file: OnnxFile, folder: Path) -> tuple[GPT2Config, list[str]]:
    """The configuration with the token ids of a `config.json`, or GPT-2's own where the vocabulary is GPT-2's."""
    found: Any = None
    try:
        if "config.json" in file.metadata:
            found = parse_json(file.metadata["config.json"], "config.json in the metadata", CheckpointError)
        elif exists(folder / "config.json", CheckpointError):
            found = read_json(folder / "config.json", CONFIG_BYTES, CheckpointError)
        known = GPT2Config.from_dict(found) if found is not None else GPT2Config()
    except TvmAttnError as error:
        return config, [f"the token ids of config.json are left out: {one_line(error)}"]
    if known.vocab_size != config.vocab_size:
        return config, []  # a folder of several models
    try:
        return replace(config, **{name: getattr(known, name) for name in TOKEN_IDS}), []
    except ConfigError as error:
        return config, [f"the token ids of config.json are left out: {one_line(error)}"]
