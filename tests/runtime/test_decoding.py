"""Decoding, against transformers' `generate` on a real model and against scripted sequences."""

import gc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models
from transformers import GPT2Config as HuggingFaceConfig
from transformers import GPT2LMHeadModel

from tests.runtime.engines import CONTEXT, EOS, VOCAB, FakeEngine, ScriptedEngine, byte_tokenizer, scripted, wait_for
from tvm_attn.config import GPT2Config
from tvm_attn.errors import GenerationError, TokenizerError
from tvm_attn.runtime.decoding import Completion, GenerationOptions, GenerationStats, StopScanner
from tvm_attn.runtime.sampling import distribution
from tvm_attn.runtime.scheduler import Scheduler
from tvm_attn.runtime.tokenizer import Tokenizer

HUGE = 10**5000  # more digits than Python prints


class TorchEngine(FakeEngine):
    """A GPT-2 in PyTorch that recomputes every sequence at every step."""

    def __init__(self, model: GPT2LMHeadModel, max_batch: int = 4, **changes: Any) -> None:
        super().__init__(GPT2Config.from_dict(model.config.to_dict() | changes), max_batch)
        self.model = model

    @torch.inference_mode()
    def next_logits(self, token_ids: list[int]) -> np.ndarray:
        return self.model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].numpy()


@pytest.fixture(scope="module")
def model() -> Iterator[GPT2LMHeadModel]:
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with so small a model, more threads only wait
    config = HuggingFaceConfig(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    yield GPT2LMHeadModel(config).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length).tolist() for length in (5, 1, 17, 2, 9, 30, 3)]


def reference(model: GPT2LMHeadModel, prompt: list[int], **options: Any) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return tuple(found[0, len(prompt) :].tolist())


# --- against transformers ---


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_greedy_decoding_equals_transformers(model, prompts, penalty, max_batch):
    options = GenerationOptions(max_new_tokens=8, repetition_penalty=penalty)
    completions = Scheduler(TorchEngine(model, max_batch)).generate(prompts, options)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = reference(model, prompt, max_new_tokens=8, repetition_penalty=penalty)
        assert completion == Completion("", expected, "length")


def test_eos_stops_as_in_transformers(model, prompts):
    free = [reference(model, prompt, max_new_tokens=8) for prompt in prompts]
    eos = free[0][3]
    completions = Scheduler(TorchEngine(model, 3, eos_token_id=eos)).generate(
        prompts, GenerationOptions(max_new_tokens=8)
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = reference(model, prompt, max_new_tokens=8, eos_token_id=eos)
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if eos in expected else "length")
    assert completions[0].finish_reason == "stop" and len(completions[0].token_ids) <= 4


def test_each_of_several_end_tokens_stops_as_in_transformers(model, prompts):
    free = [reference(model, prompt, max_new_tokens=8) for prompt in prompts]
    ends = (free[0][3], free[1][2], free[2][5])
    scheduler = Scheduler(TorchEngine(model, 3, eos_token_id=list(ends)))
    completions = scheduler.generate(prompts, GenerationOptions(max_new_tokens=8))
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = reference(model, prompt, max_new_tokens=8, eos_token_id=list(ends))
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if set(ends) & set(expected) else "length")
        assert list(scheduler.stream_ids(prompt, GenerationOptions(max_new_tokens=8))) == list(expected)
    assert len({completion.token_ids[-1] for completion in completions[:3]} & set(ends)) > 1


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_no_stop_token_is_chosen_too_early_as_in_transformers(model, prompts, penalty):
    free = [reference(model, prompt, max_new_tokens=8, repetition_penalty=penalty) for prompt in prompts]
    ends = [free[0][1], free[1][0], free[2][3]]
    scheduler = Scheduler(TorchEngine(model, 3, eos_token_id=ends))
    options = {"max_new_tokens": 8, "min_new_tokens": 3, "repetition_penalty": penalty}
    completions = scheduler.generate(prompts, GenerationOptions(**options))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == reference(model, prompt, eos_token_id=ends, **options)
    assert any(completion.token_ids != ids for completion, ids in zip(completions, free, strict=True))
    assert not any({*completion.token_ids[:3]} & {*ends} for completion in completions)
    # Ids outside the vocabulary stop nothing, and sampling does not choose stop tokens either.
    far = GenerationOptions(**options, stop_token_ids=[VOCAB, 10**6])
    assert scheduler.generate(prompts[0], far).token_ids == free[0]
    sampled = GenerationOptions(**options, temperature=9.0, seed=1, stop_token_ids=range(VOCAB - 3), n=20)
    assert all({*found.token_ids[:3]} <= {*range(VOCAB - 3, VOCAB)} for found in scheduler.generate([3], sampled))


def test_sampling_draws_from_the_distribution_at_each_step(model, prompts):
    """Each token is the inverse of the cumulative distribution at the sequence's own random numbers."""
    options = GenerationOptions(max_new_tokens=6, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3)
    engine = TorchEngine(model, 2)
    completions = Scheduler(engine).generate(prompts, options)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        rng = np.random.default_rng(np.random.SeedSequence(3).spawn(len(prompts))[index])
        ids = list(prompt)
        for token_id in completion.token_ids:
            cumulative = distribution(engine.next_logits(ids).astype(np.float32), ids, options).cumsum()
            assert token_id == np.searchsorted(cumulative, rng.random(), side="right")
            ids.append(token_id)


def test_samples_do_not_depend_on_the_batch(model, prompts):
    options = GenerationOptions(max_new_tokens=6, temperature=1.5, seed=11)
    batches = [Scheduler(TorchEngine(model, slots)).generate(prompts, options) for slots in (1, 3, 7)]
    assert batches[0] == batches[1] == batches[2]
    alone = Scheduler(TorchEngine(model)).generate(prompts[0], options)
    assert alone == batches[0][0]
    reseeded = Scheduler(TorchEngine(model)).generate(
        prompts[0], GenerationOptions(max_new_tokens=6, temperature=1.5, seed=12)
    )
    assert reseeded != alone
    twice = Scheduler(TorchEngine(model)).generate([prompts[0]] * 2, options)
    assert twice[0] != twice[1], "the same prompt twice in a request must draw differently"


def test_without_a_seed_runs_differ(model, prompts):
    scheduler = Scheduler(TorchEngine(model))
    options = GenerationOptions(max_new_tokens=20, temperature=5.0)
    assert scheduler.generate(prompts[0], options) != scheduler.generate(prompts[0], options)


# --- batching ---


def test_freed_slots_are_refilled_and_finished_rows_leave():
    # Lengths with EOS: 1, 4, 2, 3, 1.
    engine = ScriptedEngine([[], [1, 2, 3], [4], [5, 6], []], max_batch=2)
    stats = GenerationStats()
    completions = Scheduler(engine).generate([[0], [1], [2], [3], [4]], stats=stats)
    assert [len(completion.token_ids) for completion in completions] == [1, 4, 2, 3, 1]
    assert engine.calls == [
        ("prefill", [0, 1]),  # the first ends at once
        ("prefill", [0]),
        ("decode", [1, 0]),  # the third ends
        ("prefill", [0]),
        ("decode", [1, 0]),
        ("decode", [1, 0]),  # the second and the fourth end
        ("prefill", [0]),
    ]
    assert (stats.prompt_tokens, stats.decode_tokens) == (5, 11 - 5)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert 0 < stats.first_token_seconds < stats.prefill_seconds + stats.decode_seconds + 1
    assert stats.decode_tokens_per_second == 6 / stats.decode_seconds
    assert stats.prefill_tokens_per_second == 5 / stats.prefill_seconds


def test_greedy_decoding_leaves_the_logits_on_the_device(model, prompts):
    for options, asked in [
        (GenerationOptions(max_new_tokens=3), "argmax"),
        (GenerationOptions(max_new_tokens=3, temperature=0, top_k=3), "argmax"),
        (GenerationOptions(max_new_tokens=3, repetition_penalty=1.1), "numpy"),
        (GenerationOptions(max_new_tokens=3, top_k=3), "numpy"),
    ]:
        engine = TorchEngine(model)
        Scheduler(engine).generate(prompts[:2], options)
        assert engine.asked == [asked] * 3


def test_one_prompt_gives_one_completion_and_a_list_gives_a_list(tokenizer):
    scheduler = Scheduler(scripted(tokenizer, "", "x", vocab_size=VOCAB), tokenizer)
    ids = [0]
    single = scheduler.generate(ids)
    assert single == Completion("", (EOS,), "stop")
    assert scheduler.generate(np.array(ids)) == scheduler.generate(torch.tensor(ids)) == single
    assert (
        scheduler.generate([ids])
        == scheduler.generate(np.array([ids]))
        == scheduler.generate([np.array(ids)])
        == [single]
    )
    assert scheduler.generate([]) == []
    assert scheduler.engine.calls == [("prefill", [0])] * 6


# --- the end of a sequence ---


@pytest.mark.parametrize("prompt_length, new_tokens", [(CONTEXT, 1), (CONTEXT - 1, 2), (CONTEXT - 5, 6)])
def test_the_context_ends_a_sequence(model, prompt_length, new_tokens):
    completion = Scheduler(TorchEngine(model)).generate([7] * prompt_length, GenerationOptions(max_new_tokens=100))
    assert len(completion.token_ids) == new_tokens
    assert completion.finish_reason == "length"


def test_the_stop_token_is_in_the_ids_and_not_in_the_text(tokenizer):
    (letter,) = tokenizer.encode("c")
    scheduler = Scheduler(scripted(tokenizer, "abcd", "x"), tokenizer)
    for stop_token_ids in (letter, [letter], {np.int64(letter), 3}):
        completion = scheduler.generate([0], GenerationOptions(stop_token_ids=stop_token_ids))
        assert completion == Completion("ab", tuple(tokenizer.encode("abc")), "stop")


def test_the_default_stop_token_is_eos_and_can_be_switched_off(tokenizer):
    engine = scripted(tokenizer, "ab")
    scheduler = Scheduler(engine, tokenizer)
    assert scheduler.generate([0]) == Completion("ab", (*tokenizer.encode("ab"), EOS), "stop")
    unstopped = scheduler.generate([0], GenerationOptions(stop_token_ids=(), max_new_tokens=5))
    assert unstopped == Completion("ab", (*tokenizer.encode("ab"), EOS, EOS, EOS), "length")
    other_end = scripted(tokenizer, "ab", eos_token_id=[*tokenizer.encode("b"), EOS])
    assert Scheduler(other_end, tokenizer).generate([0]) == Completion("a", tuple(tokenizer.encode("ab")), "stop")
    no_eos = Scheduler(scripted(tokenizer, "ab", eos_token_id=None), tokenizer)
    assert no_eos.generate([0], GenerationOptions(max_new_tokens=5)) == unstopped


@pytest.mark.parametrize(
    "text, stop, expected, consumed",
    [
        ("one. two. three", "two", "one. ", "one. two"),
        ("one. two. three", ["zebra", ". t"], "one", "one. t"),
        ("aaab", "aab", "a", "aaab"),
        ("abcd", ["abcd", "bc"], "a", "abc"),  # the first to be complete
        ("xabc", ["bc", "abc"], "x", "xabc"),  # complete at once: the longer
        ("größe", "ö", "gr", "grö"),
        ("a🙂b", "🙂", "a", "a🙂"),
        ("stop", "stop", "", "stop"),
    ],
)
def test_stop_strings_cut_the_text(tokenizer, text, stop, expected, consumed):
    scheduler = Scheduler(scripted(tokenizer, text), tokenizer)
    options = GenerationOptions(stop=stop)
    completion = scheduler.generate([0], options)
    assert completion == Completion(expected, tuple(tokenizer.encode(consumed)), "stop")
    assert "".join(scheduler.stream([0], options)) == expected


def test_text_held_back_for_a_stop_string_comes_when_it_does_not_follow(tokenizer):
    scheduler = Scheduler(scripted(tokenizer, "a\n\nUs: b\n\nUse"), tokenizer)
    options = GenerationOptions(stop="\n\nUser:")
    assert list(scheduler.stream([0], options)) == ["a", "\n\nUs:", " ", "b", "\n\nUse"]
    assert scheduler.generate([0], options) == Completion(
        "a\n\nUs: b\n\nUse", (*scheduler.engine.scripts[0], EOS), "stop"
    )


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30)),
)
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, cuts):
    scanner = StopScanner(stops)
    edges = sorted({0, len(text), *[cut for cut in cuts if cut <= len(text)]})
    out = [scanner.push(text[a:b]) for a, b in pairwise(edges)]
    found = "".join(out) + scanner.flush()
    # By definition: the shortest beginning of the text that ends in a stop string, minus the longest such string.
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            assert scanner.hit and found == text[: end - max(map(len, complete))]
            return
    assert not scanner.hit and found == text


# --- streaming ---


def drain(stream: Any) -> tuple[list[Any], Completion]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@given(script=st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=30), stop=st.sampled_from([(), "e", "ab"]))
def test_stream_adds_up_to_generate(tokenizer, script, stop):
    scheduler = Scheduler(ScriptedEngine([script]), tokenizer)
    options = GenerationOptions(stop=stop, max_new_tokens=25)
    completion = scheduler.generate([0], options)
    pieces, streamed = drain(scheduler.stream([0], options))
    assert streamed == completion
    assert "".join(pieces) == completion.text and "" not in pieces
    if not stop:
        assert completion.text == tokenizer.decode(completion.token_ids)
    assert drain(scheduler.stream_ids([0], options)) == (list(completion.token_ids), completion)


def test_a_character_is_streamed_whole(tokenizer):
    scheduler = Scheduler(scripted(tokenizer, "a🙂ö"), tokenizer)
    assert list(scheduler.stream([0])) == ["a", "🙂", "ö"]
    pieces, completion = drain(scheduler.stream([0], GenerationOptions(max_new_tokens=3)))
    assert pieces == ["a", "�"] and completion.text == "a�"


def test_a_stream_starts_when_it_is_advanced_and_runs_ahead(tokenizer):
    engine = scripted(tokenizer, "abc")
    scheduler = Scheduler(engine, tokenizer)
    stream = scheduler.stream([0])
    assert engine.calls == []
    assert next(stream) == "a"
    wait_for(lambda: scheduler.stats.free_slots == 4)
    assert engine.calls == [("prefill", [0]), *[("decode", [0])] * 3]
    assert list(stream) == ["b", "c"]


@pytest.mark.parametrize("end", ["close", "drop", "collect"])
def test_a_stream_that_nobody_reads_any_more_frees_its_slot(tokenizer, end):
    engine = scripted(tokenizer, "ab" * 15, max_batch=1)
    scheduler = Scheduler(engine, tokenizer)
    for start in (scheduler.stream, scheduler.stream_ids):
        with engine.pause_at(3):
            stream = start([0])
            next(stream)
            if end == "close":
                stream.close()
            elif end == "drop":
                del stream
            else:
                cycle = [stream]
                cycle.append(cycle)
                del stream, cycle
                gc.collect()
        wait_for(lambda: scheduler.stats.free_slots == 1)
        assert scheduler.stats.generated_tokens < 10
        assert scheduler.generate([0], GenerationOptions(max_new_tokens=1)).text == "a"


def test_open_streams_hold_up_nobody(tokenizer):
    scheduler = Scheduler(scripted(tokenizer, "abcdef", "ghijkl", "mn", max_batch=1), tokenizer)
    first, second = scheduler.stream([0]), scheduler.stream([1])
    text = [next(first) + next(second) for _ in range(3)]
    assert [completion.text for completion in scheduler.generate([[2], [0], [2]])] == ["mn", "abcdef", "mn"]
    text += [next(first) + next(second) for _ in range(3)]
    assert "".join(text) == "agbhcidjekfl"


def test_a_failing_engine_frees_the_slots(tokenizer):
    engine = scripted(tokenizer, "abc", max_batch=2)
    scheduler = Scheduler(engine, tokenizer)

    class Broken(RuntimeError):
        pass

    def fail(*_args: Any, **_options: Any) -> None:
        raise Broken

    engine.decode, decode = fail, engine.decode
    with pytest.raises(Broken):
        scheduler.generate([[0], [0]])
    engine.decode = decode
    assert [completion.text for completion in scheduler.generate([[0], [0]])] == ["abc", "abc"]
    assert engine.calls[-1] == ("decode", [0, 1])


# --- prompts ---


def test_text_prompts_are_encoded(tokenizer):
    engine = scripted(tokenizer, "x")
    engine.scripts = [[]] * VOCAB
    Scheduler(engine, tokenizer).generate("größe", GenerationOptions(max_new_tokens=1))
    assert engine.cache[0] == tokenizer.encode("größe")


def test_stop_strings_over_byte_fallback():
    """A run of byte tokens has no text before it ends; whatever follows a stop string in it is cut off."""
    tokens = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b"]
    library = LibraryTokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(library.to_str())
    script = [*(1 + byte for byte in "é🙂ü".encode()), tokens.index("a"), tokens.index("▁"), tokens.index("b")]
    for stop, expected in [("🙂", "é"), ("üa", "é🙂"), ("a b", "é🙂ü"), ("x", "é🙂üa b"), (["ü", "b"], "é🙂")]:
        engine = ScriptedEngine([script], vocab_size=300, eos_token_id=0)
        engine.scripts[0] = [*script, 0]
        options = GenerationOptions(stop=stop)
        completion = Scheduler(engine, tokenizer).generate([0], options)
        assert (completion.text, completion.finish_reason) == (expected, "stop")
        assert "".join(Scheduler(engine, tokenizer).stream([0], options)) == expected


@pytest.mark.parametrize(
    "ids, start",
    [({"bos_token_id": 5}, 5), ({"bos_token_id": None}, EOS), ({"bos_token_id": None, "eos_token_id": [7, EOS]}, 7)],
)
def test_the_empty_text_starts_with_bos_or_eos(tokenizer, ids, start):
    engine = ScriptedEngine([[]] * VOCAB, **ids)
    Scheduler(engine, tokenizer).generate(["", ""])
    assert engine.cache == {0: [start], 1: [start]}


def test_the_empty_text_without_bos_and_eos(tokenizer):
    engine = ScriptedEngine([[]], bos_token_id=None, eos_token_id=None)
    with pytest.raises(GenerationError, match="has no tokens"):
        Scheduler(engine, tokenizer).generate("")


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([[1], []], "^prompt 2 of 2 has no tokens"),
        (np.array([], np.int64), "^the prompt has no tokens"),
        ([1, VOCAB], rf"token id {VOCAB}; the model's vocabulary is 0\.\.{VOCAB - 1}"),
        ([3, -1], "token id -1"),
        ([1] * (CONTEXT + 1), f"has {CONTEXT + 1} tokens, the model's context is {CONTEXT}"),
        (np.array([1.0, 2.0]), "the prompt is float64 of shape .*; ids must be"),
        ([1, "a"], "the prompt is not token ids: its item 1 is 'a'"),
        ([None], "prompt 1 of 1 is None"),
        ([[[1, 2], [3]]], "prompt 1 of 1 is not token ids: its item 0 is a list"),
        ([2**70, 1], "token id 11805916"),
        pytest.param([1, HUGE], "token id a huge int", id="huge id"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, message):
    engine = ScriptedEngine([[1]])
    with pytest.raises(GenerationError, match=message):
        Scheduler(engine).generate(prompt)
    assert engine.calls == []


def test_streams_refuse_prompts_when_asked_for(tokenizer):
    scheduler = Scheduler(ScriptedEngine([[1]]), tokenizer)
    for start in (scheduler.stream, scheduler.stream_ids):
        with pytest.raises(GenerationError, match="one prompt, not 0"):
            start([])
        with pytest.raises(GenerationError, match="has no tokens"):
            start([[]])


def test_text_needs_a_tokenizer():
    scheduler = Scheduler(ScriptedEngine([[1]]))
    for prompt in ("text", ["text"], ""):
        with pytest.raises(TokenizerError, match="pass token ids"):
            scheduler.generate(prompt)
    with pytest.raises(TokenizerError, match="use stream_ids"):
        scheduler.stream([0])
    with pytest.raises(TokenizerError, match="use stop_token_ids"):
        scheduler.generate([0], GenerationOptions(stop="x"))
    assert list(scheduler.stream_ids([0])) == [1, EOS]


@pytest.mark.parametrize("options", [GenerationOptions(), GenerationOptions(temperature=1.0)])
def test_nan_logits_are_refused(options):
    engine = ScriptedEngine([[1]])
    engine.next_logits = lambda _ids: np.full(VOCAB, np.nan)
    scheduler = Scheduler(engine)
    with pytest.raises(GenerationError, match="next-token logits"):
        scheduler.generate([0], options)
    assert scheduler.stats.free_slots == 4


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("n", 0),
        ("n", True),
        ("seed", -1),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [b"a"]),
        ("stop", 7),
        ("stop_token_ids", -1),
        ("stop_token_ids", [1, "a"]),
        ("stop_token_ids", "5"),
        ("stop_token_ids", True),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", (i for i in [1])),
        pytest.param("stop_token_ids", -HUGE, id="huge stop"),
        ("stop", {"a": 1}.items()),
        ("stop", (s for s in "a")),
        ("seed", 1 << 1024),
        pytest.param("seed", HUGE, id="huge seed"),
        ("seed", np.True_),
        ("max_new_tokens", np.int64(-(2**63))),
        ("top_p", 0),
    ],
)
def test_options_out_of_range(name, value):
    with pytest.raises(GenerationError, match=r"; (it|a stop string) must be ") as caught:
        GenerationOptions(**{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name, value", [("stop_token_ids", {1: 2}), ("stop", {"a": 1}), ("stop_token_ids", range(2**60))]
)
def test_collections_that_are_no_lists(name, value):
    with pytest.raises(GenerationError, match="pass one, or a list of at most"):
        GenerationOptions(**{name: value})


def test_options_are_of_python():
    """NumPy's integers overflow: a prompt's length plus 2^63 - 1 was negative."""
    given = GenerationOptions(
        max_new_tokens=np.int64(2**63 - 1),
        seed=np.uint8(7),
        stop=np.array(["ab", "c"]),
        stop_token_ids=torch.tensor([3, 4]),
    )
    assert given == GenerationOptions(
        max_new_tokens=2**63 - 1, seed=7, stop=("ab", "c"), stop_token_ids=frozenset([3, 4])
    )
    assert {type(value) for value in (given.max_new_tokens, given.seed, *given.stop_token_ids)} == {int}
    assert {type(value) for value in given.stop} == {str}
    assert GenerationOptions(**dict.fromkeys(GenerationOptions.__dataclass_fields__)) == GenerationOptions()
    engine = ScriptedEngine([[1, 2, 3, 4, 5]])
    endless = GenerationOptions(max_new_tokens=np.int64(2**63 - 1), stop_token_ids=np.array([3, 4]))
    assert Scheduler(engine).generate([0], endless).token_ids == (1, 2, 3)
