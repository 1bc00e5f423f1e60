"""What happens inside a model for one prompt: attention weights, and what each layer would predict.

A trace holds the input of every layer, its queries and keys, 2 L T E numbers, and computes one layer's weights or
predictions at a time when they are asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import GenerationError

if TYPE_CHECKING:
    from tvm_attn.runtime.engine import CompiledEngine
    from tvm_attn.runtime.inputs import Int32Array

Prediction: TypeAlias = "list[tuple[int, float]]"
"""The most likely next tokens after a token: their ids and probabilities, best first."""

MOST_BYTES = 1 << 30
"""The largest array of attention weights that is returned whole."""


class Trace:
    """The inside of a model for one prompt; `CompiledEngine.trace` makes it.

    Args:
        engine: the model.
        token_ids: the prompt, (T,) int32.
        seen: x and q of each layer, and the last x; see `trace` in `tvm_attn.model.gpt2`.
        caches: the keys and values of each layer, in the only slot of a cache of its own.
    """

    def __init__(self, engine: CompiledEngine, token_ids: Int32Array, seen: Any, caches: Any) -> None:
        self._engine, self.token_ids, self._seen, self._caches = engine, token_ids, seen, caches

    def weights(self, layer: int) -> npt.NDArray[np.float32]:
        """The attention weights of a layer, (H, T, T): row i of a head is what token i takes from tokens 0 .. i.

        Raises:
            GenerationError: they are not numbers.
        """
        count = len(self.token_ids)
        weights = self._engine.attention_weights(layer, self._seen[2 * layer + 1], self._caches[layer])
        found: npt.NDArray[np.float32] = np.ascontiguousarray(weights[:, :count, :count])
        if not np.isfinite(found).all():
            raise GenerationError(f"the attention weights of layer {layer} hold NaN: the weights are damaged")
        return found

    def predictions(self, depth: int, top: int) -> list[Prediction]:
        """The next tokens after each token, predicted from the x after `depth` layers ("logit lens", nostalgebraist
        2020): the model's last LayerNorm and its head are applied to it.

        Raises:
            GenerationError: they are not numbers.
        """
        logits = self._engine.lens(self._seen[2 * depth], len(self.token_ids))
        rows = logits.logprobs(self.token_ids, top)
        rows.require_numbers()
        return [
            [(token_id, math.exp(logprob)) for token_id, logprob in rows.token(row, token_id, top).top]
            for row, token_id in enumerate(self.token_ids.tolist())
        ]
