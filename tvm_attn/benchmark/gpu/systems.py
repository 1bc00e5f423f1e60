"""The systems that take turns on a GPU, all in one process: the compiled model, and PyTorch in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn.benchmark.gpu.torch_model import CapturedSteps, TorchModel, to_numpy, to_torch
from tvm_attn.benchmark.ours import CompiledSystem
from tvm_attn.benchmark.system import MAX_CALLS, MIN_CALLS, CachedSystem, Case, Float32Array, Int32Array, prompts
from tvm_attn.config import GPT2Config

_RUN = 24
"""Tokens that are decoded one after the other before the position goes back to the case's."""


class _Greedy(CachedSystem):
    """Decode cases as they are in use: each step gets the token that the last one chose, at the next position."""

    config: GPT2Config

    def time(self, case: Case, seconds: float) -> list[float]:
        """See `System.time`."""
        if case.phase == "prefill":
            return super().time(case, seconds)
        ids = prompts(case, self.vocabulary)[:, 0]
        self._run(case, ids)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < MIN_CALLS or (time.perf_counter() < end and len(times) < 5 * MAX_CALLS):
            times += self._run(case, ids)
        return times

    def _run(self, case: Case, ids: Int32Array) -> list[float]:
        times = []
        for position in range(case.tokens, min(case.tokens + _RUN, self.config.n_positions)):
            start = time.perf_counter()
            ids = self.argmax(self.decode(ids, position))
            times.append(time.perf_counter() - start)
        self.rewind(case.tokens)
        return times


class CompiledGpuSystem(_Greedy, CompiledSystem):
    """An artifact's library on a GPU; arguments as `CompiledSystem`'s."""


class TorchGpuSystem(_Greedy):
    """`TorchModel`, eager or with captured decode steps.

    Args:
        model: the model.
        precision: its dtype.
        name: for people.
        captured: whether decode steps are CUDA graphs.
    """

    def __init__(self, model: TorchModel, precision: str, name: str, captured: bool) -> None:
        import torch

        self.name, self.version, self.precision = name, torch.__version__, precision
        self.config, self.vocabulary = model.config, model.config.vocab_size
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


class TransformersSystem(_Greedy):
    """transformers' GPT2LMHeadModel with its own cache, eager."""

    def __init__(self, config: GPT2Config, params: Iterable[tuple[str, np.ndarray]], dtype: str, device: str) -> None:
        import torch
        import transformers

        self._torch, self._device, self._cache = torch, torch.device(device), None
        self.name, self.version, self.precision = "transformers", transformers.__version__, dtype
        self.config, self.vocabulary = config, config.vocab_size
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


@dataclass(frozen=True)
class GpuPeer:
    """A way to run the model in PyTorch.

    Attributes:
        name: as `--against` names it.
        description: for people.
        backend: of attention, see `TorchModel`.
        captured: decode steps are CUDA graphs.
        compiled: blocks go through torch.compile.
    """

    name: str
    description: str
    backend: str | None = None
    captured: bool = False
    compiled: bool = False


GPU_PEERS = {
    peer.name: peer
    for peer in (
        GpuPeer("torch", "PyTorch, eager"),
        GpuPeer("torch-flash", "PyTorch, eager, SDPA's flash backend", backend="flash"),
        GpuPeer("torch-cudnn", "PyTorch, eager, SDPA's cuDNN backend", backend="cudnn"),
        GpuPeer("torch-graph", "PyTorch, decode as CUDA graphs", captured=True),
        GpuPeer("torch-compile", "PyTorch, torch.compile and CUDA graphs", captured=True, compiled=True),
        GpuPeer("transformers", "transformers, eager"),
    )
}
"""Every peer on a GPU by name."""

Params = Callable[[], Iterable[tuple[str, np.ndarray]]]


def make_peer(name: str, config: GPT2Config, params: Params, dtype: str, device: str, max_batch: int) -> CachedSystem:
    """Builds a peer; whatever PyTorch raises is the reason that it cannot be had."""
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
