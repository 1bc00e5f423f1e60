"""Log-probabilities against PyTorch's on transformers' model, and how the scheduler asks for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import tvm_attn
from tests.runtime.engines import CONTEXT, EOS, VOCAB, ScriptedEngine, byte_tokenizer, scripted
from tvm_attn.compiler.build import build
from tvm_attn.compiler.verification import BOUNDS
from tvm_attn.errors import GenerationError
from tvm_attn.runtime.decoding import GenerationOptions
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.logprobs import MOST_LOGPROBS, TokenLogprobs
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("one_torch_thread")
DTYPES: dict[int, str] = {}
"""The dtype of each model, by its id."""
TEXT = "Return the number of characters in the string, where"


@pytest.fixture(scope="module", params=[("cpu", "float32"), ("cpu", "bfloat16"), ("vulkan", "float32")], ids="-".join)
def model(
    request: pytest.FixtureRequest, demo_model_dir: Path, demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    device, dtype = request.param
    if obstacle := device_class(device).obstacle():
        pytest.skip(f"{device}: {obstacle}")
    folder = demo_artifact
    if request.param != ("cpu", "float32"):
        folder = tmp_path_factory.mktemp("demo") / "artifact"
        build(demo_model_dir, device, dtype, out=folder, verify=False)
    loaded = tvm_attn.load(folder, device, max_batch=3)
    DTYPES[id(loaded)] = dtype
    return loaded


@pytest.fixture(scope="module")
def theirs(model: Model, demo_model_dir: Path) -> GPT2LMHeadModel:
    """In float32, on the weights as they are stored."""
    reference = GPT2LMHeadModel.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    stored = getattr(torch, DTYPES[id(model)])
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(stored).float())
    return reference


def expected(theirs: GPT2LMHeadModel, ids: list[int]) -> tuple[np.ndarray, float]:
    """Log-probabilities (T, V) after each token, in float64, and the root mean square of the logits."""
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits, -1).numpy(), float(logits.square().mean().sqrt())


def check(found: TokenLogprobs, token_id: int, wanted: np.ndarray, count: int, bound: float) -> None:
    assert found.token_id == token_id
    assert abs(found.logprob - wanted[token_id]) < bound
    values = np.array([logprob for _, logprob in found.top])
    assert len(values) == count and (np.diff(values) <= 0).all() and found.logprob <= 0
    np.testing.assert_allclose(values, [wanted[best] for best, _ in found.top], rtol=0, atol=bound)
    np.testing.assert_allclose(values, np.sort(wanted)[::-1][:count], rtol=0, atol=bound)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_k": 50, "repetition_penalty": 1.3, "seed": 3}])
def test_log_probabilities_are_those_of_transformers(
    model: Model, theirs: GPT2LMHeadModel, sampling: dict[str, Any]
) -> None:
    """Of the model's own distribution, whatever the sampling; several prompts at once, and more than slots."""
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(TEXT)[:length] for length in (12, 1, 7, 2)]
    options = {"max_new_tokens": 6, "logprobs": 5, "prompt_logprobs": True, "stop_token_ids": (), **sampling}
    for prompt, completion in zip(prompts, model.generate(prompts, **options), strict=True):
        wanted, rms = expected(theirs, [*prompt, *completion.token_ids])
        bound = 2 * BOUNDS[DTYPES[id(model)]].max_abs * rms  # the logit's own error, and that of the sum's logarithm
        assert completion.logprobs is not None and completion.prompt_logprobs is not None
        assert len(completion.logprobs) == 6 and len(completion.prompt_logprobs) == len(prompt)
        assert completion.prompt_logprobs[0] is None
        for place, found in enumerate([*completion.prompt_logprobs[1:], *completion.logprobs], 1):
            assert found is not None
            check(found, [*prompt, *completion.token_ids][place], wanted[place - 1], 5, bound)


def test_a_prompt_as_long_as_the_context(model: Model, theirs: GPT2LMHeadModel) -> None:
    """In several calls of the library on processors and GPUs alike."""
    length = model.config.n_positions
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, length).tolist()
    completion = model.generate(ids, max_new_tokens=1, prompt_logprobs=True)
    assert completion.logprobs is None and completion.prompt_logprobs is not None
    wanted, rms = expected(theirs, ids)
    bound = 2 * BOUNDS[DTYPES[id(model)]].max_abs * rms
    for place in range(1, length):
        found = completion.prompt_logprobs[place]
        assert found is not None and found.top == ()
        check(found, ids[place], wanted[place - 1], 0, bound)


def test_tokens_do_not_depend_on_log_probabilities(model: Model) -> None:
    if model.device != "cpu":
        pytest.skip("bitwise on processors only")
    alone = [model.generate(TEXT, max_new_tokens=8, logprobs=3, prompt_logprobs=True)]
    together = model.generate([TEXT, TEXT[:20], TEXT], max_new_tokens=8, logprobs=3, prompt_logprobs=True)
    assert [together[0], together[2]] == alone * 2
    plain = model.generate(TEXT, max_new_tokens=8)
    assert (plain.text, plain.token_ids) == (alone[0].text, alone[0].token_ids)
    assert plain.logprobs is None and plain.prompt_logprobs is None


@pytest.mark.parametrize("count", [0, 1, MOST_LOGPROBS])
def test_rows_of_several_calls(model: Model, count: int) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.config.vocab_size, n, dtype=np.int32) for n in (200, 100, 3)]
    assert sum(map(len, prompts)) > model.engine.library.max_prefill_rows
    logits = model.engine.prefill(prompts, [2, 0, 1])
    ids = np.array([0, model.config.vocab_size - 1, 17], np.int32)
    found = logits.logprobs(ids, count)
    wanted = torch.log_softmax(torch.from_numpy(logits.numpy().copy()).double(), -1)
    values, best = wanted.topk(count)
    np.testing.assert_array_equal(found.ids, best.numpy())
    np.testing.assert_allclose(found.top, values.numpy(), rtol=0, atol=5e-6)
    np.testing.assert_allclose(found.chosen, wanted.numpy()[range(3), ids], rtol=0, atol=5e-6)


# --- the scheduler ---


def test_no_logits_are_copied() -> None:
    for options, asked in (
        ({"logprobs": 2}, ["argmax", "logprobs"]),
        ({"logprobs": 0}, ["argmax", "logprobs"]),
        ({"logprobs": 1, "temperature": 1.0}, ["numpy", "logprobs"]),
        ({"prompt_logprobs": True}, ["argmax"]),
    ):
        engine = ScriptedEngine([[1, 2, 3]])
        Scheduler(engine).generate([0], GenerationOptions(max_new_tokens=3, **options))
        assert engine.asked == asked * 3


def test_each_request_gets_as_many_as_it_asked_for() -> None:
    scheduler = Scheduler(ScriptedEngine([[1, 2, 3]]))
    requests = [
        scheduler.submit([0], GenerationOptions(max_new_tokens=3, logprobs=count)) for count in (None, 0, 2, 20)
    ]
    for request, count in zip(requests, (None, 0, 2, 20), strict=True):
        tokens = list(request)
        completion = request.result()
        assert completion.token_ids == tuple(token.id for token in tokens) == (1, 2, 3)
        if count is None:
            assert completion.logprobs is None and tokens[0].logprobs is None
            continue
        assert completion.logprobs == tuple(token.logprobs for token in tokens)
        for token in tokens:
            assert token.logprobs is not None and token.logprobs.token_id == token.id
            assert len(token.logprobs.top) == count
            # One logit is 1 and the others are 0; of equal ones the lowest id comes first.
            assert token.logprobs.logprob == pytest.approx(1 - np.log(np.e + VOCAB - 1))
            assert [best for best, _ in token.logprobs.top[:2]] == [token.id, 0][:count]


def test_the_stop_token_has_one_too() -> None:
    completion = Scheduler(ScriptedEngine([[1]])).generate([0], GenerationOptions(logprobs=0))
    assert completion.token_ids == (1, EOS) and [found.token_id for found in completion.logprobs] == [1, EOS]


def test_the_prompts_are_there_before_the_first_token() -> None:
    tokenizer = byte_tokenizer()
    scheduler = Scheduler(scripted(tokenizer, "abcdefgh"), tokenizer)
    request = scheduler.submit([0, 5, 6], GenerationOptions(prompt_logprobs=True, max_new_tokens=2))
    next(iter(request))
    found = request.prompt_logprobs
    assert found is not None and [entry and entry.token_id for entry in found] == [None, 5, 6]
    assert request.result().prompt_logprobs == found
    assert request.stats.prompt_tokens == 3
    assert scheduler.submit([0]).prompt_logprobs is None


def test_long_prompts_are_scored_in_chunks_beside_others() -> None:
    """And their slots then serve prompts with the same beginning, but not those whose log-probabilities are wanted."""
    engine = ScriptedEngine([[1] * CONTEXT, [2] * CONTEXT])
    scheduler = Scheduler(engine)
    prompt = [1, *range(2, 36)]
    with engine.pause_at(2):
        running = scheduler.submit([0], GenerationOptions(max_new_tokens=30))
        scored = scheduler.submit(prompt, GenerationOptions(max_new_tokens=1, prompt_logprobs=True))
    assert [entry and entry.token_id for entry in scored.result().prompt_logprobs or ()] == [None, *prompt[1:]]
    assert len(running.result().token_ids) == 30
    names = [name for name, _ in engine.calls]
    assert names.count("score") == -(-34 // engine.prefill_chunk)
    first, last = names.index("score"), len(names) - 1 - names[::-1].index("score")
    assert "decode" in names[first:last]
    again = scheduler.submit(prompt, GenerationOptions(max_new_tokens=1, prompt_logprobs=True))
    assert again.result() == scored.result() and again.stats.reused_tokens == 0
    plain = scheduler.submit(prompt, GenerationOptions(max_new_tokens=1))
    assert plain.result().token_ids == scored.result().token_ids
    assert plain.stats.reused_tokens == 34


def test_logits_that_are_not_numbers_end_their_sequence_alone() -> None:
    class Engine(ScriptedEngine):
        def next_logits(self, token_ids: list[int]) -> np.ndarray:
            logits = super().next_logits(token_ids)
            return np.full_like(logits, np.nan) if token_ids[0] == 1 and len(token_ids) == 2 else logits

    scheduler = Scheduler(Engine([[3] * 9, [4] * 9]))
    options = GenerationOptions(max_new_tokens=3, prompt_logprobs=True, logprobs=1)
    good, bad = scheduler.submit([0, 7, 7], options), scheduler.submit([1, 7, 7], options)
    assert len(good.result().logprobs or ()) == 3
    with pytest.raises(GenerationError, match="next-token logits hold NaN"):
        bad.result()
    assert scheduler.stats.free_slots == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": -1}, "logprobs is -1; it must be an integer from 0 to 20"),
        ({"logprobs": 21}, "logprobs is 21; it must be an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs is True; it must be an integer from 0 to 20"),
        ({"prompt_logprobs": 5}, "prompt_logprobs is 5; it must be True or False"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        GenerationOptions(**options)
