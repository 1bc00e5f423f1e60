"""The engine and its KV cache on the demo model: any batches and slots give what full recomputation gives."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_attn
from tvm_attn.config import param_shapes
from tvm_attn.errors import DeviceError
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.engine import CompiledEngine

SLOTS = 6
CONTEXT, VOCABULARY = 256, 2048
# Two float32 computations of logits of magnitude 10.
close = partial(np.testing.assert_allclose, rtol=0, atol=2e-4)
few = settings(max_examples=12)


@pytest.fixture(scope="module")
def engine(demo_artifact: Path) -> CompiledEngine:
    engine = tvm_attn.load(demo_artifact, max_batch=SLOTS).engine
    assert engine.config.n_positions == CONTEXT and engine.config.vocab_size == VOCABULARY
    forget(engine)
    return engine


def forget(engine: CompiledEngine) -> None:
    """Fills the cache with NaN, which would reach every result that depends on it."""
    for tensor in engine._kv:
        tensor.copyfrom(np.full(tensor.shape, np.nan, np.float32))


@pytest.fixture(scope="module")
def reference(demo_artifact: Path, one_torch_thread: None) -> Reference:
    artifact = Artifact(demo_artifact)
    return Reference(artifact.config, {name: artifact.parameters.read(name) for name in param_shapes(artifact.config)})


def random_ids(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def last_logits(reference: Reference, sequences: list[np.ndarray]) -> np.ndarray:
    return np.stack([reference.logits(ids[None])[0, -1] for ids in sequences])


# --- prompts ---

LENGTHS = st.lists(st.one_of(st.integers(1, 40), st.integers(1, CONTEXT)), min_size=1, max_size=SLOTS)


@few
@given(lengths=LENGTHS, order=st.permutations(range(SLOTS)), seed=st.integers(0, 99))
def test_ragged_prefill(
    engine: CompiledEngine, reference: Reference, lengths: list[int], order: list[int], seed: int
) -> None:
    prompts = [random_ids(length, seed + i) for i, length in enumerate(lengths)]
    logits = engine.prefill(prompts, order[: len(prompts)])
    assert logits.numpy().shape == (len(prompts), VOCABULARY)
    assert logits.numpy().dtype == np.float32
    assert logits.argmax().dtype == np.int32
    close(logits.numpy(), last_logits(reference, prompts))
    np.testing.assert_array_equal(logits.argmax(), logits.numpy().argmax(-1))


def test_more_prompts_than_fit_one_call(demo_artifact: Path, engine: CompiledEngine, reference: Reference) -> None:
    limit = Artifact(demo_artifact).library("cpu").max_prefill_rows  # whole row groups: 256, or 258 with groups of 6
    lengths = [200, limit - 200, 1, 256, 129, 128]
    # The second fills up the first call to the last row; the others need three more calls.
    assert lengths[0] + lengths[1] == limit < sum(lengths) // 2
    prompts = [random_ids(length, i) for i, length in enumerate(lengths)]
    slots = [3, 0, 5, 1, 4, 2]
    logits = engine.prefill(prompts, slots)
    expected = last_logits(reference, prompts)
    close(logits.numpy(), expected)
    np.testing.assert_array_equal(logits.argmax(), expected.argmax(-1))
    all_logits = engine.logits(prompts, slots)
    assert [rows.shape for rows in all_logits] == [(length, VOCABULARY) for length in lengths]
    for rows, ids in zip(all_logits, prompts, strict=True):
        close(rows, reference.logits(ids[None])[0])


def test_logits_fill_the_cache(engine: CompiledEngine, reference: Reference) -> None:
    ids = random_ids(50, 0)
    engine.logits([ids[:33], ids[:12]], [4, 1])
    actual = engine.decode(ids[[33, 12]], int32(4, 1), int32(33, 12)).numpy()
    close(actual, last_logits(reference, [ids[:34], ids[:13]]))


# --- one token a sequence ---


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 17, 64])
def test_batches_of_every_size(demo_artifact: Path, reference: Reference, batch: int) -> None:
    engine = tvm_attn.load(demo_artifact, max_batch=batch).engine
    forget(engine)
    sequences = [random_ids(1 + 5 * i % 67, i) for i in range(batch)]
    slots = np.random.default_rng(0).permutation(batch).astype(np.int32)
    longer = [i for i, ids in enumerate(sequences) if len(ids) > 1]
    engine.prefill([sequences[i][:-1] for i in longer], slots[longer].tolist())
    last, positions = int32(*(ids[-1] for ids in sequences)), int32(*(len(ids) - 1 for ids in sequences))
    logits = engine.decode(last, slots, positions)
    expected = last_logits(reference, sequences)
    close(logits.numpy(), expected)
    np.testing.assert_array_equal(logits.argmax(), expected.argmax(-1))


@few
@given(data=st.data())
def test_any_order_of_calls(engine: CompiledEngine, reference: Reference, data: st.DataObject) -> None:
    """Prompts into free and used slots, tokens appended to some of the sequences: always the recomputed logits."""
    sequences: dict[int, np.ndarray] = {}
    for step in range(data.draw(st.integers(1, 6))):
        growing = [slot for slot, ids in sequences.items() if len(ids) < CONTEXT]
        kinds = ["prefill", "decode"] if growing else ["prefill"]
        if data.draw(st.sampled_from(kinds)) == "prefill":
            slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=3, unique=True))
            # Also close to the end of the context.
            lengths = [data.draw(st.one_of(st.integers(1, 20), st.integers(CONTEXT - 3, CONTEXT))) for _ in slots]
            prompts = [random_ids(length, step) for length in lengths]
            sequences.update(zip(slots, prompts, strict=True))
            logits = engine.prefill(prompts, slots)
        else:
            slots = data.draw(st.lists(st.sampled_from(growing), min_size=1, unique=True))
            tokens = random_ids(len(slots), step)
            positions = int32(*(len(sequences[slot]) for slot in slots))
            for slot, token in zip(slots, tokens, strict=True):
                sequences[slot] = np.append(sequences[slot], token)
            logits = engine.decode(tokens, int32(*slots), positions)
        close(logits.numpy(), last_logits(reference, [sequences[slot] for slot in slots]))


def test_used_slots_are_as_good_as_fresh_ones(engine: CompiledEngine) -> None:
    """Bit by bit: what a longer sequence left in a slot, or NaN, is never read."""
    prompts = [random_ids(length, length) for length in (5, 1, 70)]

    def run(slots: list[int]) -> list[np.ndarray]:
        results = [engine.prefill(prompts, slots).numpy().copy()]
        for step in range(20):
            positions = int32(*(len(prompt) + step for prompt in prompts))
            results.append(engine.decode(random_ids(3, step), int32(*slots), positions).numpy().copy())
        return results

    forget(engine)
    fresh = run([0, 1, 2])
    engine.prefill([random_ids(CONTEXT, seed) for seed in range(SLOTS)], list(range(SLOTS)))
    for slots in ([0, 1, 2], [5, 3, 4], [2, 0, 1]):
        for actual, expected in zip(run(slots), fresh, strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_sequences_do_not_disturb_each_other(engine: CompiledEngine, reference: Reference) -> None:
    kept = random_ids(30, 0)
    engine.prefill([kept[:-1]], [2])
    for slot in (0, 1, 3, 4, 5):
        engine.prefill([random_ids(CONTEXT, slot)], [slot])
        engine.decode(int32(7), int32(slot), int32(CONTEXT - 1))
    close(engine.decode(kept[-1:], int32(2), int32(29)).numpy(), last_logits(reference, [kept]))


def test_a_position_can_be_written_again(engine: CompiledEngine, reference: Reference) -> None:
    """As when a token is taken back: the last write counts."""
    ids = random_ids(20, 0)
    engine.prefill([ids], [1])
    changed = np.append(ids[:15], np.int32(3))
    close(engine.decode(int32(3), int32(1), int32(15)).numpy(), last_logits(reference, [changed]))


# --- limits ---


@pytest.mark.parametrize(
    "max_batch", [0, -1, 65, 10**6, 2**70, pytest.param(10**5000, id="huge"), 2.0, "4", None, True, np.array([4])]
)
def test_max_batch_out_of_range(demo_artifact: Path, max_batch: Any) -> None:
    with pytest.raises(DeviceError, match=r"max_batch is .*; it must be an integer from 1 to 64$"):
        tvm_attn.load(demo_artifact, max_batch=max_batch)


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "unknown device 'tpu'"), ("", "unknown device"), ("cuda:0", "no library for 'cuda'")],
)
def test_device_that_is_not_there(demo_artifact: Path, device: str, message: str) -> None:
    with pytest.raises(tvm_attn.TvmAttnError, match=message):
        tvm_attn.load(demo_artifact, device)


def test_model_takes_more_prompts_than_slots(demo_artifact: Path, reference: Reference) -> None:
    model = tvm_attn.load(demo_artifact, max_batch=2)
    ids = np.stack([random_ids(9, seed) for seed in range(5)])
    close(model.logits(ids), reference.logits(ids))
    singly = [model.generate(row, max_new_tokens=5).token_ids for row in ids]
    assert [completion.token_ids for completion in model.generate(ids, max_new_tokens=5)] == singly
