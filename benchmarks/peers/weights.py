"""The weights that peers are built from: a folder that can be read with only NumPy, in any peer's Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.runtime.artifact import Artifact

_CONFIG = "config.json"


def write_weights(artifact: Artifact, folder: Path) -> None:
    """Writes an artifact's configuration and the float32 values of its parameters after quantization.

    Raises:
        ArtifactError: the artifact is damaged.
    """
    (folder / _CONFIG).write_text(json.dumps(artifact.config.to_dict()), encoding="utf-8")
    for name, array in _values(artifact):
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array, np.float32))
    artifact.parameters.close()


def _values(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    if artifact.quantization == "none":
        for name in param_shapes(artifact.config):
            yield name, artifact.parameters.read(name)
        return
    from tvm_attn.model.params import effective_params

    yield from effective_params(artifact.config, artifact.parameters.read, artifact.quantization)


class Weights:
    """The canonical parameters in a folder that `write_weights` made.

    Attributes:
        config: the model's hyperparameters.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config = GPT2Config.from_dict(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))

    def read(self, name: str) -> np.ndarray:
        """One parameter, float32."""
        array: np.ndarray = np.load(self._folder / f"{name}.npy", allow_pickle=False)
        return array

    def all(self) -> dict[str, np.ndarray]:
        """Every parameter by its canonical name."""
        return {name: self.read(name) for name in param_shapes(self.config)}

    @property
    def head(self) -> str:
        """Name of the (V, E) matrix that computes the logits."""
        return "wte.weight" if self.config.tie_word_embeddings else "lm_head.weight"
