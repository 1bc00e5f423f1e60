"""Logits that stay on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvm_attn.runtime.dlpack import rows_view
from tvm_attn.runtime.inputs import Int32Array
from tvm_attn.runtime.logprobs import RowLogprobs
from tvm_attn.runtime.stream import Stream

Logprobs = Callable[[tvm.runtime.Tensor, Int32Array, int], RowLogprobs]
Part = tuple[tvm.runtime.Tensor, int]
"""Logits (g, R, V') of one call of the model, and how many of their rows count."""


class DeviceLogits:
    """Logits of some rows, (B, V) float32.

    PyTorch and others take them without a copy: `torch.from_dlpack(logits)` is a (B, V) tensor on the device, whose
    rows are V' elements apart. It keeps the memory alive. Work that reads it on a stream other than the one it was
    imported on must be done before it is dropped, as with every PyTorch tensor.

    Args:
        stream: the model's stream.
        vocabulary: V.
        argmax: computes the ids (g * R,) of one part.
        logprobs: computes log-probabilities of one part; see `CompiledEngine.logprobs`.
        parts: the logits, one part per call of the model.
    """

    def __init__(
        self,
        stream: Stream,
        vocabulary: int,
        argmax: Callable[[tvm.runtime.Tensor], Int32Array],
        logprobs: Logprobs,
        parts: Sequence[Part],
    ) -> None:
        self._stream, self._vocabulary, self._argmax, self._logprobs = stream, vocabulary, argmax, logprobs
        self._tensors = parts

    def _parts(self) -> Sequence[Part]:
        return self._tensors

    def numpy(self) -> npt.NDArray[np.float32]:
        """The logits (B, V), float32, on the host."""
        rows = [self._stream.read(tensor)[:count, : self._vocabulary] for tensor, count in self._parts()]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def argmax(self) -> Int32Array:
        """The id of the largest logit of each row, (B,) int32; -1 for a row with NaN."""
        ids = [self._argmax(tensor)[:count] for tensor, count in self._parts()]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def logprobs(self, token_ids: Int32Array, count: int) -> RowLogprobs:
        """Log-probabilities of a token for each row, (B,) int32, and of the `count` best, found on the device."""
        found, first = [], 0
        for tensor, rows in self._parts():
            found.append(self._logprobs(tensor, token_ids[first : first + rows], count))
            first += rows
        return RowLogprobs.join(found)

    def _view(self) -> tvm.runtime.Tensor:
        parts = self._parts()
        if len(parts) != 1:
            raise BufferError(f"these logits are in {len(parts)} tensors, one per call: pass fewer tokens at a time")
        tensor, count = parts[0]
        return rows_view(tensor, count, self._vocabulary)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._stream.device.dlpack_device_type(), self._stream.device.index
        return device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """See https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html.

        The consumer's stream may read them at once: if it is not the model's stream, this waits for the model's.

        Raises:
            BufferError: the prompts took more than one call of the model.
        """
        view = self._view()
        self._stream.hand_over(stream)
        return view.__dlpack__(**options)
