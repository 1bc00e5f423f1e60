"""CTranslate2: its decoder specification filled with GPT-2's weights, run by greedy generation."""

# mypy: disable-error-code="import-not-found, import-untyped"
from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.server import serve
from benchmarks.peers.weights import Weights
from tvm_attn.benchmark.system import MAX_CALLS, MIN_CALLS, Case, Float32Array, Int32Array, System, prompts

_STEPS = 16
"""Tokens to generate after a context to time decoding."""


class CTranslate2System(System):
    """A generator over the given weights. Its cache lives within one generation, so decode is timed between tokens."""

    def __init__(self, weights: Weights, precision: str, threads: int, scratch: Path) -> None:
        import ctranslate2

        self.name, self.version, self.precision = "CTranslate2", ctranslate2.__version__, precision
        self.vocabulary, self._positions = weights.config.vocab_size, weights.config.n_positions
        folder = scratch / "model"
        folder.mkdir()
        _write_model(weights, folder)
        self._generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )

    def _generate(self, ids: Int32Array, count: int, callback: Any) -> Any:
        tokens = [[str(token) for token in row] for row in ids.tolist()]
        return self._generator.generate_batch(
            tokens,
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            callback=callback,
        )

    def fill(self, case: Case) -> None:
        """See `System.fill`; every generation fills its own cache."""

    def logits(self, ids: Int32Array) -> dict[str, Float32Array]:
        """See `System.logits`; decode gives none."""
        rows = self._generator.forward_batch([ids.tolist()])
        return {"prefill": np.array(rows, np.float32)[0, -1]}

    def time(self, case: Case, seconds: float) -> list[float]:
        """See `System.time`. Decode: the times between the tokens of a generation after the context."""
        inputs = prompts(case, self.vocabulary)
        times: list[float] = []
        end = None
        while end is None or len(times) < MIN_CALLS or (time.perf_counter() < end and len(times) < MAX_CALLS):
            stamps = [time.perf_counter()] if case.phase == "prefill" else []
            count = 1 if case.phase == "prefill" else 1 + min(_STEPS, self._positions - case.tokens)
            self._generate(inputs, count, _stamp_first(stamps))
            if end is None:
                end = time.perf_counter() + seconds
            else:
                times += np.diff(stamps).tolist()
        return times


def _stamp_first(stamps: list[float]) -> Any:
    """A callback that notes the time of every token of the first sequence."""

    def note(step: Any) -> bool:
        if step.batch_id == 0:
            stamps.append(time.perf_counter())
        return False

    return note


def _write_model(weights: Weights, folder: Path) -> None:
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    config = weights.config
    activations = {
        "gelu_new": Activation.GELUTanh,
        "gelu": Activation.GELU,
        "relu": Activation.RELU,
        "silu": Activation.SWISH,
        "tanh": Activation.Tanh,
    }
    spec = TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=activations[config.activation_function]
    )

    def linear(place: Any, name: str) -> None:
        place.weight = np.ascontiguousarray(weights.read(f"{name}.weight").T)
        place.bias = weights.read(f"{name}.bias")

    def norm(place: Any, name: str) -> None:
        place.gamma, place.beta = weights.read(f"{name}.weight"), weights.read(f"{name}.bias")

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights.read("wte.weight")
    decoder.position_encodings.encodings = weights.read("wpe.weight")
    decoder.projection.weight = weights.read(weights.head)
    norm(decoder.layer_norm, "ln_f")
    for index, layer in enumerate(decoder.layer):
        name = f"h.{index}"
        norm(layer.self_attention.layer_norm, f"{name}.ln_1")
        linear(layer.self_attention.linear[0], f"{name}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"{name}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"{name}.ln_2")
        linear(layer.ffn.linear_0, f"{name}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"{name}.mlp.c_proj")
    # Tokens are named by their ids; generation never ends early, because its least length equals its most.
    spec.register_vocabulary([str(token) for token in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon
    spec.validate()
    spec.optimize(quantization=None)
    spec.save(str(folder))


if __name__ == "__main__":
    serve("ctranslate2", CTranslate2System)
