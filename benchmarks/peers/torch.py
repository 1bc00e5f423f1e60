"""PyTorch: transformers' GPT-2 with scaled-dot-product attention and its KV cache, eager mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.peers.server import serve
from benchmarks.peers.weights import Weights
from tvm_attn.benchmark.system import CachedSystem, Float32Array, Int32Array

if TYPE_CHECKING:
    from torch import Tensor


class TorchSystem(CachedSystem):
    """GPT2LMHeadModel over the given weights."""

    def __init__(self, weights: Weights, precision: str, threads: int, scratch: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        self.name, self.version, self.precision = "PyTorch", torch.__version__, precision
        self.vocabulary = weights.config.vocab_size
        self._cache: Any = None
        config = transformers.GPT2Config(**weights.config.to_dict() | {"attn_implementation": "sdpa"})
        dtype = getattr(torch, precision)
        state = {_hugging_face_name(name): torch.from_numpy(array) for name, array in weights.all().items()}
        state["lm_head.weight"] = state.get("lm_head.weight", state["transformer.wte.weight"])
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(config)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        self._model = model.to(dtype).eval()

    def prefill(self, prompts: Int32Array) -> Tensor:
        """See `CachedSystem.prefill`."""
        return self._run(prompts, None)

    def decode(self, token_ids: Int32Array, context: int) -> Tensor:
        """See `CachedSystem.decode`."""
        return self._run(token_ids[:, None], self._cache)

    def _run(self, ids: Int32Array, cache: Any) -> Tensor:
        torch = self._torch
        with torch.inference_mode():
            inputs = torch.from_numpy(ids.astype(np.int64))
            output = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    def rewind(self, context: int) -> None:
        """See `CachedSystem.rewind`."""
        self._cache.crop(context - self._cache.get_seq_length())  # a negative number: tokens to remove

    def argmax(self, logits: Tensor) -> Int32Array:
        """See `CachedSystem.argmax`."""
        ids: Int32Array = logits.argmax(dim=-1).numpy().astype(np.int32)
        return ids

    def numpy(self, logits: Tensor) -> Float32Array:
        """See `CachedSystem.numpy`."""
        array: Float32Array = logits.float().numpy()
        return array


def _hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"transformer.{name}"


if __name__ == "__main__":
    serve("torch", TorchSystem)
