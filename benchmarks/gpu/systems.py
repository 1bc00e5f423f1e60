"""The systems that take turns on a GPU, all in one process: the compiled model, and several PyTorch systems."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.torch_model import CapturedSteps, TorchModel, to_numpy, to_torch
from benchmarks.peers import GPU_PEERS
from tvm_attn.benchmark.ours import CompiledGpuSystem
from tvm_attn.benchmark.system import CachedSystem, Float32Array, GreedySystem, Int32Array
from tvm_attn.config import GPT2Config


class TorchGpuSystem(GreedySystem):
    """`TorchModel`, eager or with captured decode steps.

    Args:
        model: the model.
        precision: its dtype.
        name: its name in tables.
        captured: whether decode steps are CUDA graphs.
    """

    def __init__(self, model: TorchModel, precision: str, name: str, captured: bool) -> None:
        import torch

        self.name, self.version, self.precision = name, torch.__version__, precision
        self.positions, self.vocabulary = model.config.n_positions, model.config.vocab_size
        self._model = model
        self._steps = CapturedSteps(model) if captured else None
        self._last: tuple[Any, int] | None = None

    def prefill(self, prompts: Int32Array) -> Any:
        """See `CachedSystem.prefill`."""
        self._last = None
        return self._model.prefill(self._model.ids(prompts))

    def decode(self, token_ids: Int32Array, context: int) -> Any:
        """See `CachedSystem.decode`."""
        if self._steps is None:
            return self._model.decode(self._model.ids(token_ids), context)
        step = self._steps.get(len(token_ids), context)
        self._last = step, context
        return step.run(token_ids, context)

    def argmax(self, logits: Any) -> Int32Array:
        """See `CachedSystem.argmax`; captured steps have chosen already."""
        if self._last is not None:
            step, context = self._last
            ids: Int32Array = step.chosen(context)
            return ids
        chosen: Int32Array = logits.argmax(-1).cpu().numpy().astype(np.int32)
        return chosen

    def numpy(self, logits: Any) -> Float32Array:
        """See `CachedSystem.numpy`."""
        return to_numpy(logits)


class TransformersSystem(GreedySystem):
    """transformers' GPT2LMHeadModel with its own cache, eager."""

    def __init__(self, config: GPT2Config, params: Iterable[tuple[str, np.ndarray]], dtype: str, device: str) -> None:
        import torch
        import transformers

        self._torch, self._device, self._cache = torch, torch.device(device), None
        self.name, self.version, self.precision = "transformers", transformers.__version__, dtype
        self.positions, self.vocabulary = config.n_positions, config.vocab_size
        settings = transformers.GPT2Config(**config.to_dict() | {"attn_implementation": "sdpa"})
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(settings)
        kind = getattr(torch, dtype)
        state = {_hugging_face_name(name): to_torch(array, self._device).to(kind) for name, array in params}
        state["lm_head.weight"] = state.get("lm_head.weight", state["transformer.wte.weight"])
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        self._model = model.eval()

    def prefill(self, prompts: Int32Array) -> Any:
        """See `CachedSystem.prefill`."""
        self._cache = None
        return self._run_model(prompts)

    def decode(self, token_ids: Int32Array, context: int) -> Any:
        """See `CachedSystem.decode`."""
        return self._run_model(token_ids[:, None])

    def _run_model(self, ids: Int32Array) -> Any:
        with self._torch.inference_mode():
            inputs = self._torch.from_numpy(ids.astype(np.int64)).to(self._device)
            output = self._model(inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return output.logits[:, -1]

    def argmax(self, logits: Any) -> Int32Array:
        """See `CachedSystem.argmax`."""
        chosen: Int32Array = logits.argmax(-1).cpu().numpy().astype(np.int32)
        return chosen

    def rewind(self, context: int) -> None:
        """See `CachedSystem.rewind`."""
        cache: Any = self._cache
        cache.crop(context - cache.get_seq_length())  # a negative number: tokens to remove

    def numpy(self, logits: Any) -> Float32Array:
        """See `CachedSystem.numpy`."""
        return to_numpy(logits)


def _hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"transformer.{name}"


Params = Callable[[], Iterable[tuple[str, np.ndarray]]]


def make_peer(name: str, config: GPT2Config, params: Params, dtype: str, device: str, max_batch: int) -> CachedSystem:
    """Builds a peer; raises whatever PyTorch raises."""
    if name == "transformers":
        return TransformersSystem(config, params(), dtype, device)
    peer = GPU_PEERS[name]
    model = TorchModel(config, params(), dtype, device, max_batch, peer.backend)
    if peer.compiled:
        model.compile()
    return TorchGpuSystem(model, dtype, peer.description, peer.captured)


def open_compiled(folder: Path, device: str, max_batch: int) -> CompiledGpuSystem:
    """The artifact's library on a GPU."""
    from tvm_attn.runtime.machine import usable_cores

    return CompiledGpuSystem(folder, usable_cores(), max_batch, device)
