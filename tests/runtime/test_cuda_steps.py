"""Decoding by steps: what the host uploads, and that the tokens are the same as without steps.

A CPU library has no steps, so these are built from its decode functions, following the contract in
`tvm_attn.model.gpt2`, with what a CUDA graph adds: arguments and logits at fixed addresses.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

import tvm_attn
from tvm_attn.errors import GenerationError
from tvm_attn.runtime.decoding import GenerationOptions
from tvm_attn.runtime.engine import CompiledEngine
from tvm_attn.runtime.graph import StepLogits, Steps
from tvm_attn.runtime.inputs import Inputs, MirroredTensor
from tvm_attn.runtime.scheduler import Scheduler

SLOTS = 20
VOCABULARY = 2048


class Machine:
    """A virtual machine whose library has steps; counts their calls by name and shape."""

    def __init__(self, engine: CompiledEngine, groups: bool) -> None:
        self._machine, self._groups = engine._vm, groups
        self._graphs: dict[tuple[str, tuple[int, ...]], tuple[tuple[Any, ...], tvm.runtime.Tensor]] = {}
        self.module = self
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.fails = False

    def implements_function(self, name: str) -> bool:
        return name in ("step", "step_one") or (name in ("step_group", "decode_group") and self._groups)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name.endswith("_again"):
            return lambda sizes: self._launch(name.removesuffix("_again"), sizes)
        if name.startswith("step"):
            return lambda *arguments: self._capture(name, *arguments)
        return self._machine["decode" if name == "decode_group" else name]

    def _capture(self, name: str, *arguments: Any) -> Any:
        groups = () if name != "step" else (int(arguments[0].shape[0]),)
        key = name, (*groups, int(arguments[3][0].shape[0]))
        assert key not in self._graphs, "checks every argument anew"
        logits = self._run(name, *arguments)
        self._graphs[key] = arguments, logits
        return logits

    def _launch(self, name: str, sizes: Any) -> Any:
        arguments, buffer = self._graphs[name, tuple(sizes)]
        self._run(name, *arguments).copyto(buffer)
        return buffer

    def _run(self, name: str, token_ids: Any, positions: Any, slots: Any, kv: Any, params: Any) -> Any:
        if self.fails:
            raise RuntimeError("a kernel failed")
        shape = tuple(token_ids.shape)
        self.calls.append((name, shape))
        decode, argmax = ("decode_one", "argmax_one") if shape == (1, 1) else ("decode", "argmax")
        logits = self._machine[decode](token_ids, positions, slots, kv, params)
        rows = positions.numpy()
        token_ids.copyfrom(np.where(rows < 0, token_ids.numpy(), self._machine[argmax](logits).numpy()))
        positions.copyfrom(rows + (rows >= 0))
        return logits


class Uploads(Inputs):
    """The inputs of an engine, with the names of those written since the last check."""

    def __init__(self, engine: CompiledEngine) -> None:
        super().__init__(engine._device, lambda: None)
        self._writes: list[str] = []

    def get(self, name: str, shape: tuple[int, ...]) -> MirroredTensor:
        tensor = super().get(name, shape)
        tensor._before_write = lambda: self._writes.append(name)
        return tensor

    def take(self) -> list[str]:
        writes, self._writes = self._writes, []
        return writes


@pytest.fixture(scope="module")
def plain(demo_artifact: Path) -> CompiledEngine:
    engine = tvm_attn.load(demo_artifact, max_batch=SLOTS, graph=True).engine
    assert not engine.graph  # a CPU library
    return engine


def stepping(plain: CompiledEngine, groups: bool = True) -> tuple[CompiledEngine, Machine, Uploads]:
    machine = Machine(plain, groups)
    engine, uploads = plain.on(machine), Uploads(plain)  # type: ignore[arg-type]
    assert engine.graph
    engine._inputs = uploads
    engine._steps = Steps(machine, uploads, plain._stream, plain.config.vocab_size, SLOTS, plain.logprobs)  # type: ignore[arg-type]
    return engine, machine, uploads


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length, dtype=np.int32) for length in lengths]


# --- the same tokens ---


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(max_new_tokens=12),
        GenerationOptions(max_new_tokens=12, temperature=1.5, top_k=50, seed=3),
        GenerationOptions(max_new_tokens=30, stop_token_ids=range(0, VOCABULARY, 9), temperature=2.0, seed=1),
    ],
    ids=["greedy", "sampled", "ragged ends"],
)
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
@pytest.mark.parametrize("count", [1, 3, 9, 27])
def test_tokens_are_those_of_decode(
    plain: CompiledEngine, options: GenerationOptions, groups: bool, count: int
) -> None:
    """Also with more prompts than slots: sequences end, and others take their place in the batch."""
    asked = prompts(*(1 + 7 * i % 31 for i in range(count)))
    engine, machine, _ = stepping(plain, groups)
    expected = Scheduler(plain).generate(asked, options)
    assert Scheduler(engine).generate(asked, options) == expected
    assert machine.calls


def test_name_and_shape_of_a_step(plain: CompiledEngine) -> None:
    rows = plain.library.rows
    for groups in (True, False):
        engine, machine, _ = stepping(plain, groups)
        for count in (1, 2, rows, rows + 1, 2 * rows + 1):
            engine.decode(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), np.zeros(count, np.int32))
        group = "step_group" if groups else "step"
        assert machine.calls == [
            ("step_one", (1, 1)),
            (group, (1, rows)),
            (group, (1, rows)),
            ("step", (2, rows)),
            ("step", (3, rows)),
        ]


def test_without_graphs_or_steps_decode_is_called(plain: CompiledEngine) -> None:
    engine, machine, _ = stepping(plain)
    engine._steps = None  # graph=False
    assert not engine.graph
    logits = engine.decode(int32(5, 6), int32(0, 1), int32(0, 0))
    assert not machine.calls
    np.testing.assert_array_equal(logits.numpy(), plain.decode(int32(5, 6), int32(0, 1), int32(0, 0)).numpy())


# --- uploads ---


def test_greedy_decoding_uploads_nothing(plain: CompiledEngine) -> None:
    engine, _, uploads = stepping(plain)
    slots, positions = int32(4, 2, 7), int32(0, 0, 0)
    ids = engine.decode(int32(3, 1, 4), slots, positions).argmax()
    assert uploads.take() == ["step_group.token_ids", "step_group.positions", "step_group.slots"]
    for step in range(1, 5):
        ids = engine.decode(ids, slots.copy(), positions + step).argmax()
        assert uploads.take() == []


def test_changes_are_uploaded_alone(plain: CompiledEngine) -> None:
    engine, _, uploads = stepping(plain)
    slots, positions = int32(4, 2, 7), int32(0, 0, 0)
    ids = engine.decode(int32(3, 1, 4), slots, positions).argmax()
    uploads.take()
    sampled = ids + 1
    ids = engine.decode(sampled, slots, positions + 1).argmax()
    assert uploads.take() == ["step_group.token_ids"]
    ids = engine.decode(ids, int32(4, 2, 6), positions + 2).argmax()
    assert uploads.take() == ["step_group.slots"]
    ids = engine.decode(ids, int32(4, 2, 6), int32(3, 0, 3)).argmax()
    assert uploads.take() == ["step_group.positions"]
    # One sequence fewer: its row becomes padding, of which only the position matters.
    ids = engine.decode(ids[:2], int32(4, 2), int32(4, 1)).argmax()
    assert uploads.take() == ["step_group.positions"]
    engine.decode(ids, int32(4, 2), int32(5, 2))
    assert uploads.take() == []
    # The ids of that step were never read.
    engine.decode(ids, int32(4, 2), int32(6, 3))
    assert uploads.take() == ["step_group.token_ids"]


def test_shapes_do_not_share_their_state(plain: CompiledEngine) -> None:
    engine, _, uploads = stepping(plain)
    first = engine.decode(int32(3), int32(4), int32(0)).argmax()
    engine.decode(int32(3, 1), int32(4, 2), int32(1, 0)).argmax()
    uploads.take()
    engine.decode(first, int32(4), int32(1))
    assert uploads.take() == []


def test_a_machine_launches_what_it_has_captured_itself(plain: CompiledEngine) -> None:
    engine, machine, _ = stepping(plain)
    for position in range(3):
        engine.decode(int32(3), int32(4), int32(position))
    other = Machine(plain, groups=True)
    again = engine.on(other)  # type: ignore[arg-type]
    for position in range(3):
        again.decode(int32(3), int32(4), int32(position))
    assert machine.calls == other.calls == [("step_one", (1, 1))] * 3


def test_a_first_call_that_fails_has_captured_nothing(plain: CompiledEngine) -> None:
    engine, machine, _ = stepping(plain)
    machine.fails = True
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.decode(int32(3), int32(4), int32(0))
    machine.fails = False
    engine.decode(int32(3), int32(4), int32(0))
    engine.decode(int32(3), int32(4), int32(1))
    assert machine.calls == [("step_one", (1, 1))] * 2


def test_after_a_failure_everything_that_may_have_changed_is_uploaded(plain: CompiledEngine) -> None:
    engine, machine, uploads = stepping(plain)
    ids = engine.decode(int32(3, 1), int32(4, 2), int32(0, 0)).argmax()
    machine.fails = True
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.decode(ids, int32(4, 2), int32(1, 1))
    machine.fails = False
    uploads.take()
    logits = engine.decode(ids, int32(4, 2), int32(1, 1))
    assert uploads.take() == ["step_group.token_ids", "step_group.positions"]
    plain.decode(int32(3, 1), int32(4, 2), int32(0, 0))
    np.testing.assert_array_equal(logits.numpy(), plain.decode(ids, int32(4, 2), int32(1, 1)).numpy())


def test_inputs_of_prompts_are_uploaded_where_they_differ(plain: CompiledEngine) -> None:
    engine, _, uploads = stepping(plain)
    first, second = prompts(9, 9)
    engine.prefill([first], [3])
    uploads.take()
    engine.prefill([second], [3])
    assert uploads.take() == ["token_ids"]


# --- the step after this one ---


def run_ahead(engine: CompiledEngine, count: int, first: np.ndarray, slots: np.ndarray) -> list[list[int]]:
    """Greedy decoding of empty slots; the last step starts none."""
    ids, positions, chosen = first, np.zeros(len(first), np.int32), []
    for step in range(count):
        logits = engine.decode(ids, slots, positions + step, ahead=step + 1 < count)
        ids = logits.argmax()
        chosen.append(ids.tolist())
    return chosen


def test_the_next_step_starts_before_it_is_asked_for(plain: CompiledEngine) -> None:
    engine, machine, uploads = stepping(plain)
    slots, positions, first = int32(4, 2, 7), int32(0, 0, 0), int32(3, 1, 4)
    expected = run_ahead(plain, 6, first, slots)  # a library without steps looks not ahead
    logits = engine.decode(first, slots, positions, ahead=True)
    assert len(machine.calls) == 2  # before anything is read
    with pytest.raises(GenerationError, match="overwritten by a later step"):
        logits.numpy()
    assert logits.argmax().tolist() == expected[0]
    again, machine, uploads = stepping(plain)
    assert run_ahead(again, 6, first, slots) == expected
    assert len(machine.calls) == 6
    assert uploads.take() == ["step_group.token_ids", "step_group.positions", "step_group.slots"]


def test_a_step_that_nobody_asks_for_changes_nothing(plain: CompiledEngine) -> None:
    """Another token, another position, other slots, fewer sequences, another shape, a prompt in between."""
    slots, first = int32(4, 2, 7), int32(3, 1, 4)

    def play(engine: CompiledEngine, ahead: bool) -> list[np.ndarray]:
        found = []

        def decode(ids: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
            ids = engine.decode(ids, slots, positions, ahead=ahead).argmax()
            found.append(ids)
            return ids

        ids = decode(first, slots, int32(0, 0, 0))
        ids = decode(ids + 1, slots, int32(1, 1, 1))
        ids = decode(ids, slots, int32(1, 1, 1))
        ids = decode(ids, int32(4, 2, 6), int32(2, 2, 0))
        ids = decode(ids[:2], int32(4, 2), int32(3, 3))
        one = decode(ids[:1], int32(4), int32(4))
        engine.prefill(prompts(9), [2])
        decode(np.concatenate([one, int32(9)]), int32(4, 2), int32(5, 9))
        engine.prefill(prompts(12), [4])  # what was started has read the slot before
        found.append(engine.decode(int32(8), int32(4), int32(12)).numpy())
        return found

    engine, machine, _ = stepping(plain)
    for ours, expected in zip(play(engine, True), play(plain, False), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert len(machine.calls) == 7 * 2 + 1


def test_a_repeated_call_is_not_taken_for_the_next_step_after_the_cache_changed(plain: CompiledEngine) -> None:
    engine, _, _ = stepping(plain)
    ids = engine.decode(int32(3), int32(4), int32(0), ahead=True).argmax()
    engine.prefill(prompts(1), [4])
    later = engine.decode(ids, int32(4), int32(1)).numpy()
    plain.prefill(prompts(1), [4])
    np.testing.assert_array_equal(later, plain.decode(ids, int32(4), int32(1)).numpy())


def test_a_started_step_that_fails_is_told_at_once(plain: CompiledEngine) -> None:
    engine, machine, _ = stepping(plain)
    ids = engine.decode(int32(3, 1), int32(4, 2), int32(0, 0)).argmax()
    machine.fails = True
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.decode(ids, int32(4, 2), int32(1, 1), ahead=True)
    machine.fails = False
    logits = engine.decode(ids, int32(4, 2), int32(1, 1), ahead=True)
    plain.decode(int32(3, 1), int32(4, 2), int32(0, 0))
    np.testing.assert_array_equal(logits.argmax(), plain.decode(ids, int32(4, 2), int32(1, 1)).argmax())


def test_steps_are_started_ahead_while_sequences_go_on(plain: CompiledEngine) -> None:
    """Greedy requests need one call a token; the last step of a sequence starts none, so the context is never left."""
    engine, machine, _ = stepping(plain)
    length = plain.config.n_positions - 5
    expected = Scheduler(plain).generate(prompts(length), GenerationOptions(max_new_tokens=50, stop_token_ids=()))
    asked = Scheduler(engine).generate(prompts(length), GenerationOptions(max_new_tokens=50, stop_token_ids=()))
    assert asked == expected
    assert len(machine.calls) == 5


# --- what a step returns ---


def test_logits_hold_until_the_next_step(plain: CompiledEngine) -> None:
    engine, _, _ = stepping(plain)
    first = engine.decode(int32(3, 1), int32(4, 2), int32(0, 0))
    assert isinstance(first, StepLogits)
    expected = plain.decode(int32(3, 1), int32(4, 2), int32(0, 0))
    np.testing.assert_array_equal(first.numpy(), expected.numpy())
    np.testing.assert_array_equal(first.argmax(), expected.argmax())
    found, wanted = (logits.logprobs(int32(7, 9), 3) for logits in (first, expected))
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.chosen, wanted.chosen)
    engine.prefill(prompts(5), [0])  # not a step
    assert first.numpy().shape == (2, VOCABULARY)
    ids = first.argmax()
    second = engine.decode(int32(3), int32(4), int32(0))  # of another shape
    np.testing.assert_array_equal(first.argmax(), ids)
    for read in (first.numpy, first.__dlpack__, lambda: first.logprobs(int32(7, 9), 3)):
        with pytest.raises(GenerationError, match="overwritten by a later step; read them before the next decode"):
            read()
    engine.decode(int32(3), int32(4), int32(0))
    with pytest.raises(GenerationError, match="overwritten by a later step"):
        second.argmax()


def test_ids_are_not_overwritten(plain: CompiledEngine) -> None:
    engine, _, _ = stepping(plain)
    ids = engine.decode(int32(3), int32(4), int32(0)).argmax()
    kept = ids.copy()
    engine.decode(ids + 1, int32(4), int32(1)).argmax()
    np.testing.assert_array_equal(ids, kept)


def test_a_row_of_nan_has_no_token(plain: CompiledEngine) -> None:
    engine, _, _ = stepping(plain)
    cache = plain._kv[0].numpy()
    cache[3, :, :, 0] = np.nan
    plain._kv[0].copyfrom(cache)
    ids = engine.decode(int32(5, 5), int32(3, 4), int32(1, 0)).argmax()
    assert ids[0] == -1 and ids[1] >= 0
    plain.prefill(prompts(2), [3])
