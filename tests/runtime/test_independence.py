"""On processors, what a request gives does not depend, bit by bit, on what else runs, on chunks or on reused slots."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_attn
from tests.runtime.engines import wait_for
from tvm_attn.config import param_shapes
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.decoding import GenerationOptions
from tvm_attn.runtime.engine import CompiledEngine
from tvm_attn.runtime.model import Model

SLOTS, CONTEXT, VOCABULARY = 5, 256, 2048
FORMATS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
    "int8 cache": {"kv": "int8"},
    "int8 cache, bfloat16": {"kv": "int8", "dtype": "bfloat16"},
}


@pytest.fixture(scope="module", params=FORMATS)
def model(request: pytest.FixtureRequest, demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tvm_attn.compiler.build import build

    folder = tmp_path_factory.mktemp("demo") / "artifact"
    build(demo_model_dir, target="cpu", out=folder, verify=False, **FORMATS[request.param])  # type: ignore[arg-type]
    return tvm_attn.load(folder, "cpu", max_batch=SLOTS)


def random_ids(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)


def bits_of(engine: CompiledEngine, slot: int, length: int) -> list[np.ndarray]:
    """Keys and values of a slot's first positions in every layer, as integers."""
    caches = [np.from_dlpack(cache._create_view(cache.shape, f"uint{cache.dtype.bits}")) for cache in engine._kv]
    return [cache[slot, :, :, :length].copy() for cache in caches]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("length", [2, 17, 33, 100, CONTEXT])
def test_parts_of_a_prompt_give_the_bits_of_the_whole(model: Model, length: int) -> None:
    engine, ids, rng = model.engine, random_ids(length, 0), np.random.default_rng(length)
    whole = engine.prefill([ids], [0]).numpy()[0].copy()
    cache = bits_of(engine, 0, length)
    for number in range(8):
        cuts = np.unique(rng.integers(1, length, rng.integers(1, 6)))
        for start, end in zip([0, *cuts], [*cuts, length], strict=True):
            # Alone, and behind another prompt, so that rows are in other places of their groups.
            company = [random_ids(1 + number % 7, 1)] if number % 2 and end - start < CONTEXT - 7 else []
            parts, slots, starts = [*company, ids[start:end]], [3, 2][-len(company) - 1 :], [0, int(start)]
            logits = engine.prefill(parts, slots, starts[-len(parts) :]).numpy()[-1]
        assert np.array_equal(logits, whole), cuts
        assert same(bits_of(engine, 2, length), cache), cuts


def test_copied_beginnings_give_the_bits_of_the_whole(model: Model) -> None:
    engine, ids = model.engine, random_ids(120, 0)
    whole = engine.prefill([ids], [0]).numpy()[0].copy()
    cache = bits_of(engine, 0, 120)
    for length in (1, 31, 64, 119):
        engine.prefill([random_ids(CONTEXT, length)], [4])
        engine.copy_prefix(0, 4, length)
        assert same(bits_of(engine, 4, length), [layer[:, :, :length] for layer in cache])
        assert np.array_equal(engine.prefill([ids[length:]], [4], [length]).numpy()[0], whole)


def test_decoded_tokens_do_not_depend_on_the_batch(model: Model) -> None:
    engine, ids = model.engine, random_ids(60, 0)
    results = []
    for count in (1, 2, SLOTS):
        engine.prefill([ids[: 40 + i] for i in range(count)], list(range(count)))
        for step in range(5):
            positions = np.arange(40 + step, 40 + step + count, dtype=np.int32)
            logits = engine.decode(ids[positions], np.arange(count, dtype=np.int32), positions)
        results.append([logits.numpy()[0].copy(), *bits_of(engine, 0, 45)])
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_parts_against_pytorch(demo_artifact: Path, one_torch_thread: None) -> None:
    engine, artifact = tvm_attn.load(demo_artifact, "cpu").engine, Artifact(demo_artifact)
    weights = {name: artifact.parameters.read(name) for name in param_shapes(artifact.config)}
    reference, ids = Reference(artifact.config, weights), random_ids(CONTEXT, 3)
    expected = reference.logits(ids[None])[0]
    for start, end in ((0, 3), (3, 4), (4, 40), (40, 200), (200, CONTEXT)):
        logits = engine.prefill([random_ids(9, 1), ids[start:end]], [5, 2], [0, start]).numpy()[1]
        np.testing.assert_allclose(logits, expected[end - 1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("seed", range(2))
def test_requests_do_not_depend_on_what_else_runs(model: Model, seed: int) -> None:
    """Random requests from several threads, with common beginnings, long prompts and cancelled ones among them."""
    beginnings = [random_ids(length, length).tolist() for length in (0, 40, 100, 190)]
    rng = np.random.default_rng(seed)
    cases: list[tuple[list[int], dict[str, Any]]] = []
    for number in range(16):
        prompt = beginnings[number % 4] + random_ids(int(rng.integers(1, 50)), number).tolist()
        sampled = {"temperature": 1.5, "top_k": 50, "seed": number, "repetition_penalty": 1.1}
        cases.append((prompt, {"max_new_tokens": int(rng.integers(1, 30)), **(sampled if number % 3 else {})}))
    alone = []
    for prompt, options in cases:
        model.engine.writes += 1  # nothing is reused
        alone.append(model.generate(prompt, **options))
    wrong: list[int] = []

    def ask(number: int) -> None:
        order = np.random.default_rng([seed, number])
        for index in order.permutation(len(cases)):
            prompt, options = cases[index]
            request = model.scheduler.submit(prompt, GenerationOptions(**options))
            if order.integers(4):
                if request.result() != alone[index]:
                    wrong.append(index)
            else:
                request.cancel()

    before = model.scheduler.stats
    threads = [threading.Thread(target=partial(ask, number)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    wait_for(lambda: model.scheduler.stats.free_slots == SLOTS)
    assert model.scheduler.stats.reused_tokens > before.reused_tokens
