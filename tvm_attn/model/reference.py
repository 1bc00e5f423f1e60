"""GPT-2 in plain PyTorch: the reference that compiled functions are checked against.

Written from the GPT-2 paper with Hugging Face's parameter names, and independent of both TVM and transformers. In
float64 it is exact enough to measure the rounding of every other dtype, which justifies the tolerances.

It has no cache, recomputes the whole sequence each time and stores all T x T scores: it is not meant to be fast.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from tvm_attn.config import GPT2Config
from tvm_attn.errors import VerificationError
from tvm_attn.storage import GROUP

if TYPE_CHECKING:
    from torch import Tensor


class Reference:
    """GPT-2's forward pass; shapes below use B (batch), T (tokens), E (n_embd), H (n_head), D (head_dim), V (vocab).

    `params` are the canonical parameters in float32, float64, float16 or ml_dtypes.bfloat16. Arrays that already have
    `dtype` are used without a copy; others are converted one at a time, at each use, so that the largest model in
    float64 needs no second copy of its weights. Any `device` but the processor gets a copy of them; products are exact
    to their dtype there too, because TF32 is off.

    Raises VerificationError if PyTorch is not installed.
    """

    def __init__(
        self,
        config: GPT2Config,
        params: Mapping[str, np.ndarray],
        dtype: Literal["float32", "float64"] = "float32",
        device: str = "cpu",
    ) -> None:
        self._torch = _import_torch()
        self._device = self._torch.device(device)
        self.config = config
        self._dtype = getattr(self._torch, dtype)
        self._params = {name: self._tensor(array) for name, array in params.items()}
        self._act = self._activation()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Next-token logits after every token: ids int (B, T) -> (B, T, V) in the reference's dtype.

        Raises ValueError if ids are not (B, T) with 1 <= T <= n_positions, or are outside the vocabulary.
        """
        config, torch = self.config, self._torch
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= config.n_positions:
            raise ValueError(f"ids must be (B, T) with 1 <= T <= {config.n_positions}, not {ids.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
            raise ValueError(f"ids must lie in [0, {config.vocab_size})")
        with torch.inference_mode(), self._exact_products():
            rows = torch.from_numpy(ids.astype(np.int64)).to(self._device)
            x = self._params["wte.weight"][rows].to(self._dtype)  # (B, T, E)
            x = x + self._param("wpe.weight")[: ids.shape[1]]
            for layer in range(config.n_layer):
                x = x + self._attention(self._layer_norm(x, f"h.{layer}.ln_1"), layer)
                x = x + self._mlp(self._layer_norm(x, f"h.{layer}.ln_2"), layer)
            head = self._param("wte.weight" if config.tie_word_embeddings else "lm_head.weight")
            logits: np.ndarray = (self._layer_norm(x, "ln_f") @ head.T).cpu().numpy()
            return logits

    def _attention(self, x: "Tensor", layer: int) -> "Tensor":
        """Causal self-attention of one block, (B, T, E) -> (B, T, E)."""
        torch, (B, T, E) = self._torch, x.shape
        qkv = self._linear(x, f"h.{layer}.attn.c_attn").view(B, T, 3, self.config.n_head, self.config.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        scores = q @ k.transpose(-1, -2) * self.config.attention_scale(layer)  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=self._device).triu(diagonal=1)
        weights = scores.masked_fill_(future, float("-inf")).softmax(dim=-1)
        return self._linear((weights @ v).transpose(1, 2).reshape(B, T, E), f"h.{layer}.attn.c_proj")

    def _mlp(self, x: "Tensor", layer: int) -> "Tensor":
        return self._linear(self._act(self._linear(x, f"h.{layer}.mlp.c_fc")), f"h.{layer}.mlp.c_proj")

    def _linear(self, x: "Tensor", name: str) -> "Tensor":
        return x @ self._param(f"{name}.weight") + self._param(f"{name}.bias")

    def _layer_norm(self, x: "Tensor", name: str) -> "Tensor":
        weight, bias = self._param(f"{name}.weight"), self._param(f"{name}.bias")
        normed: Tensor = self._torch.nn.functional.layer_norm(
            x, x.shape[-1:], weight, bias, self.config.layer_norm_epsilon
        )
        return normed

    def _activation(self) -> Callable[["Tensor"], "Tensor"]:
        functional = self._torch.nn.functional
        activations: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
            "gelu": functional.gelu,
            "relu": functional.relu,
            "silu": functional.silu,
            "tanh": self._torch.tanh,
        }
        return activations[self.config.activation_function]

    def _param(self, name: str) -> "Tensor":
        converted: Tensor = self._params[name].to(self._dtype)
        return converted

    def _tensor(self, array: np.ndarray) -> "Tensor":
        """A tensor of the same dtype that shares the array's memory."""
        torch = self._torch
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read here
            if array.dtype == ml_dtypes.bfloat16:  # PyTorch does not know numpy's bfloat16, but has the same bits
                tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            else:
                tensor = torch.from_numpy(array)
        return tensor.to(self._device)

    @contextmanager
    def _exact_products(self) -> Iterator[None]:
        """Switches off TF32, which a program may have switched on for float32 products on CUDA."""
        products = self._torch.backends.cuda.matmul
        before, products.allow_tf32 = products.allow_tf32, False
        try:
            yield
        finally:
            products.allow_tf32 = before


class RoundedReference(Reference):
    """The reference with the rounding of a storage format, to separate the format's error from a library's faults.

    Args:
        config, params, dtype, device: as for `Reference`.
        cache: the dtype that keys and values are rounded to: "float32", "float16", "bfloat16" or "int8", symmetric
            with a scale per head and position.
        inputs: the same for the inputs of linear layers and the head; int8 has a scale per 32 inputs.

    Attributes:
        overflow: after `logits`, what became infinite first, and its largest value; None if nothing did.
    """

    def __init__(
        self,
        config: GPT2Config,
        params: Mapping[str, np.ndarray],
        dtype: Literal["float32", "float64"] = "float32",
        device: str = "cpu",
        *,
        cache: str = "float32",
        inputs: str = "float32",
    ) -> None:
        super().__init__(config, params, dtype, device)
        self._cache, self._inputs = cache, inputs
        self.overflow: tuple[str, float] | None = None

    def _linear(self, x: "Tensor", name: str) -> "Tensor":
        result = super()._linear(self._rounded(x, self._inputs, f"the inputs of {name}"), name)
        layer = name.removesuffix(".attn.c_attn")
        if layer == name:
            return result
        q, k, v = result.chunk(3, dim=-1)
        k, v = (
            self._rounded(x, self._cache, f"the {what} of {layer}", self.config.head_dim)
            for x, what in ((k, "keys"), (v, "values"))
        )
        return self._torch.cat([q, k, v], dim=-1)

    def _layer_norm(self, x: "Tensor", name: str) -> "Tensor":
        normed = super()._layer_norm(x, name)
        return self._rounded(normed, self._inputs, "the inputs of the head") if name == "ln_f" else normed

    def _rounded(self, x: "Tensor", to: str, what: str, group: int = GROUP) -> "Tensor":
        if to == "int8":
            groups = x.unflatten(-1, (-1, group))
            scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
            return ((groups / scales).round() * scales).flatten(-2)
        rounded: Tensor = x.to(getattr(self._torch, to)).to(self._dtype)
        if self.overflow is None and x.isfinite().all() and not rounded.isfinite().all():
            self.overflow = what, float(x.abs().max())
        return rounded


def require_torch() -> None:
    """Raises VerificationError if PyTorch is not installed; imports nothing."""
    if find_spec("torch") is None:
        raise VerificationError(
            "checking against PyTorch needs PyTorch, which is not installed: pip install torch (the extra verify)"
        )


def _import_torch() -> Any:
    require_torch()
    import torch

    return torch
