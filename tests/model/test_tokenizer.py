"""Tokenizers: any text comes back, both file layouts give the same ids, and malformed files are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tvm_attn.errors import TokenizerError
from tvm_attn.model.tokenizer import tokenizer_json

END = "<|endoftext|>"
VOCAB_SIZE = 400
TEXT = Path(__file__).read_text(encoding="utf-8")  # what the tokenizer is trained on


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


TRAINED = train()


@pytest.fixture
def new_layout(tmp_path: Path) -> Path:
    folder = tmp_path / "new"
    folder.mkdir()
    TRAINED.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def old_layout(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    TRAINED.model.save(str(folder))
    assert sorted(file.name for file in folder.iterdir()) == ["merges.txt", "vocab.json"]
    return folder


def built(folder: Path, vocab_size: int | None = VOCAB_SIZE) -> Tokenizer:
    text = tokenizer_json(folder, vocab_size)
    assert text is not None
    return Tokenizer.from_str(text)


def refusal(folder: Path, vocab_size: int | None = VOCAB_SIZE) -> str:
    with pytest.raises(TokenizerError) as caught:
        tokenizer_json(folder, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer, Any]:
    """The tokenizer read from tokenizer.json, the one built from vocab.json and merges.txt, and transformers' one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "new").mkdir()
    (folder / "old").mkdir()
    TRAINED.save(str(folder / "new" / "tokenizer.json"))
    vocab, merges = TRAINED.model.save(str(folder / "old"))
    pairs: Any = [tuple(line.split(" ")) for line in Path(merges).read_text(encoding="utf-8").splitlines()[1:]]
    theirs = transformers.GPT2Tokenizer(vocab=json.loads(Path(vocab).read_text(encoding="utf-8")), merges=pairs)
    return built(folder / "new"), built(folder / "old"), theirs


@given(text=st.text() | st.text(st.characters(codec="ascii")) | st.sampled_from(TEXT.split("\n")))
def test_any_text_comes_back_and_all_layouts_agree(tokenizers: tuple[Tokenizer, Tokenizer, Any], text: str) -> None:
    new, old, theirs = tokenizers
    ids = old.encode(text).ids
    assert old.decode(ids, skip_special_tokens=False) == text
    assert new.encode(text).ids == ids
    assert TRAINED.encode(text).ids == ids
    assert theirs(text)["input_ids"] == ids
    assert all(0 <= token < VOCAB_SIZE for token in ids)


@given(parts=st.lists(st.text(max_size=8) | st.just(END), max_size=6))
def test_end_of_text_is_one_token_wherever_it_stands(
    tokenizers: tuple[Tokenizer, Tokenizer, Any], parts: list[str]
) -> None:
    text = "".join(parts)
    end = TRAINED.get_vocab()[END]
    for tokenizer in tokenizers[:2]:
        ids = tokenizer.encode(text).ids
        assert ids.count(end) == text.count(END)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(ids) == text.replace(END, "")


def test_no_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_json(tmp_path) is None


def test_tokenizer_json_is_preferred(new_layout: Path) -> None:
    (new_layout / "vocab.json").write_text("not read")
    assert built(new_layout).get_vocab() == TRAINED.get_vocab()


def test_truncation_and_padding_are_left_out(new_layout: Path) -> None:
    tokenizer = Tokenizer.from_str(TRAINED.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(new_layout / "tokenizer.json"))
    assert built(new_layout).encode(TEXT).ids == TRAINED.encode(TEXT).ids
    assert built(new_layout).encode("a").ids == TRAINED.encode("a").ids


def test_ids_must_lie_below_the_vocabulary_size(new_layout: Path, old_layout: Path) -> None:
    for folder in (new_layout, old_layout):
        assert built(folder, VOCAB_SIZE + 1).get_vocab_size() == VOCAB_SIZE  # a padded vocabulary is fine
        assert built(folder, None).get_vocab_size() == VOCAB_SIZE
        assert f"the id {VOCAB_SIZE - 1}, but the model's vocab_size is {VOCAB_SIZE - 1}" in refusal(
            folder, VOCAB_SIZE - 1
        )
    tokenizer = Tokenizer.from_str(TRAINED.to_str())
    tokenizer.add_tokens(["beyond"])
    tokenizer.save(str(new_layout / "tokenizer.json"))
    assert f"'beyond' the id {VOCAB_SIZE}" in refusal(new_layout)


def test_added_and_special_tokens_of_the_old_layout(old_layout: Path) -> None:
    added = {"<pad>": VOCAB_SIZE + 1, "<|im|>": VOCAB_SIZE, "plain word": VOCAB_SIZE + 2}
    (old_layout / "added_tokens.json").write_text(json.dumps(added))
    special: dict[str, Any] = {"pad_token": "<pad>", "eos_token": {"content": END, "lstrip": False}, "bos_token": None}
    special["additional_special_tokens"] = ["<|im|>", {"content": "<not in the vocabulary>"}]
    (old_layout / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = built(old_layout, VOCAB_SIZE + 3)
    assert {token: tokenizer.token_to_id(token) for token in added} == added
    assert tokenizer.token_to_id("<not in the vocabulary>") is None
    ids = tokenizer.encode("a<pad>plain word<|im|>").ids
    assert ids == [TRAINED.token_to_id("a"), VOCAB_SIZE + 1, VOCAB_SIZE + 2, VOCAB_SIZE]
    assert tokenizer.decode(ids) == "aplain word"
    by_hand = Tokenizer.from_str(TRAINED.to_str())
    by_hand.add_tokens([AddedToken("<|im|>", special=True), AddedToken("<pad>", special=True), "plain word"])
    assert tokenizer.encode(TEXT).ids == by_hand.encode(TEXT).ids
    assert "the id 402, but the model's vocab_size is 402" in refusal(old_layout, VOCAB_SIZE + 2)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("version", ["#version: 0.2", None])
def test_merges_with_any_line_ends_and_without_version(old_layout: Path, line_end: str, version: str | None) -> None:
    lines = (old_layout / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    text = line_end.join([version, *lines] if version else lines)
    (old_layout / "merges.txt").write_bytes(text.encode())
    assert built(old_layout).encode(TEXT).ids == TRAINED.encode(TEXT).ids


def test_ids_of_the_model_itself_match_transformers_for_one_merge(tmp_path: Path) -> None:
    """A vocabulary small enough to work out by hand: "abb" is "ab" + "b", for the merge comes first."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "bb": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nb b\n")
    assert built(tmp_path, 4).encode("abbbb").ids == [2, 3, 1]


def spoiled(change: Callable[[dict[str, Any]], object]) -> str:
    tokenizer = json.loads(TRAINED.to_str())
    change(tokenizer)
    return json.dumps(tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        TRAINED.to_str()[:-1],
        spoiled(lambda t: t.update(version="9.0")),
        spoiled(lambda t: t["model"].update(type="Unheard")),
        spoiled(lambda t: t["model"]["merges"].append(["zz", "q"])),
        spoiled(lambda t: t["model"]["vocab"].update(zz=-1)),
        spoiled(lambda t: t["model"]["vocab"].update(zz=2**40)),
        spoiled(lambda t: t["model"]["vocab"].update(zz=1.5)),
    ],
)
def test_a_malformed_tokenizer_json_is_refused(new_layout: Path, text: str) -> None:
    (new_layout / "tokenizer.json").write_text(text, encoding="utf-8")
    assert f"{new_layout / 'tokenizer.json'} is not a valid tokenizer: " in refusal(new_layout)


def test_a_tokenizer_json_that_makes_the_library_panic_is_refused(
    new_layout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (new_layout / "tokenizer.json").write_text(spoiled(lambda t: t.update(normalizer=normalizer)))
    assert "is not a valid tokenizer: " in refusal(new_layout)
    assert "panicked" in capfd.readouterr().err  # otherwise this case no longer tests what it says


def test_other_faults_of_a_tokenizer_json(new_layout: Path) -> None:
    path = new_layout / "tokenizer.json"
    path.write_bytes(b'{"\xff": 1}')
    assert f"{path} is not UTF-8 text: " in refusal(new_layout)
    path.write_text(spoiled(lambda t: t["model"]["vocab"].update(zz=5)), encoding="utf-8")
    assert "gives one id to several tokens" in refusal(new_layout)
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    assert "has no tokens" in refusal(new_layout)


def test_a_malformed_vocabulary_is_refused(old_layout: Path) -> None:
    path = old_layout / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    unsound: list[Any] = [[], None, *({**vocab, "zz": wrong} for wrong in ("1", -1, 1.0, True))]
    for values in unsound:
        path.write_text(json.dumps(values), encoding="utf-8")
        assert f"{path} does not map tokens to ids" in refusal(old_layout)
    path.write_text(json.dumps({**vocab, "zz": 5}), encoding="utf-8")
    assert f"{path} gives one id to several tokens" in refusal(old_layout)
    path.write_text('{"a": 0', encoding="utf-8")
    assert f"{path} is not valid JSON: " in refusal(old_layout)
    path.unlink()
    assert f"{path} is missing" in refusal(old_layout)


def test_malformed_merges_are_refused(old_layout: Path) -> None:
    path = old_layout / "merges.txt"
    for line in ("ab", "a", "a b c", "zz qq", " ", "e ", " e", "e  r", "#version: 0.2"):
        path.write_text(f"#version: 0.2\n{line}\n", encoding="utf-8")
        assert f"{path}, line 2: {line!r} does not merge two tokens of vocab.json" in refusal(old_layout)
    path.write_bytes(b"\xff\xfe")
    assert f"{path} is not UTF-8 text: " in refusal(old_layout)
    path.unlink()
    assert f"{path} is missing" in refusal(old_layout)


def test_malformed_added_or_special_tokens_are_refused(old_layout: Path) -> None:
    added, special = old_layout / "added_tokens.json", old_layout / "special_tokens_map.json"
    unsound: list[Any] = [[], {"<a>": "1"}, {"<a>": None}]
    for values in unsound:
        added.write_text(json.dumps(values))
        assert f"{added} does not map tokens to ids" in refusal(old_layout)
    for token, wrong in (("<a>", VOCAB_SIZE + 1), ("e", 0)):
        added.write_text(json.dumps({token: wrong}))
        assert f"{added} gives " in refusal(old_layout, None)
    added.unlink()
    special.write_text("[]")
    assert f"{special} is not a JSON object" in refusal(old_layout)
