"""Artifacts on the device against PyTorch there: every dtype, all lengths, batches, graphs, DLPack, streams, memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tvm_attn
from benchmarks.gpu.models import compare_graph
from tvm_attn.compiler.verification import BOUNDS, verify_artifact
from tvm_attn.errors import DeviceError
from tvm_attn.model.params import effective_params
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.tensors import normalised_error

from .conftest import DEVICE

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def reference(artifact: Path) -> Reference:
    """PyTorch in float32 on the device, with the artifact's weights."""
    opened = Artifact(artifact)
    params = {
        name: np.array(array)
        for name, array in effective_params(opened.config, opened.parameters.read, opened.quantization)
    }
    return Reference(opened.config, params, device=DEVICE)


def bound(artifact: Path) -> float:
    opened = Artifact(artifact)
    return BOUNDS[opened.dtype if opened.quantization == "none" else opened.quantization].nmse


def ids_of(model: Model, *lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.config.vocab_size, length, dtype=np.int32) for length in lengths]


@pytest.fixture
def memory_is_freed() -> Iterator[None]:
    """What a test took is given back: models of the next one may need it."""
    yield
    import gc

    import tvm_ffi

    gc.collect()
    tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()
    torch.cuda.empty_cache()


def test_every_function_matches_pytorch(artifact: Path) -> None:
    verify_artifact(artifact, DEVICE).raise_if_failed(str(artifact))


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 17, 63, 65, 128, 255])
def test_prompts_of_all_lengths(artifact: Path, reference: Reference, length: int) -> None:
    model = tvm_attn.load(artifact, DEVICE, max_batch=1)
    (ids,) = ids_of(model, min(length, model.config.n_positions))
    assert normalised_error(model.logits(ids[None]), reference.logits(ids[None])) <= bound(artifact)


@pytest.mark.parametrize("batch", [2, 7, 8, 9, 33, 64])
@pytest.mark.parametrize("graph", [True, False])
def test_ragged_batches(artifact: Path, reference: Reference, batch: int, graph: bool) -> None:
    model = tvm_attn.load(artifact, DEVICE, max_batch=batch, graph=graph)
    longest = model.config.n_positions - 4
    prompts = ids_of(model, *(1 + index * 37 % longest for index in range(batch)))
    slots = np.arange(batch, dtype=np.int32)[::-1].copy()
    logits = model.engine.prefill(prompts, slots.tolist())
    for step in range(3):
        chosen = logits.argmax()
        given = logits.numpy()
        wanted = np.stack([reference.logits(prompt[None])[0, -1] for prompt in prompts])
        assert normalised_error(given, wanted) <= bound(artifact), f"after {step} steps"
        np.testing.assert_array_equal(chosen, given.argmax(-1))
        positions = np.array([len(prompt) for prompt in prompts], np.int32)
        logits = model.engine.decode(chosen, slots, positions)
        prompts = [np.append(prompt, token) for prompt, token in zip(prompts, chosen, strict=True)]


def test_sequences_come_and_go_between_steps(artifact: Path, reference: Reference) -> None:
    model = tvm_attn.load(artifact, DEVICE, max_batch=4)
    prompts = ids_of(model, 5, 19, 11)
    model.engine.prefill(prompts, [0, 1, 2])
    for kept in ([0, 1, 2], [2, 0], [1], [1, 2, 0], [0]):
        tokens = np.array([7 + index for index in kept], np.int32)
        positions = np.array([len(prompts[index]) for index in kept], np.int32)
        logits = model.engine.decode(tokens, np.array(kept, np.int32), positions).numpy()
        for index, token in zip(kept, tokens, strict=True):
            prompts[index] = np.append(prompts[index], token)
        wanted = np.stack([reference.logits(prompts[index][None])[0, -1] for index in kept])
        assert normalised_error(logits, wanted) <= bound(artifact), kept


def test_graphs_change_no_token(artifact: Path) -> None:
    entries = list(compare_graph(artifact, DEVICE))
    assert all(entry["passed"] for entry in entries), entries


def test_tensors_go_in_and_out_without_a_copy(artifact: Path) -> None:
    model = tvm_attn.load(artifact, DEVICE, max_batch=2)
    ids = np.stack(ids_of(model, 9, 9))
    np.testing.assert_array_equal(model.logits(torch.from_numpy(ids).to(DEVICE)), model.logits(ids))
    for logits in (
        model.engine.prefill(list(ids), [0, 1]),
        model.engine.decode(ids[:, 0].copy(), np.arange(2, dtype=np.int32), np.full(2, 9, np.int32)),
    ):
        tensor = torch.from_dlpack(logits)
        assert tensor.device == torch.device(DEVICE) and tensor.shape == (2, model.config.vocab_size)
        np.testing.assert_array_equal(tensor.cpu().numpy(), logits.numpy())
        np.testing.assert_array_equal(tensor.argmax(-1).cpu().numpy(), logits.argmax())


@pytest.mark.usefixtures("memory_is_freed")
def test_two_streams_give_what_one_gives(artifact: Path) -> None:
    alone = tvm_attn.load(artifact, DEVICE, max_batch=2)
    prompts = ids_of(alone, 21, 40)
    limit = min(24, alone.config.n_positions - 40)
    options = {"max_new_tokens": limit, "stop_token_ids": ()}
    expected = [alone.generate(prompt.tolist(), **options).token_ids for prompt in prompts]
    streams = [torch.cuda.Stream() for _ in range(2)]
    models = [tvm_attn.load(artifact, DEVICE, max_batch=2, stream=stream.cuda_stream) for stream in streams]
    running = [model.stream_ids(prompt.tolist(), **options) for model, prompt in zip(models, prompts, strict=True)]
    tokens: list[list[int]] = [[], []]
    for _ in range(limit):
        for index, stream in enumerate(running):
            tokens[index].append(next(stream))
    assert tokens == [list(ids) for ids in expected]


@pytest.mark.usefixtures("memory_is_freed")
def test_two_models_at_the_same_time_share_nothing(artifact: Path) -> None:
    """At a context so long that blocks split the keys of a row, and with a step of each in flight."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    models = [tvm_attn.load(artifact, DEVICE, max_batch=3, stream=stream.cuda_stream) for stream in streams]
    context = models[0].config.n_positions
    steps, slots = 20, np.arange(3, dtype=np.int32)
    prompts = ids_of(models[0], context - steps, context // 2, context - steps - 7)

    def start(model: Model) -> tuple[np.ndarray, np.ndarray]:
        ids = model.engine.prefill(prompts, slots.tolist()).argmax()
        return ids, np.array([len(prompt) for prompt in prompts], np.int32)

    expected = []
    ids, positions = start(models[0])
    for step in range(steps):
        ids = models[0].engine.decode(ids, slots, positions + step).argmax()
        expected.append(ids.tolist())
    given = [start(model) for model in models]
    for step in range(steps):
        logits = [
            model.engine.decode(ids, slots, positions + step, ahead=step + 1 < steps)
            for model, (ids, positions) in zip(models, given, strict=True)
        ]
        given = [(each.argmax(), positions) for each, (_, positions) in zip(logits, given, strict=True)]
        assert [ids.tolist() for ids, _ in given] == [expected[step]] * 2, step


@pytest.mark.parametrize("batch", [1, 5, 20])
def test_steps_started_ahead_change_no_token(artifact: Path, batch: int) -> None:
    """Also if a call in between asks for something else."""
    model = tvm_attn.load(artifact, DEVICE, max_batch=batch)
    prompts = ids_of(model, *(3 + index for index in range(batch)))
    slots, lengths = np.arange(batch, dtype=np.int32), np.array([len(prompt) for prompt in prompts], np.int32)
    found = []
    for ahead in (False, True):
        chosen = [model.engine.prefill(prompts, slots.tolist()).argmax()]
        for step in range(12):
            ids = chosen[-1] if step % 5 else chosen[-1] // 2
            chosen.append(model.engine.decode(ids, slots, lengths + step, ahead=ahead).argmax())
        found.append(np.stack(chosen).tolist())
    assert found[0] == found[1]


@pytest.mark.usefixtures("memory_is_freed")
def test_short_memory_is_an_error_with_numbers(artifact: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(free - (192 << 20), 0), dtype=torch.uint8, device=DEVICE)
    try:
        with pytest.raises(DeviceError, match=r"GiB of free memory but the model needs .* GiB \(parameters"):
            tvm_attn.load(artifact, DEVICE, max_batch=64)
    finally:
        del held
    torch.cuda.empty_cache()
    model = tvm_attn.load(artifact, DEVICE, max_batch=1)
    assert np.isfinite(model.logits([[1, 2, 3]])).all()


def test_a_device_that_is_not_there_is_an_error(artifact: Path) -> None:
    with pytest.raises(DeviceError, match="there is no device cuda:99"):
        tvm_attn.load(artifact, "cuda:99")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_every_device_can_be_chosen(artifact: Path) -> None:
    ids = [[1, 2, 3]]
    expected = tvm_attn.load(artifact, "cuda:0", max_batch=1).logits(ids)
    last = tvm_attn.load(artifact, f"cuda:{torch.cuda.device_count() - 1}", max_batch=1)
    assert normalised_error(last.logits(ids), expected) <= 1e-6
