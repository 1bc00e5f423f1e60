"""One forward pass of GPT-2 over the tensor-core kernels of `tvm_attn.kernels.cuda`.

Activations are float16 or bfloat16, and no kernel quantizes them. One static group of rows has kernels of its own, with
LayerNorm in front of the product: a token is five kernels a layer.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from tvm_attn.kernels import Kernel, cuda
from tvm_attn.model.forward import Forward


class TensorCoreForward(Forward):
    """As `Forward`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.activations = self.dtype

    def _input(self, x: relax.Var, width: int) -> list[relax.Var]:
        return [x]

    def _normalized(self, x: relax.Var, name: str) -> list[relax.Var]:
        if self.static_groups == 1:
            return [x, *self._param(f"{name}.weight"), *self._param(f"{name}.bias")]
        return super()._normalized(x, name)

    def _linear_sizes(self, name: str, normalizes: bool) -> dict[str, Any]:
        """What all linear layers of `tvm_attn.kernels.cuda` share."""
        k, n, rows, _, weights = self._sizes(name)
        return {
            "in_features": k,
            "out_features": n,
            "rows": rows,
            "dtype": self.dtype,
            "weights": weights,
            "groups": self.static_groups,
            "epsilon": self.config.layer_norm_epsilon if normalizes and self.static_groups == 1 else None,
            "most_rows": self.most_rows,
        }

    def _norm_kernel(self) -> Kernel:
        config = self.config
        return cuda.LayerNorm(config.n_embd, config.layer_norm_epsilon, self.rows, self.dtype, self.static_groups)

    def _qkv_kernel(self, name: str) -> Kernel:
        sizes = self._linear_sizes(f"{name}.weight", normalizes=True)
        return cuda.QKVLinear(**sizes, heads=self.config.n_head, context=self.config.n_positions)

    def _hidden_kernel(self, name: str) -> Kernel:
        sizes = self._linear_sizes(f"{name}.weight", normalizes=True)
        return cuda.Linear(**sizes, activation=self.config.activation_function)

    def _residual_kernel(self, name: str) -> Kernel:
        return cuda.ResidualLinear(**self._linear_sizes(f"{name}.weight", normalizes=False))

    def _head_kernel(self, name: str) -> Kernel:
        return cuda.Head(**self._linear_sizes(name, normalizes=True))

    def _attention_kernel(self, layer: int, is_decode: bool) -> Kernel:
        config = self.config
        sizes = (config.n_head, config.head_dim, config.n_positions, self.rows, self.dtype)
        scale = config.attention_scale(layer)
        if is_decode:
            return cuda.DecodeAttention(*sizes, scale, self.static_groups)
        return cuda.PrefillAttention(*sizes, scale)
