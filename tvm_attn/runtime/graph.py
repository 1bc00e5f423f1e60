"""Decoding one token a sequence as one CUDA graph: the steps of a library, and the tensors that they work on.

`step(token_ids, positions, slots, kv, params) -> logits` decodes, replaces token_ids by the ids of the largest logits
and counts positions up, all on the device. TVM runs and captures the first call as a CUDA graph, one for each number of
row groups; from then on `step_again(sizes)` launches it, on the tensors of the first call. The host keeps a mirror of
them. Where greedy decoding goes on with the same sequences, nothing is uploaded, and what is read is one id a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.inputs import Inputs, Int32Array
from tvm_attn.runtime.logits import DeviceLogits, Part
from tvm_attn.runtime.stream import Stream


class Steps:
    """What the steps of a library work on.

    Args:
        inputs: where the tensors live.
        stream: of the model.
        vocabulary: V, the columns of the logits that count.
    """

    def __init__(self, inputs: Inputs, stream: Stream, vocabulary: int) -> None:
        self.stream, self.vocabulary = stream, vocabulary
        self._inputs = inputs
        self._captured: set[tuple[str, tuple[int, ...]]] = set()
        self.number = 0
        """Counts the steps."""

    def run(
        self,
        call: Callable[..., tvm.runtime.Tensor],
        again: Callable[[str, int], tvm.runtime.Tensor],
        name: str,
        values: dict[str, Int32Array],
        count: int,
    ) -> StepLogits:
        """Runs one token a sequence.

        Args:
            call: calls a step by its name, with tensors that the KV cache and the parameters follow.
            again: launches what the first call of a step with that number of groups has captured.
            name: of the step.
            values: token_ids, positions and slots, in that order, new int32 arrays (g, R); rows from `count` on are
                padding, with position -1.
            count: the number of sequences.
        """
        tensors = {kind: self._inputs.get(f"{name}.{kind}", array.shape) for kind, array in values.items()}
        # The ids and slots of padding rows do not matter, their positions do.
        arguments = [
            tensor.write(values[kind], None if kind == "positions" else count) for kind, tensor in tensors.items()
        ]
        token_ids, positions = tensors["token_ids"], tensors["positions"]
        self.number += 1
        token_ids.mirror = positions.mirror = None  # also where the call fails
        capture = name, values["token_ids"].shape
        if capture in self._captured:
            logits = again(name, len(values["token_ids"]))
        else:
            logits = call(name, *arguments)
            self._captured.add(capture)
        positions.mirror = values["positions"] + (values["positions"] >= 0)

        def read_ids(_logits: tvm.runtime.Tensor) -> Int32Array:
            token_ids.mirror = ids = self.stream.read(token_ids.tensor).copy()
            return ids

        return StepLogits(self, (logits, count), read_ids)


class StepLogits(DeviceLogits):
    """Logits of a step. Valid until the next step of the same engine, of whatever batch, as steps share their memory.

    Later, `numpy` and `__dlpack__` raise GenerationError, and so does `argmax` unless it was called before. What
    another library has taken through DLPack changes with the next step.
    """

    def __init__(self, steps: Steps, part: Part, read_ids: Callable[[tvm.runtime.Tensor], Int32Array]) -> None:
        super().__init__(steps.stream, steps.vocabulary, read_ids, [part])
        self._steps, self._number = steps, steps.number
        self._ids: Int32Array | None = None

    def argmax(self) -> Int32Array:
        """As in `DeviceLogits`; the step has computed it."""
        if self._ids is None:
            self._ids = super().argmax()
        return self._ids

    def _parts(self) -> Sequence[Part]:
        if self._number != self._steps.number:
            raise GenerationError("these logits were overwritten by a later step; read them before the next decode")
        return super()._parts()
