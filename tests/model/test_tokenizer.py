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
from tvm_attn.model.tokenizer import read_tokenizer
from tvm_attn.runtime.tokenizer import Tokenizer as RuntimeTokenizer

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
    text = read_tokenizer(folder, vocab_size).text
    assert text is not None
    return Tokenizer.from_str(text)


def refusal(folder: Path, vocab_size: int | None = VOCAB_SIZE) -> str:
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(folder, vocab_size)
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
    assert read_tokenizer(tmp_path).text is None


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
        message = refusal(folder, VOCAB_SIZE - 1)
        assert f"the id {VOCAB_SIZE - 1}, but the model's vocab_size is {VOCAB_SIZE - 1}" in message


def test_tokens_added_beyond_the_embeddings_are_noted(new_layout: Path, old_layout: Path) -> None:
    """As in a checkpoint that got a padding token for training, but no embedding for it: transformers loads it."""
    tokenizer = Tokenizer.from_str(TRAINED.to_str())
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save(str(new_layout / "tokenizer.json"))
    (old_layout / "added_tokens.json").write_text(json.dumps({"[PAD]": VOCAB_SIZE}))
    for folder in (new_layout, old_layout):
        assert read_tokenizer(folder, VOCAB_SIZE + 1).notes == ()
        (note,) = read_tokenizer(folder, VOCAB_SIZE).notes
        assert note.startswith("the tokenizer adds 1 token that the model has no embedding for ('[PAD]')")
        assert built(folder).encode("a[PAD]").ids == [TRAINED.token_to_id("a"), VOCAB_SIZE]
        runtime = RuntimeTokenizer(built(folder).to_str(), model_vocab_size=VOCAB_SIZE)
        assert runtime.encode("a") == TRAINED.encode("a").ids
        with pytest.raises(TokenizerError, match=rf"holds '\[PAD\]', whose id {VOCAB_SIZE} is beyond"):
            runtime.encode("a[PAD]")


def test_added_and_special_tokens_of_the_old_layout(old_layout: Path) -> None:
    added = {"<pad>": VOCAB_SIZE + 1, "<|im|>": VOCAB_SIZE, "plain word": VOCAB_SIZE + 2}
    (old_layout / "added_tokens.json").write_text(json.dumps(added))
    special: dict[str, Any] = {"pad_token": "<pad>", "eos_token": {"content": END, "lstrip": False}, "bos_token": None}
    special["additional_special_tokens"] = ["<|im|>", {"content": "<new>"}]
    (old_layout / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = built(old_layout, VOCAB_SIZE + 3)
    assert {token: tokenizer.token_to_id(token) for token in added} == added
    assert tokenizer.token_to_id("<new>") == VOCAB_SIZE + 3  # as in transformers: after all others
    ids = tokenizer.encode("a<pad>plain word<|im|>").ids
    assert ids == [TRAINED.token_to_id("a"), VOCAB_SIZE + 1, VOCAB_SIZE + 2, VOCAB_SIZE]
    assert tokenizer.decode(ids) == "aplain word"
    by_hand = Tokenizer.from_str(TRAINED.to_str())
    by_hand.add_tokens([AddedToken("<|im|>", special=True), AddedToken("<pad>", special=True), "plain word"])
    by_hand.add_tokens([AddedToken("<new>", special=True)])
    assert tokenizer.encode(TEXT).ids == by_hand.encode(TEXT).ids


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
        expected = f"{path}, line 2: {line!r} does not merge two tokens of vocab.json"
        assert " ".join(expected.split()) in refusal(old_layout)  # messages have single spaces
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


# --- against transformers' AutoTokenizer, over layouts of files ---

UNKNOWN, START, FINISH, PAD = "<unk>", "<s>", "</s>", "[PAD]"
LAST = VOCAB_SIZE - 1
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "quick",
    "##er",
    "fox",
    "a",
    ",",
    ".",
    "你",
    "好",
    "the fox",
]
TEXTS = [
    *(
        "the quick fox",
        " the  quicker fox. ",
        "Größe ÉA the FOX",
        "a<s>b </s> c",
        "a <x> b <y>  c",
        "[PAD][CLS] the[SEP]",
    ),
    *("你好, the fox\n\n", f"x{END} y", "<s>", "", " ", "don't it 's", "prefix<x>x <z>zz z"),
]


def flags(content: str, **given: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **given}


def old_files(folder: Path) -> None:
    TRAINED.model.save(str(folder))


def new_file(**entries: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = {**json.loads(TRAINED.to_str()), **entries}
        (folder / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")

    return write


def bert_file(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")


PREFIXING = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
TEMPLATE = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
TYPED_END = {"__type": "AddedToken", **flags(END, lstrip=True, rstrip=True)}
TYPED_START = {"__type": "AddedToken", **flags(START)}
ADDED = {
    "0": flags(END, special=True),
    "400": flags("<x>", lstrip=True, special=True),
    "401": flags("<y>", rstrip=True, special=False, normalized=True),
    "402": flags("<z>", single_word=True, special=False),
    "403": flags(START, special=False),
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
BERT = {"tokenizer_class": "BertTokenizer"}
Files = dict[str, Any]
LAYOUTS: dict[str, tuple[Callable[[Path], None], Files]] = {
    "old": (old_files, {}),
    "old, prefix space": (old_files, {"tokenizer_config": {"add_prefix_space": True}}),
    "old, bos in front": (old_files, {"tokenizer_config": {"add_bos_token": True}}),
    "old, own bos in front": (old_files, {"tokenizer_config": {"add_bos_token": True, "bos_token": START}}),
    "old, added tokens": (old_files, {"tokenizer_config": {"added_tokens_decoder": ADDED, "bos_token": START}}),
    "old, names only": (
        old_files,
        {"tokenizer_config": {"eos_token": FINISH, "pad_token": PAD, "bos_token": TYPED_START}},
    ),
    "old, names in the older file": (
        old_files,
        {"special_tokens_map": {"eos_token": flags(FINISH, lstrip=True), "pad_token": PAD}, "tokenizer_config": {}},
    ),
    "old, further names": (old_files, {"tokenizer_config": {"additional_special_tokens": ["<x>", "<y>"]}}),
    "old, names of its own": (
        old_files, {"tokenizer_config": {"extra_special_tokens": {"boi_token": "<x>"}, "eoi_token": "<y>"}},
    ),
    "old, added_tokens.json": (
        old_files,
        {"added_tokens": {"<x>": 400, "<y>": 401}, "special_tokens_map": {"pad_token": "<y>"}},
    ),
    "old, one token by two names": (
        old_files,
        {
            "tokenizer_config": {
                "bos_token": TYPED_START, "sep_token": {**TYPED_START, "rstrip": True}, "eos_token": TYPED_END,
            }
        },
    ),
    "old, a token of the vocabulary is special": (old_files, {"tokenizer_config": {"pad_token": "the"}}),
    "new": (new_file(), {}),
    "new, prefix space in the file": (new_file(pre_tokenizer=PREFIXING), {}),
    "new, prefix space in the file, as it is": (new_file(pre_tokenizer=PREFIXING), {"tokenizer_config": FAST}),
    "new, prefix space": (new_file(), {"tokenizer_config": {"add_prefix_space": True}}),
    "new, prefix space, as it is": (new_file(), {"tokenizer_config": {**FAST, "add_prefix_space": True}}),
    "new, prefix space, class": (
        new_file(), {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}},
    ),
    "new, add_bos_token": (new_file(), {"tokenizer_config": {"add_bos_token": True}}),
    "new, added tokens": (new_file(), {"tokenizer_config": {"added_tokens_decoder": ADDED, "bos_token": START}}),
    "new, added tokens, as it is": (new_file(), {"tokenizer_config": {**FAST, "added_tokens_decoder": ADDED}}),
    "new, other flags, as it is": (
        new_file(), {"tokenizer_config": {**FAST, "added_tokens_decoder": {"0": flags(END, lstrip=True)}}},
    ),
    "new, names only": (new_file(), {"tokenizer_config": {"eos_token": FINISH, "pad_token": PAD, "bos_token": START}}),
    "new, names only, as it is": (
        new_file(), {"tokenizer_config": {**FAST, "eos_token": FINISH, "unk_token": UNKNOWN}},
    ),
    "new, template": (new_file(post_processor=json.loads(TEMPLATE.__getstate__())), {}),
    "bert": (bert_file, {"tokenizer_config": BERT}),
    "bert, cased": (bert_file, {"tokenizer_config": {**BERT, "do_lower_case": False}}),
    "bert, accents and characters": (
        bert_file, {"tokenizer_config": {**BERT, "strip_accents": False, "tokenize_chinese_chars": False}},
    ),
    "bert, class in config.json": (bert_file, {"config": {"model_type": "gpt2", **BERT}}),
    "bert, names": (bert_file, {"tokenizer_config": {**BERT, "eos_token": FINISH, "cls_token": START}}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers(tmp_path: Path, layout: str) -> None:
    write, files = LAYOUTS[layout]
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = RuntimeTokenizer(built(tmp_path, None).to_str())
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        if "bert" in layout:
            assert expected.pop() == theirs.sep_token_id  # would end what is to be continued
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)


def test_bert_vocabulary_alone(tmp_path: Path) -> None:
    bert_file(tmp_path)
    ours = RuntimeTokenizer(built(tmp_path, len(WORDS)).to_str())
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    for text in TEXTS:
        assert [*ours.encode(text), theirs.sep_token_id] == theirs(text)["input_ids"]


def test_bert_file_of_transformers(tmp_path: Path) -> None:
    bert_file(tmp_path)
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False)
    theirs.add_tokens(["<x>"])
    (tmp_path / "saved").mkdir()
    theirs.save_pretrained(tmp_path / "saved")
    ours = RuntimeTokenizer(built(tmp_path / "saved", len(WORDS)).to_str())
    for text in TEXTS:
        assert [*ours.encode(text), theirs.sep_token_id] == theirs(text)["input_ids"]


def test_nothing_follows_a_prompt(old_layout: Path) -> None:
    (old_layout / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    assert RuntimeTokenizer(built(old_layout).to_str()).encode("a b") == TRAINED.encode("a b").ids


def test_a_sentencepiece_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\n")
    (note,) = read_tokenizer(tmp_path).notes
    assert "only as spiece.model; convert it" in note
    (note,) = read_tokenizer(tmp_path / "..").notes
    assert note.startswith("the checkpoint has no tokenizer: prompts and completions are token ids; for text, put its")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", [], "is not a JSON object"),
        ("tokenizer_config", {"add_prefix_space": "yes"}, "add_prefix_space in tokenizer_config.json must be"),
        ("tokenizer_config", {"add_bos_token": 1}, "add_bos_token in tokenizer_config.json must be"),
        ("tokenizer_config", {"pad_token": 5}, "have 5 where a token should be"),
        ("tokenizer_config", {"pad_token": ""}, "have '' where a token should be"),
        ("tokenizer_config", {"pad_token": {"lstrip": True}}, "where a token should be"),
        ("tokenizer_config", {"pad_token": flags(PAD, lstrip=5)}, "the flags of the token '[PAD]'"),  # type: ignore[arg-type]
        ("tokenizer_config", {"additional_special_tokens": 5}, "additional special tokens are 5, not a list"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "does not map tokens to ids"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": flags("<x>")}}, "does not map tokens to ids"),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: flags("<x>")}}, "does not map tokens to ids"),
        ("tokenizer_config", {"added_tokens_decoder": {"405": flags("<x>")}}, "after the vocabulary it would be 400"),
        ("tokenizer_config", {"added_tokens_decoder": {"400": flags("<" + "x" * 100_000)}}, "vocab_size"),
        ("tokenizer_config", {"tokenizer_class": "x" * 100_000, "pad_token": "\x00" * 100_000 + "\n"}, "vocab_size"),
        ("added_tokens", {"<x>": 400, "<y>": 400}, "gives one id to several tokens"),
    ],
    ids=range(15),
)  # fmt: skip
def test_malformed_settings_are_refused_in_one_short_line(
    old_layout: Path, name: str, content: object, message: str
) -> None:
    (old_layout / f"{name}.json").write_text(json.dumps(content))
    if message == "vocab_size":  # well-formed, but long
        (old_layout / "vocab.json").write_text('{"a": 0, "b": 1000}')
        (old_layout / "merges.txt").write_text("")
        message = "would be"
    shown = refusal(old_layout)
    assert message in shown or "belongs to another model" in shown
    assert len(shown) < 500
