"""Decoding one token per sequence as a CUDA graph: the steps of a library, and the tensors that they work on.

`step(token_ids, positions, slots, kv, params) -> logits` decodes, replaces token_ids with the ids of the largest logits
and increments the positions, all on the device. TVM runs the first call and captures it as a CUDA graph, one for each
number of row groups; from then on `step_again(sizes)` launches it on the tensors of the first call. The host keeps a
mirror of them. If greedy decoding continues with the same sequences, nothing is uploaded, and one id per row is read.

Then the device need not wait for the host either: `run(..., ahead=True)` also starts the step after this one, with the
tokens that this one chose, and the next call only fetches its result. If the next call asks for something else, the
extra step has done no harm: it has written keys and values behind the end of its sequences, which nothing reads before
they are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.inputs import Inputs, Int32Array, in_groups
from tvm_attn.runtime.logits import DeviceLogits, Logprobs, Part
from tvm_attn.runtime.stream import Stream


class Steps:
    """The steps of a virtual machine.

    Args:
        machine: the virtual machine. Captured graphs belong to it, so each machine has its own `Steps`.
        inputs: the tensors on the device.
        stream: the model's stream.
        vocabulary: V, the columns of the logits that count.
        slots: S, the number of KV-cache slots.
        logprobs: see `DeviceLogits`.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        inputs: Inputs,
        stream: Stream,
        vocabulary: int,
        slots: int,
        logprobs: Logprobs,
    ) -> None:
        self._machine, self._inputs, self._slots = machine, inputs, slots
        self.stream, self.vocabulary, self.logprobs = stream, vocabulary, logprobs
        self._states: dict[tuple[str, tuple[int, int]], _State] = {}
        self._expected: _Expected | None = None
        self.number = 0
        """Number of steps so far."""

    def run(
        self,
        name: str,
        shape: tuple[int, int],
        token_ids: Int32Array,
        positions: Int32Array,
        slots: Int32Array,
        rest: tuple[Any, ...],
        *,
        writes: int = 0,
        ahead: bool = False,
    ) -> StepLogits:
        """Runs one token per sequence.

        Args:
            name: name of the step function.
            shape: g and R, the row groups in which it takes the next three arguments; rows past B are padding.
            token_ids, positions, slots: int32 (B,).
            rest: the other arguments, the same objects in every call.
            writes: a number that grows by one for each call, and also if something else uses the cache.
            ahead: whether the next step starts too; its positions must be inside the context. Of the result, only
                `argmax` can be read then.
        """
        state = self._states.get((name, shape))
        if state is None:
            state = self._states[name, shape] = _State(name, shape, self._inputs)
        expected, self._expected = self._expected, None
        if expected is not None and expected.is_this(state, writes, token_ids, positions, slots):
            logits = expected.following
        else:
            state.write(token_ids, positions, slots)
            logits = self._launch(name, shape, state, positions, rest)
        if ahead:
            logits.start_argmax()
            following = self._launch(name, shape, state, positions, rest)
            self.stream.leave_running()
            self._expected = _Expected(state, writes + 1, logits, positions + 1, slots.copy(), following)
        return logits

    def _launch(
        self, name: str, shape: tuple[int, int], state: _State, positions: Int32Array, rest: tuple[Any, ...]
    ) -> StepLogits:
        self.number += 1
        state.begin(self.number)
        if state.launch is None:
            logits = self.stream.run(self._machine[name], *state.arguments(), *rest)
            # The sizes that the call depended on; only `step` takes any number of groups.
            sizes = tvm_ffi.Shape((shape[0], self._slots) if name == "step" else (self._slots,))
            again = self._machine[f"{name}_again"]
            state.launch = lambda: again(sizes)
        else:
            logits = self.stream.run(state.launch)
        state.advance(len(positions))
        return StepLogits(self, (logits, len(positions)), state)


@dataclass(frozen=True)
class _Expected:
    """A step that was started before it was asked for.

    Attributes:
        state: its state.
        writes: `writes` of the call that asks for it.
        logits: what the step before it returned: its tokens are the largest of these.
        positions, slots: int32 (B,).
        following: what it returned.
    """

    state: _State
    writes: int
    logits: StepLogits
    positions: Int32Array
    slots: Int32Array
    following: StepLogits

    def is_this(
        self, state: _State, writes: int, token_ids: Int32Array, positions: Int32Array, slots: Int32Array
    ) -> bool:
        """Whether a call asks for this step."""
        return (
            state is self.state
            and writes == self.writes
            and positions.tobytes() == self.positions.tobytes()
            and slots.tobytes() == self.slots.tobytes()
            and token_ids.tobytes() == self.logits.argmax().tobytes()
        )


class _State:
    """The tensors of a step for one number of groups."""

    def __init__(self, name: str, shape: tuple[int, int], inputs: Inputs) -> None:
        self._shape = shape
        self._count = 0  # rows that are not padding
        self._written: Int32Array | None = None  # positions before the step
        self.token_ids, self.positions, self.slots = (
            inputs.get(f"{name}.{kind}", shape) for kind in ("token_ids", "positions", "slots")
        )
        self.launch: Callable[[], tvm.runtime.Tensor] | None = None
        """Launches the graph, once it has been captured."""
        self.number = 0
        """Number of its latest step."""

    def arguments(self) -> list[tvm.runtime.Tensor]:
        """The tensors in the order of the step's parameters."""
        return [self.token_ids.tensor, self.positions.tensor, self.slots.tensor]

    def write(self, token_ids: Int32Array, positions: Int32Array, slots: Int32Array) -> None:
        """Uploads what the device does not hold yet; of padding rows, only the positions matter."""
        if not self.token_ids.holds(token_ids):
            self.token_ids.write(in_groups(token_ids, self._shape, 0))
        if self._count != len(positions) or not self.positions.holds(positions):
            self.positions.write(in_groups(positions, self._shape, -1))
            self._count = len(positions)
        if not self.slots.holds(slots):
            self.slots.write(in_groups(slots, self._shape, 0))
        self._written = self.positions.mirror

    def begin(self, number: int) -> None:
        """Records that a step starts: what it changes is unknown until it has run, and if it fails."""
        self.number = number
        self.token_ids.mirror = self.positions.mirror = None

    def advance(self, count: int) -> None:
        """Records what a step of `count` rows has done to the positions."""
        assert self._written is not None
        self._written[:count] += 1
        self.positions.mirror = self._written


class StepLogits(DeviceLogits):
    """Logits of a step. Valid until the next step of the same engine, with any batch size, as steps share their memory.

    After that, `numpy`, `logprobs` and `__dlpack__` raise GenerationError, and so does `argmax` unless it was called
    before. What another library has taken through DLPack changes with the next step.
    """

    def __init__(self, steps: Steps, part: Part, state: _State) -> None:
        super().__init__(steps.stream, steps.vocabulary, self._read_ids, steps.logprobs, [part])
        self._steps, self._state, self._number = steps, state, steps.number
        self._reading: Callable[[], Int32Array] | None = None
        self._ids: Int32Array | None = None

    def start_argmax(self) -> None:
        """Lets `argmax` be called after later steps."""
        if self._ids is None:
            self._reading = self._steps.stream.start_read(self._state.token_ids.tensor)

    def argmax(self) -> Int32Array:
        """As in `DeviceLogits`; the step has already computed it."""
        if self._ids is None:
            if self._reading is None:
                self._ids = super().argmax()
            else:
                self._ids = self._reading()[: self._tensors[0][1]]
                self._reading = None
        return self._ids

    def _read_ids(self, _logits: tvm.runtime.Tensor) -> Int32Array:
        ids = self._steps.stream.start_read(self._state.token_ids.tensor)()
        if self._number == self._state.number:
            self._state.token_ids.mirror = ids.copy()
        return ids

    def _parts(self) -> Sequence[Part]:
        if self._number != self._steps.number:
            raise GenerationError("these logits were overwritten by a later step; read them before the next decode")
        return super()._parts()
