"""GPT-2 in PyTorch, written for speed: fused attention, a KV cache of fixed size, CUDA graphs.

The compiled model is measured against this, and checked against `tvm_attn.model.reference`. Letters: B sequences, T
tokens, E width, H heads, D head size, P positions of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_attn.benchmark.system import Float32Array, Int32Array
from tvm_attn.config import GPT2Config

if TYPE_CHECKING:
    from torch import Tensor

_BUCKET = 128
"""Positions that a captured decode step looks at are a multiple of this."""

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
"""PyTorch's names of the kernels that scaled_dot_product_attention can use."""


def attention_backend(name: str | None) -> AbstractContextManager[Any]:
    """A context in which scaled_dot_product_attention uses one backend or fails; None leaves the choice to PyTorch."""
    if name is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    context: AbstractContextManager[Any] = sdpa_kernel(getattr(SDPBackend, BACKENDS[name]))
    return context


class TorchModel:
    """Weights and the KV cache on a device.

    Args:
        config: the model's hyperparameters.
        params: canonical names and arrays, see `tvm_attn.config.param_shapes`.
        dtype: dtype of weights, cache and activations.
        device: the device's name in PyTorch.
        max_batch: sequences that the cache has room for.
        backend: name in `BACKENDS` for attention of prompts; None leaves the choice to PyTorch.
    """

    def __init__(
        self,
        config: GPT2Config,
        params: Iterable[tuple[str, np.ndarray]],
        dtype: str,
        device: str,
        max_batch: int,
        backend: str | None = None,
    ) -> None:
        import torch

        self._torch, self.config, self.device, self._backend = torch, config, torch.device(device), backend
        self._dtype = getattr(torch, dtype)
        # Linear layers are (out, in), like PyTorch's own.
        self._params = {name: self._stored(name, array) for name, array in params}
        shape = (config.n_layer, 2, max_batch, config.n_head, config.n_positions, config.head_dim)
        self._cache = torch.zeros(shape, dtype=self._dtype, device=self.device)
        self._block: Callable[..., Tensor] = self._one_block

    def compile(self) -> None:
        """Compiles the model's block with torch.compile; the first calls then take seconds."""
        self._block = self._torch.compile(self._one_block, dynamic=False)

    def _stored(self, name: str, array: np.ndarray) -> Tensor:
        tensor = to_torch(array, self.device).to(self._dtype)
        linear = array.ndim == 2 and name.startswith("h.")
        return tensor.t().contiguous() if linear else tensor

    def ids(self, ids: Int32Array) -> Tensor:
        """Token ids on the device, int64."""
        tensor: Tensor = self._torch.from_numpy(ids.astype(np.int64)).to(self.device)
        return tensor

    def prefill(self, ids: Tensor) -> Tensor:
        """Prompts (B, T) from position 0 on; returns the last tokens' logits (B, V)."""
        tokens = ids.shape[1]
        return self._logits(ids, self._torch.arange(tokens, device=self.device), tokens, None)

    def decode(self, ids: Tensor, position: int) -> Tensor:
        """One token per sequence, ids (B,), all at one position; returns logits (B, V)."""
        place = self._torch.tensor([position], device=self.device)
        return self._logits(ids[:, None], place, position + 1, None)

    def step(self, ids: Tensor, position: Tensor, length: int) -> Tensor:
        """Like `decode`, with the position (1,) on the device: attention looks at `length` positions with a mask."""
        mask = self._torch.arange(length, device=self.device)[None] <= position
        return self._logits(ids[:, None], position, length, mask)

    def _logits(self, ids: Tensor, positions: Tensor, length: int, mask: Tensor | None) -> Tensor:
        torch, params, config = self._torch, self._params, self.config
        # A backend is chosen only for prompts: some cannot run a single token, which would exclude the peer.
        backend = self._backend if ids.shape[1] > 1 else None
        with torch.inference_mode(), attention_backend(backend):
            x = params["wte.weight"][ids] + params["wpe.weight"][positions]
            for layer in range(config.n_layer):
                weights = [params[f"h.{layer}.{name}"] for name in _BLOCK]
                cache = self._cache[layer, :, : len(ids)]
                x = self._block(x, weights, cache, positions, length, mask, config.attention_scale(layer))
            head = params["wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
            last = self._norm(x[:, -1], params["ln_f.weight"], params["ln_f.bias"])
            logits: Tensor = torch.nn.functional.linear(last, head)
            return logits

    def _one_block(
        self,
        x: Tensor,
        weights: list[Tensor],
        cache: Tensor,
        positions: Tensor,
        length: int,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        functional = self._torch.nn.functional
        norm_w, norm_b, qkv_w, qkv_b, out_w, out_b, norm2_w, norm2_b, in_w, in_b, mlp_w, mlp_b = weights
        (B, T, E), config = x.shape, self.config
        qkv = functional.linear(self._norm(x, norm_w, norm_b), qkv_w, qkv_b)
        q, k, v = qkv.view(B, T, 3, config.n_head, config.head_dim).permute(2, 0, 3, 1, 4)
        cache[0].index_copy_(2, positions, k)
        cache[1].index_copy_(2, positions, v)
        # A prompt attends to its own keys and values, a token to those in the cache.
        keys, values = (k, v) if T > 1 else (cache[0, :, :, :length], cache[1, :, :, :length])
        attended = functional.scaled_dot_product_attention(q, keys, values, mask, is_causal=T > 1, scale=scale)
        x = x + functional.linear(attended.transpose(1, 2).reshape(B, T, E), out_w, out_b)
        hidden = self._activation(functional.linear(self._norm(x, norm2_w, norm2_b), in_w, in_b))
        return x + functional.linear(hidden, mlp_w, mlp_b)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, self.config.layer_norm_epsilon)

    def _activation(self, x: Tensor) -> Tensor:
        functional, name = self._torch.nn.functional, self.config.activation_function
        if name == "gelu_new":
            return functional.gelu(x, approximate="tanh")
        activations: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": functional.gelu,
            "relu": functional.relu,
            "silu": functional.silu,
            "tanh": self._torch.tanh,
        }
        return activations[name](x)


_BLOCK = tuple(
    f"{layer}.{kind}"
    for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
)
"""The parameters of a block, in the order of `_one_block`'s arguments."""


class CapturedStep:
    """`TorchModel.step` and the greedy choice of the next token as a CUDA graph; ids and position stay on the device.

    Args:
        model: the model.
        batch: number of sequences.
        length: positions that attention looks at.
    """

    def __init__(self, model: TorchModel, batch: int, length: int) -> None:
        import torch

        self._model, self._length = model, length
        self.ids = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.logits: Tensor | None = None
        self._expected: tuple[Int32Array, int] | None = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):  # libraries choose their kernels, and torch.compile compiles
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.inference_mode():
            self._advance()

    def _advance(self) -> None:
        self.logits = self._model.step(self.ids, self.position, self._length)
        self.ids.copy_(self.logits.argmax(-1))
        # Past the length there is nothing to attend to; the capture may run at any position.
        self.position.add_(1).clamp_(max=self._length - 1)

    def run(self, ids: Int32Array, position: int) -> Tensor:
        """Launches the graph; ids and position are uploaded only if the last launch did not leave them there."""
        expected = self._expected
        if expected is None or expected[1] != position or not np.array_equal(expected[0], ids):
            self.ids.copy_(self._model.ids(ids))
            self.position.fill_(position)
        self._expected = None
        self._graph.replay()
        assert self.logits is not None
        return self.logits

    def chosen(self, position: int) -> Int32Array:
        """The ids chosen by the step at a position."""
        ids: Int32Array = self.ids.cpu().numpy().astype(np.int32)
        self._expected = ids, position + 1
        return ids


class CapturedSteps:
    """One `CapturedStep` for each batch size and multiple of `_BUCKET` positions, made when needed."""

    def __init__(self, model: TorchModel) -> None:
        self._model = model
        self._steps: dict[tuple[int, int], CapturedStep] = {}

    def get(self, batch: int, position: int) -> CapturedStep:
        """The step for a batch size and position."""
        length = min(-(-(position + 1) // _BUCKET) * _BUCKET, self._model.config.n_positions)
        if (batch, length) not in self._steps:
            self._steps[batch, length] = CapturedStep(self._model, batch, length)
        return self._steps[batch, length]


def to_torch(array: np.ndarray, device: Any) -> Tensor:
    """An array on a device; PyTorch does not know NumPy's bfloat16, but has the same bits."""
    import torch

    writable = np.array(array)
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(writable.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(writable).to(device)


def to_numpy(logits: Tensor) -> Float32Array:
    """Logits on the host, float32."""
    array: Float32Array = logits.float().cpu().numpy()
    return array
