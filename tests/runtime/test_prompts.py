"""Prompts in every form that tokenizers return, and what cannot be one; the reference is transformers' tokenizer."""

import array
import collections
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import BatchEncoding, PreTrainedTokenizerFast

import tvm_attn
from tvm_attn.errors import GenerationError
from tvm_attn.runtime.decoding import Completion
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.prompts import read_prompts

SHORT, LONG = "Return the", "Once upon a time there was a list of"


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, "cpu")


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(demo_model_dir / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def generate(model: Model, *given: Any, **options: Any) -> Any:
    return model.generate(*given, max_new_tokens=6, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_what_a_tokenizer_returns(
    model: Model, tokenizer: PreTrainedTokenizerFast, tensors: str | None, side: str
) -> None:
    expected = [generate(model, tokenizer.encode(text)) for text in (SHORT, LONG)]
    tokenizer.padding_side = side
    both = tokenizer([SHORT, LONG], return_tensors=tensors, padding=True)
    assert min(map(min, np.asarray(both["attention_mask"]).tolist())) == 0, "one of them is padded"
    assert generate(model, both) == generate(model, dict(both)) == generate(model, **both) == expected
    assert generate(model, both["input_ids"], attention_mask=both["attention_mask"]) == expected
    assert generate(model, MappingProxyType(dict(both))) == expected
    one = tokenizer(SHORT, return_tensors=tensors)
    alone = expected[0] if tensors is None else expected[:1]
    assert generate(model, one) == generate(model, **one) == generate(model, input_ids=one["input_ids"]) == alone
    for start in (model.stream, model.stream_ids):
        pieces = list(start(SHORT, max_new_tokens=6))
        assert list(start(one, max_new_tokens=6)) == list(start(**one, max_new_tokens=6)) == pieces


def test_ragged_rows_and_lists_of_encodings(model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = [generate(model, tokenizer.encode(text)) for text in (SHORT, LONG)]
    assert generate(model, tokenizer([SHORT, LONG])) == expected
    assert generate(model, [tokenizer(SHORT), tokenizer(LONG)]) == expected
    library = tokenizer.backend_tokenizer
    assert generate(model, library.encode(SHORT)) == expected[0]
    assert generate(model, [library.encode(SHORT), library.encode(LONG)]) == expected
    padded = library.encode(SHORT)
    padded.pad(40, direction="left")
    assert isinstance(padded, tokenizers.Encoding) and padded.attention_mask[0] == 0
    assert generate(model, padded) == expected[0]


def test_fields_beside_the_ids(model: Model) -> None:
    expected = generate(model, [5, 6])
    given = {"input_ids": [5, 6], "attention_mask": None, "token_type_ids": [0, 0], "special_tokens_mask": [0, 0]}
    assert generate(model, given) == expected
    assert generate(model, BatchEncoding(given)) == expected
    assert generate(model, input_ids=[5, 6], attention_mask=None) == expected
    assert generate(model, [5, 6], token_type_ids=torch.zeros(2)) == expected


IDS = [5, 6, 7]


class OnlyArray:
    """An array that NumPy can read and that has no `ndim`, as PyArrow's have none."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.values, dtype)


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        array.array("q", IDS),
        collections.deque(IDS),
        collections.UserList(IDS),
        np.uint8(IDS),
        np.int64([[5, 6, 7], [0, 0, 0]])[0],
        np.int32([7, 6, 5])[::-1],
        np.ma.masked_array(IDS),
        [np.uint64(5), np.int8(6), 7],
        [torch.tensor(5), np.array(6), 7],
        torch.tensor(IDS),
        torch.tensor([5, 0, 6, 0, 7])[::2],
        torch.tensor(IDS, dtype=torch.int16),
        OnlyArray(IDS),
    ],
)
def test_one_prompt_of_ids(model: Model, given: Any) -> None:
    expected = generate(model, IDS)
    assert isinstance(expected, Completion)
    assert generate(model, given) == expected
    assert generate(model, [given, given]) == [expected, expected]


def test_text_of_other_types(model: Model) -> None:
    class Text(str):
        pass

    expected = generate(model, SHORT)
    assert generate(model, np.str_(SHORT)) == generate(model, Text(SHORT)) == expected
    assert generate(model, (SHORT, IDS)) == [expected, generate(model, IDS)]
    assert generate(model, []) == []
    # A tensor with one element converts to an integer, but it is still a prompt.
    assert generate(model, [torch.tensor([5]), torch.tensor([6])]) == [generate(model, [5]), generate(model, [6])]


class Unreadable:
    ndim, shape, dtype = 1, (2,), "int64"

    def __array__(self, *_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no\nvalues " * 10_000)


def mask(*values: Any, ids: Any = (5, 6, 7)) -> dict[str, Any]:
    return {"input_ids": list(ids), "attention_mask": list(values)}


WRONG = [
    (range(10**12), "the prompt has more than 1048576 tokens"),
    ([[1], range(2**70)], "prompt 2 of 2 has more than 1048576 tokens"),
    ({"input_ids": range(2**70)}, "more than 1048576 tokens"),
    (None, "there is no prompt; pass text"),
    (5, "the prompt is 5; pass text"),
    (True, "the prompt is True"),
    (1.5, r"the prompt is 1\.5"),
    (np.int64(5), "the prompt is int64 of shape \\(\\)"),
    (np.array(5), r"the prompt is int64 of shape \(\)"),
    (torch.tensor(5), r"the prompt is int64 of shape \(\)"),
    (np.zeros((1, 2, 2), int), r"the prompt is int64 of shape \(1, 2, 2\)"),
    (np.array([1.0, 2.0]), r"the prompt is float64 of shape \(2,\)"),
    (np.array([True, False]), "the prompt is bool"),
    (np.array([1, None]), "the prompt is object"),
    (np.array([[1, 2], [3]], object), "the prompt is object"),
    (np.array(["a", "b"]), "the prompt is <U1"),
    (np.array([b"a"]), "the prompt is"),
    (np.array(["2026-01-01"], "datetime64[D]"), "the prompt is datetime64"),
    (np.ma.masked_array([5, 6], [False, True]), "masked elements"),
    (torch.tensor([1.0, 2.0]), "the prompt is float32"),
    (torch.tensor([1, 2], dtype=torch.bfloat16), "NumPy cannot read"),
    (torch.tensor([1.0, 2.0], requires_grad=True), "NumPy cannot read"),
    (torch.tensor([1, 2]).to_sparse(), "NumPy cannot read"),
    (torch.tensor([1, 2], device="meta"), "NumPy cannot read"),
    (Unreadable(), "NumPy cannot read"),
    ((i for i in IDS), r"the prompt is a generator; make it a list first, with list\(\.\.\.\)"),
    (iter(IDS), "make it a list first"),
    (map(str, IDS), "make it a list first"),
    ({5, 6}, "the prompt is a set; make it a list first"),
    ({"a": 1}.values(), "make it a list first"),
    (b"text", "the prompt is a bytes; pass text"),
    (bytearray(b"text"), "the prompt is a bytearray; pass text"),
    (memoryview(b"text"), "the prompt is a memoryview; pass text"),
    (object(), "the prompt is a object"),
    ([None], "prompt 1 of 1 is None"),
    (["a", 5], "prompt 2 of 2 is 5"),
    (["a", None], "prompt 2 of 2 is None"),
    (["a", b"b"], "prompt 2 of 2 is a bytes"),
    ([5, "a"], "its item 1 is 'a'"),
    ([5, True], "its item 1 is True"),
    ([np.True_, 5], "prompt 1 of 2 is bool of shape"),
    ([5, 2.0], r"its item 1 is 2\.0"),
    ([5, torch.tensor(2.0)], "its item 1 is a Tensor"),
    ([5, torch.tensor(True)], "its item 1 is a Tensor"),
    ([5, [6]], "its item 1 is a list"),
    ([[5], [[6]]], "prompt 2 of 2 is not token ids: its item 0 is a list"),
    ([[5, 6], 7], "prompt 2 of 2 is 7"),
    ([np.array([[5]])], r"prompt 1 of 1 is int64 of shape \(1, 1\)"),
    ([[]], "the prompt has no tokens"),
    ([5, -1], "token id -1"),
    (np.array([5, 2048]), "token id 2048"),
    ({}, "a mapping that holds nothing"),
    ({"ids": IDS}, "a mapping that holds 'ids' but no \"input_ids\""),
    ({"text" * 10**6: 1}, "a mapping that holds 'text"),
    ({1: 2}, "a mapping that holds 1"),
    ({"input_ids": IDS, "position_ids": IDS}, "'position_ids', which is not supported"),
    ({"input_ids": "text"}, "input_ids is 'text'"),
    ({"input_ids": ["text"]}, "prompt 1 of 1 of input_ids is 'text'"),
    ({"input_ids": None}, "input_ids is None"),
    ({"input_ids": {"a": 1}}, "input_ids is a dict"),
    ({"input_ids": []}, "0 prompts|not 0|no tokens"),
    ({"input_ids": [], "attention_mask": []}, "0 prompts|not 0|no tokens"),
    ({"input_ids": IDS, "token_type_ids": [0, 1, 0]}, "token_type_ids that are not 0"),
    ([{"input_ids": [[5], [6]]}], "holds several prompts"),
    (mask(1, 1), r"3 tokens and an attention_mask of shape \(2,\)"),
    (mask(1, 0, 1), "zeros between ones"),
    (mask(0, 1, 0, 1, 0, ids=range(5)), "zeros between ones"),
    (mask(1, 1, 2), "values other than 0 and 1"),
    (mask(1, 1, -1), "values other than 0 and 1"),
    (mask(1, 1, 0.5), "values other than 0 and 1"),
    (mask(1, 1, float("nan")), "values other than 0 and 1"),
    (mask("1", "1", "1"), "values other than 0 and 1"),
    (mask(0, 0, 0), "has no tokens"),
    ({"input_ids": IDS, "attention_mask": 1}, r"attention_mask of shape \(\)"),
    ({"input_ids": [IDS], "attention_mask": 1}, "attention_mask is 1"),
    ({"input_ids": [IDS], "attention_mask": [1, 1, 1]}, "attention_mask has 3 rows and input_ids 1"),
    ({"input_ids": [IDS], "attention_mask": np.ones((2, 3))}, "attention_mask has 2 rows and input_ids 1"),
    ({"input_ids": [IDS], "attention_mask": np.ones((1, 1, 3))}, r"attention_mask of shape \(1, 3\)"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_prompt(model: Model, given: Any, message: str) -> None:
    for use in (generate, lambda model, given: list(model.stream(given))):
        with pytest.raises(GenerationError, match=message) as caught:
            if use(model, given) == []:
                raise GenerationError("0 prompts")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    if not isinstance(given, Mapping) and given is not None:
        with pytest.raises(GenerationError) as caught:
            model.logits(given)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert model.scheduler.stats.free_slots == 8


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "there is no prompt"),
        (([5],), {"input_ids": [5]}, "prompts and input_ids are both given"),
        ((SHORT,), {"attention_mask": [1]}, "input_ids is 'Return the'"),
        (({"input_ids": [5]},), {"attention_mask": [1]}, "attention_mask is given twice"),
        (([5],), {"position_ids": [0]}, "unknown option 'position_ids'"),
        (([5],), {"x" * 10**5: 1}, "unknown option 'xxx"),
        ((), {"attention_mask": [1]}, 'no "input_ids"'),
    ],
)
def test_arguments_that_do_not_go_together(
    model: Model, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    for call in (model.generate, model.stream, model.stream_ids):
        with pytest.raises(GenerationError, match=message) as caught:
            call(*arguments, **options)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows(model: Model, tokenizer: PreTrainedTokenizerFast, side: str) -> None:
    tokenizer.padding_side = side
    both = tokenizer([SHORT, LONG], return_tensors="pt", padding=True)
    logits = model.logits(**both)
    np.testing.assert_array_equal(model.logits(both), logits)
    np.testing.assert_array_equal(model.logits(both["input_ids"], attention_mask=both["attention_mask"]), logits)
    places = both["attention_mask"].numpy().astype(bool)
    for index, text in enumerate((SHORT, LONG)):
        np.testing.assert_array_equal(logits[index][places[index]], model.logits([tokenizer.encode(text)])[0])
        assert not logits[index][~places[index]].any()
    alone = model.logits(tokenizer(SHORT))
    np.testing.assert_array_equal(alone, model.logits([tokenizer.encode(SHORT)]))
    np.testing.assert_array_equal(model.logits(tokenizer.backend_tokenizer.encode(SHORT)), alone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2], [3]], "rows of 1 to 2 tokens; pad them and pass attention_mask, or make one call for each"),
        ([1, 2], r"integers \(B, T\), but are of shape \(2,\)"),
        ([], r"integers \(B, T\), but are empty"),
        (SHORT, "tokenize the text first"),
        ([SHORT], "tokenize the text first"),
        (np.zeros((2, 0), int), "row 0 has no tokens"),
        (np.zeros((1, 257), int), "row 0 has 257 tokens, the model's context is 256"),
        (np.zeros((1, 10**7), int), "row 0 has 10000000 tokens"),
        ([[1], [2048]], "row 1 holds the token id 2048"),
    ],
)
def test_ids_that_have_no_logits(model: Model, given: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.logits(given)


def test_a_text_that_cannot_fit_is_not_tokenized(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.tokenizer is not None
    longest = max(len(model.tokenizer._tokenizer.id_to_token(i)) for i in range(2048))
    most = 256 * longest
    with pytest.raises(GenerationError, match=r"the prompt has [0-9]+ tokens, the model's context is 256"):
        model.generate("a " * (most // 2))

    def fail(text: str) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(model.tokenizer, "encode", fail)
    for text in ("a" * (most + 1), "Return " * 10**6):
        for call in (model.generate, model.stream, model.stream_ids):
            with pytest.raises(
                GenerationError, match=rf"has {len(text)} characters, .*256 tokens, holds {most} at most"
            ):
                call(text)


def test_reading_keeps_text_and_ids_as_they_are() -> None:
    read = read_prompts(["a", [1, 2], np.array([3])])
    assert read.items[:2] == ["a", [1, 2]] and not read.is_single
    assert read_prompts("a").is_single
