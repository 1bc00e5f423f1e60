"""Speculation changes no result: what is generated with guesses is what is generated without them."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_attn
from tests.runtime.engines import CONTEXT, EOS, ScriptedEngine, byte_tokenizer, scripted
from tests.runtime.test_independence import FORMATS, bits_of, random_ids, same
from tvm_attn.compiler.replacement import check_out
from tvm_attn.config import param_shapes
from tvm_attn.errors import ArtifactError, GenerationError, TargetError
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.decoding import Completion, GenerationOptions, GenerationStats, Speculate, TokenSequence
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.sampling import Numbers, sequence_rng
from tvm_attn.runtime.scheduler import Scheduler
from tvm_attn.runtime.speculation import Guesser, Lookup, Speculation

SLOTS = 8


@pytest.fixture(autouse=True)
def guesses_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are always made then, on any machine."""
    monkeypatch.setattr(Speculation, "_cost", lambda self, key, count, unknown: 0.0 if key[0] else 1.0)
    monkeypatch.setattr(Speculation, "_is_plain_due", lambda self: False)


@pytest.fixture(scope="module", params=FORMATS)
def model(request: pytest.FixtureRequest, demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tvm_attn.compiler.build import build

    folder = tmp_path_factory.mktemp("demo") / "artifact"
    build(demo_model_dir, target="cpu", out=folder, verify=False, **FORMATS[request.param])  # type: ignore[arg-type]
    return tvm_attn.load(folder, "cpu", max_batch=SLOTS)


def test_rows_of_one_sequence_give_the_bits_of_one_token_a_call(model: Model) -> None:
    engine, ids = model.engine, random_ids(200, 0)
    for start in (1, 40, 127, 180):
        engine.prefill([ids[:start]], [0])
        places = np.arange(start, start + 20, dtype=np.int32)
        one = [engine.decode(ids[p : p + 1], np.zeros(1, np.int32), np.array([p], np.int32)) for p in places]
        expected = [logits.numpy()[0].copy() for logits in one]
        cache = bits_of(engine, 0, start + 20)
        for rows in (2, 3, engine.verified_rows, engine.verified_rows + 1, 20):
            engine.prefill([ids[:start]], [3])
            logits = engine.decode(ids[places[:rows]], np.full(rows, 3, np.int32), places[:rows]).numpy()
            assert same(list(logits), expected[:rows])
            assert same(bits_of(engine, 3, start + rows), [layer[:, :, : start + rows] for layer in cache])
            # Two sequences, the second with wrong tokens behind it, which are overwritten.
            engine.prefill([ids[:start], ids[:start]], [5, 6])
            engine.decode(random_ids(rows, 9), np.full(rows, 6, np.int32), places[:rows])
            both = np.tile(places[:rows], 2)
            logits = engine.decode(ids[both], np.repeat(np.array([5, 6], np.int32), rows), both).numpy()
            assert same(list(logits), expected[:rows] * 2)


def test_rows_of_one_sequence_against_pytorch(demo_artifact: Path, one_torch_thread: None) -> None:
    engine, artifact = tvm_attn.load(demo_artifact, "cpu").engine, Artifact(demo_artifact)
    weights = {name: artifact.parameters.read(name) for name in param_shapes(artifact.config)}
    ids = random_ids(60, 3)
    expected = Reference(artifact.config, weights).logits(ids[None])[0]
    engine.prefill([ids[:52]], [2])
    places = np.arange(52, 60, dtype=np.int32)
    logits = engine.decode(ids[places], np.full(8, 2, np.int32), places).numpy()
    np.testing.assert_allclose(logits, expected[52:], rtol=0, atol=2e-4)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"min_new_tokens": 30, "stop_token_ids": [11, 13, 262, 198]},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 6, "logprobs": 0},
    {"temperature": 1.2, "min_p": 0.05, "seed": 7, "frequency_penalty": 0.4, "n": 3},
    {"temperature": 0.3, "seed": 8, "min_new_tokens": 20, "stop": ["the", "\n\n"]},
    {"stop": ["and the", "once"], "max_new_tokens": 400},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_generates_the_same(model: Model, options: dict[str, Any]) -> None:
    text = "The cat sat on the mat. The dog sat on the log. The cat sat on the"
    longest = text + " mat." + text * 7
    prompts: list[Any] = [text, "Once upon a time", [7], longest, "A", "B C", text[:40]]
    options = {"max_new_tokens": 60} | options
    for batch in (prompts[:1], prompts[3:4], prompts[:2], prompts):
        expected = model.generate(batch, **options, speculate="off")
        stats = GenerationStats()
        assert model.generate(batch, **options, speculate="prompt", stats=stats) == expected
        assert stats.guessed_tokens >= stats.accepted_tokens
        if text in batch and options == {"max_new_tokens": 60}:
            assert stats.guessed_tokens


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def drafted(request: pytest.FixtureRequest, demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tvm_attn.compiler.build import build

    folder = tmp_path_factory.mktemp("drafted") / "artifact"
    build(demo_model_dir, target="cpu", dtype=request.param, draft="int4", out=folder, verify=False)
    return folder


def test_a_draft_changes_nothing(drafted: Path) -> None:
    model, plain = (tvm_attn.load(drafted, "cpu", draft=draft) for draft in (True, False))
    prompts: list[Any] = ["Return the list of", "Once upon a time", [7], "The cat"]
    for options in OPTIONS:
        for batch in (prompts[:1], prompts[:2], prompts):
            stats = GenerationStats()
            given = {"max_new_tokens": 40} | options
            assert model.generate(batch, **given, stats=stats) == plain.generate(batch, **given, speculate="off")
            if len(batch) == 1 and options in ({}, {"temperature": 0.7, "seed": 5}):
                assert stats.accepted_tokens > stats.guessed_tokens / 4  # a draft of other weights would not be right
    with pytest.raises(GenerationError, match="--draft int4"):
        plain.generate("Hello", speculate="draft")


def test_a_draft_is_an_artifact_that_the_manifest_covers(drafted: Path, tmp_path: Path) -> None:
    assert tvm_attn.load(drafted / "draft", "cpu").engine.draft is None
    copy = Path(shutil.copytree(drafted, tmp_path / "copy"))
    for name in ("draft/manifest.json", "draft/params/params_shard_0.bin"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + b"?")
        with pytest.raises(ArtifactError):
            tvm_attn.load(copy, "cpu")
        assert tvm_attn.load(copy, "cpu", draft=False).engine.draft is None
        (copy / name).write_bytes(content)
    check_out(copy)  # may be replaced: everything in it is its own
    (copy / "draft" / "notes.txt").touch()
    with pytest.raises(ArtifactError, match=r"draft/notes\.txt"):
        check_out(copy)


@pytest.mark.parametrize(("target", "quant", "draft"), [("cuda", "none", "int4"), ("cpu", "int4", "int4")])
def test_a_draft_that_makes_no_sense_is_refused(target: str, quant: str, draft: str, tmp_path: Path) -> None:
    from tvm_attn.compiler.build import build

    with pytest.raises(TargetError, match="draft"):
        build("demo", target=target, quant=quant, draft=draft, out=tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


def generate(engine: ScriptedEngine, prompt: list[int], speculate: Speculate = "prompt", **options: Any) -> Any:
    return Scheduler(engine).generate(prompt, GenerationOptions(speculate=speculate, **options))


@pytest.fixture
def periodic() -> ScriptedEngine:
    engine = ScriptedEngine([[1, 2, 3] * 20])
    engine.verified_rows = 6
    return engine


def test_right_guesses_save_calls(periodic: ScriptedEngine) -> None:
    stats = GenerationStats()
    options = GenerationOptions(speculate="prompt", max_new_tokens=28)
    completion = Scheduler(periodic).generate([0], options, stats)
    assert isinstance(completion, Completion)
    assert completion.token_ids == tuple(([1, 2, 3] * 20)[:28])
    calls = [name for name, _ in periodic.calls]
    # The first token is the prompt's. Five need a call each until two of them repeat; then six come at a time.
    assert calls == ["prefill", *["decode"] * (4 + 4)]
    assert (stats.decode_tokens, stats.guessed_tokens, stats.accepted_tokens) == (27, 19, 19)


def test_the_end_of_the_context(periodic: ScriptedEngine) -> None:
    completion = generate(periodic, [0], max_new_tokens=1000)
    assert completion.token_ids == tuple(([1, 2, 3] * 20)[:CONTEXT])
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("length", range(1, 25))
def test_the_last_token_is_not_passed(periodic: ScriptedEngine, length: int) -> None:
    assert generate(periodic, [0], max_new_tokens=length).token_ids == tuple(([1, 2, 3] * 20)[:length])


def test_a_stop_token_inside_right_guesses() -> None:
    for place in range(30):
        script = ([1, 2, 3] * 10)[:place] + [EOS] + [1, 2, 3] * 3
        engine = ScriptedEngine([script])
        engine.verified_rows = 6
        for options in ({}, {"min_new_tokens": 4}, {"stop_token_ids": [3]}):
            assert generate(engine, [0], **options) == generate(ScriptedEngine([script]), [0], "off", **options)


def test_stop_strings_cut_inside_right_guesses() -> None:
    tokenizer = byte_tokenizer()
    text = "ab ab ab ab ab abc ab"
    for stop in ("abc", "b a", "c ab", " ab ab"):
        results = []
        for rows in (1, 6):
            engine = scripted(tokenizer, text)
            engine.verified_rows = rows
            options = GenerationOptions(stop=stop, speculate="prompt" if rows > 1 else "off")
            results.append(Scheduler(engine, tokenizer).generate([0], options))
        assert results[0] == results[1]


def test_streams_get_every_token(periodic: ScriptedEngine) -> None:
    async def collect() -> list[int]:
        options = GenerationOptions(max_new_tokens=30, logprobs=1, speculate="prompt")
        request = Scheduler(periodic).submit([0], options)
        tokens = [token async for token in request]
        assert [token.logprobs for token in tokens] == list((await request.wait()).logprobs or ())
        return [token.id for token in tokens]

    assert asyncio.run(collect()) == ([1, 2, 3] * 20)[:30]


def test_a_batch_uses_only_rows_that_are_free() -> None:
    scripts = [[i, i + 1] * 20 for i in range(1, 5)]
    engine = ScriptedEngine(scripts)
    engine.verified_rows = 6
    completions = Scheduler(engine).generate(
        [[0], [1], [2], [3]], GenerationOptions(max_new_tokens=30, speculate="prompt")
    )
    assert isinstance(completions, list)
    assert [completion.token_ids for completion in completions] == [tuple(script[:30]) for script in scripts]
    # Six rows: two of the four sequences have a guess.
    assert len(engine.calls) < 30


def test_not_a_number_ends_one_sequence() -> None:
    class Broken(ScriptedEngine):
        def next_logits(self, token_ids: list[int]) -> np.ndarray:
            logits = super().next_logits(token_ids)
            return logits * np.nan if token_ids[0] == 1 and len(token_ids) > 9 else logits

    engine = Broken([[1, 2] * 20] * 2)
    engine.verified_rows = 6
    scheduler = Scheduler(engine)
    requests = [scheduler.submit([i], GenerationOptions(max_new_tokens=20, speculate="prompt")) for i in range(2)]
    assert requests[0].result().token_ids == tuple([1, 2] * 10)
    with pytest.raises(GenerationError, match="NaN"):
        requests[1].result()


class Drafted(ScriptedEngine):
    """An engine whose draft is wrong at every fifth place."""

    def __init__(self, scripts: list[list[int]]) -> None:
        super().__init__(scripts)
        self.verified_rows = 6
        wrong = [[9 if i % 5 == 4 else token for i, token in enumerate(script)] for script in scripts]
        self.draft = ScriptedEngine(wrong)
        self.draft.cache = self.cache  # one cache for both, as in a real engine


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"min_new_tokens": 20}], ids=str)
def test_drafts(options: dict[str, Any]) -> None:
    script = list(range(30, 70))
    for prompts in ([[0]], [[0], [1], [2]]):
        stats, drafted = GenerationStats(), Drafted([script] * 3)
        given = GenerationOptions(max_new_tokens=30, **options)
        found = Scheduler(drafted).generate(prompts, given, stats)
        assert found == Scheduler(ScriptedEngine([script] * 3)).generate(prompts, given)
        assert stats.guessed_tokens > stats.accepted_tokens
        if not options:
            assert stats.accepted_tokens > 4 * len(prompts)


class NoNumbers(ScriptedEngine):
    def next_logits(self, token_ids: list[int]) -> np.ndarray:
        return np.full(self.config.vocab_size, np.nan)


def test_a_draft_of_no_numbers_guesses_nothing() -> None:
    sampled: dict[str, Any] = {"temperature": 0.5, "seed": 1}
    for options in ({}, sampled):
        drafted = Drafted([list(range(30, 70))])
        drafted.draft = NoNumbers([[]])
        drafted.draft.cache = drafted.cache
        stats = GenerationStats()
        given = GenerationOptions(max_new_tokens=10, **options)
        found = Scheduler(drafted).generate([0], given, stats)
        assert found == Scheduler(ScriptedEngine([list(range(30, 70))])).generate([0], given)
        assert stats.guessed_tokens == 0


def test_what_cannot_be_done_is_refused() -> None:
    engine = ScriptedEngine([[1]])
    kinds: tuple[Speculate, ...] = ("draft", "prompt")
    for speculate in kinds:
        with pytest.raises(GenerationError, match="processors"):
            generate(engine, [0], speculate)
    engine.verified_rows = 6
    with pytest.raises(GenerationError, match="--draft int4"):
        generate(engine, [0], "draft")
    with pytest.raises(GenerationError, match="speculate"):
        GenerationOptions(speculate="often")  # type: ignore[arg-type]
    scheduler = Scheduler(engine)
    with pytest.raises(GenerationError, match="--draft int4"):
        scheduler.speculate = "draft"
    scheduler.speculate = "off"
    stats = GenerationStats()
    scheduler.generate([0], GenerationOptions(), stats)
    assert stats.guessed_tokens == 0


def sequence_of(ids: list[int]) -> TokenSequence:
    config = ScriptedEngine([[1]]).config
    sequence = TokenSequence(np.array(ids[:1], np.int32), GenerationOptions(), config, None, 0, GenerationStats())
    for token_id in ids[1:]:
        sequence.push(token_id)
    return sequence


def looked_up(ids: list[int], most: int) -> list[int]:
    """The definition: what followed the latest earlier occurrence of the last 3, else 2 tokens, going round."""
    for size in (3, 2):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:] and len(ids) > size:
                extended = list(ids)
                for i in range(most):
                    extended.append(extended[end + i])
                return extended[len(ids) :]
    return []


def test_lookup_finds_what_the_definition_finds() -> None:
    rng = np.random.default_rng(0)
    for case in range(200):
        ids = rng.integers(0, 2 + case % 5, rng.integers(1, CONTEXT)).tolist()
        sequence = sequence_of(ids[:1])
        lookup = Lookup(sequence)
        for count in range(1, len(ids)):
            sequence.push(ids[count])
            if rng.integers(2):
                most = int(rng.integers(1, 8))
                assert lookup.find(most) == looked_up(ids[: count + 1], most)


def test_numbers_can_be_seen_before_they_are_taken() -> None:
    plain, numbers, rng = sequence_rng(3, 1), Numbers(sequence_rng(3, 1)), np.random.default_rng(0)
    expected = [plain.random() for _ in range(200)]
    taken: Iterator[int] = iter(range(150))
    for place in taken:
        ahead = int(rng.integers(6))
        assert numbers.peek(ahead).random() == expected[place + ahead]
        assert numbers.random() == expected[place]


def test_pauses_grow_until_a_guess_is_right() -> None:
    guesser = Guesser(sequence_of([1, 2]), "prompt")

    def pause() -> int:
        guesser.pause()
        return next(steps for steps in range(1000) if not guesser.is_waiting())

    def miss() -> int:
        steps = pause()
        guesser.count(5, 0)
        return steps

    assert [miss() for _ in range(8)] == [4, 8, 16, 32, 64, 128, 256, 256]
    guesser.count(5, 2)
    assert pause() == 4


def test_expected_tokens_follow_the_rate() -> None:
    guesser = Guesser(sequence_of([1, 2]), "draft")
    for _ in range(60):  # four of five guesses are right: on average 4 before the first wrong one
        guesser.count(9, 4)
    expected = sum(0.8**i for i in range(6))
    assert guesser.expected(5) == pytest.approx(expected, rel=1e-3)
