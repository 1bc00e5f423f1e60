"""The tokenizer and its streaming, against decoding all at once by the tokenizers library and by transformers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tvm_attn.errors import TokenizerError
from tvm_attn.runtime.tokenizer import Tokenizer

CORPUS = ["the quick brown fox, the lazy dog. " * 9, "straße größe größer 你好 世界 你好 🙂🙃 🙂 👩‍👩‍👧 " * 9]
END_OF_TEXT = "<|endoftext|>"


def train(model: models.Model, trainer: trainers.Trainer, pre_tokenizer, decoder) -> LibraryTokenizer:
    library = LibraryTokenizer(model)
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoder
    library.train_from_iterator(CORPUS, trainer)
    return library


@pytest.fixture(scope="module")
def byte_level() -> LibraryTokenizer:
    """GPT-2's kind of tokenizer, with added tokens that a byte-level vocabulary could not spell."""
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library = train(models.BPE(), trainer, pre_tokenizer, decoders.ByteLevel())
    library.add_tokens([AddedToken("two words"), AddedToken("é"), AddedToken("Ġx"), AddedToken("好 ")])
    return library


@pytest.fixture(scope="module")
def tokenizer(byte_level: LibraryTokenizer) -> Tokenizer:
    return Tokenizer(byte_level.to_str())


def pieces_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*[decoder.push(token_id) for token_id in token_ids], decoder.flush()]


texts = st.text() | st.lists(st.sampled_from(["🙂", "👩‍👩‍👧", "你好", "größer", " the", "\n", END_OF_TEXT, "é"])).map(
    "".join
)


@given(text=texts)
def test_round_trip_of_text(tokenizer, byte_level, text):
    token_ids = tokenizer.encode(text)
    assert token_ids == byte_level.encode(text).ids
    assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)
    if "é" not in text:  # the library itself does not decode this added token to what it encoded
        assert tokenizer.decode(token_ids) == text.replace(END_OF_TEXT, "")


@given(token_ids=st.lists(st.integers(0, 340), max_size=60))  # with special, added and unknown ids, and broken UTF-8
def test_streamed_pieces_equal_the_whole(tokenizer, byte_level, token_ids):
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids) == byte_level.decode(token_ids, skip_special_tokens=True)
    for piece in pieces:
        piece.encode("utf-8")  # no lone surrogates


@given(data=st.binary(max_size=40))
def test_arbitrary_bytes_decode_as_python_decodes_them(tokenizer, byte_level, data):
    stand_ins = bytes_to_unicode()
    token_ids = [byte_level.token_to_id(stand_ins[byte]) for byte in data]
    decoded = tokenizer.decode(token_ids)
    assert "".join(pieces_of(tokenizer, token_ids)) == decoded
    assert decoded == data.decode("utf-8", "replace")


def test_a_character_comes_out_whole_and_at_once(byte_level):
    # Without merges every byte is its own token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = LibraryTokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(library.to_str())
    token_ids = tokenizer.encode("aé🙂b")
    assert pieces_of(tokenizer, token_ids) == ["a", "", "é", "", "", "", "🙂", "b", ""]
    # A byte that cannot start or continue a character is given up as soon as that is certain; an open end only at the
    # end.
    lead, start_of_four = token_ids[1], token_ids[3:5]
    assert pieces_of(tokenizer, [lead, token_ids[0], *start_of_four]) == ["", "�a", "", "", "�"]


def test_special_tokens_are_kept_in_ids_and_left_out_of_text(tokenizer, byte_level):
    token_ids = tokenizer.encode(f"the dog{END_OF_TEXT}the fox")
    assert byte_level.token_to_id(END_OF_TEXT) in token_ids
    assert tokenizer.decode(token_ids) == "the dogthe fox"


def test_agrees_with_transformers(tokenizer, byte_level):
    other = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token=END_OF_TEXT)
    text = f"the größer dog 🙂{END_OF_TEXT} x"
    assert tokenizer.encode(text) == other(text).input_ids
    assert tokenizer.decode(tokenizer.encode(text)) == other.decode(other(text).input_ids, skip_special_tokens=True)


def test_a_flushed_decoder_starts_again(tokenizer):
    decoder = tokenizer.stream_decoder()
    (first, *_) = tokenizer.encode("ÿ")
    assert (decoder.push(first) + decoder.flush(), decoder.flush()) == (tokenizer.decode([first]), "")


def test_truncation_and_padding_in_the_file_are_ignored(byte_level):
    library = LibraryTokenizer.from_str(byte_level.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=50)
    text = "the quick brown fox, the lazy dog"
    assert Tokenizer(library.to_str()).encode(text) == byte_level.encode(text).ids


def word_piece() -> LibraryTokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return train(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())


def metaspace() -> LibraryTokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return train(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def without_decoder() -> LibraryTokenizer:
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    model = models.WordLevel(unk_token="[UNK]")
    return train(model, trainer, pre_tokenizers.Whitespace(), None)


def byte_fallback() -> LibraryTokenizer:
    """As in Llama: bytes without a token become <0xNN>, and a run of them is one piece of text."""
    tokens = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "▁the", "a", "b"]
    library = LibraryTokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


def byte_fallback_unigram() -> LibraryTokenizer:
    """As in T5 with byte fallback: no Fuse, and Metaspace drops the leading spaces of the first token."""
    pieces = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "▁the", "a", "b", "</s>"]
    library = LibraryTokenizer(models.Unigram([(piece, -1.0 * i) for i, piece in enumerate(pieces)], 0, True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    library.add_special_tokens(["</s>"])
    return library


def byte_level_in_a_sequence() -> LibraryTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = LibraryTokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.Sequence([decoders.ByteLevel()])
    return library


def suffixes() -> LibraryTokenizer:
    """As in GPT-1: a word ends in </w>, which is a space unless it is the last."""
    tokens = ["<unk>", "the</w>", "fox", "fox</w>", "a", "b</w>", "</w>"]
    library = LibraryTokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    library.decoder = decoders.BPEDecoder()
    return library


def patterns_across_tokens() -> LibraryTokenizer:
    library = byte_fallback()
    cleaning = [decoders.Fuse(), decoders.Replace(" a", "A"), decoders.Strip(" ", 2, 0)]
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *cleaning])
    return library


TOKENWISE = [word_piece, metaspace, without_decoder, byte_fallback, byte_fallback_unigram]
OTHERS = [byte_level_in_a_sequence, suffixes, patterns_across_tokens]


@pytest.fixture(scope="module", params=[*TOKENWISE, *OTHERS], ids=lambda make: make.__name__)
def other_kind(request) -> tuple[LibraryTokenizer, Tokenizer]:
    library = request.param()
    library.add_special_tokens(["<s>"])
    library.add_tokens(["two words", " ", "##", "▁▁"])
    return library, Tokenizer(library.to_str())


@settings(max_examples=300)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(other_kind, data):
    library, tokenizer = other_kind
    count = tokenizer.vocab_size
    few = data.draw(st.lists(st.integers(0, count + 3), min_size=1, max_size=6))  # so that ids repeat
    token_ids = data.draw(st.lists(st.sampled_from(few) | st.integers(max(0, count - 12), count + 3), max_size=24))
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids) == library.decode(token_ids, skip_special_tokens=True)


BYTES = byte_fallback()


@given(data=st.binary(max_size=24), letters=st.lists(st.integers(0, 24), max_size=4))
def test_bytes_among_letters_stream_to_what_they_decode_to(data, letters):
    library, tokenizer = BYTES, Tokenizer(BYTES.to_str())
    token_ids = [library.token_to_id(f"<0x{byte:02X}>") for byte in data]
    for position in letters:
        token_ids.insert(position, library.token_to_id("▁the"))
    assert "".join(pieces_of(tokenizer, token_ids)) == library.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("make", TOKENWISE)
def test_other_kinds_of_tokenizers_stream_too(make):
    library = make()
    tokenizer = Tokenizer(library.to_str())
    for text in [*CORPUS, "a the, dog.", " the  the", "fox " * 200, "🙂🙃 b", "你好世界"]:
        token_ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, token_ids)
        assert "".join(pieces) == library.decode(token_ids, skip_special_tokens=True)
        if "fox" in text and make is not byte_fallback_unigram:
            assert len([piece for piece in pieces[:-1] if piece]) > 9


def test_a_run_of_byte_tokens_comes_when_it_is_certain():
    library = byte_fallback()
    tokenizer = Tokenizer(library.to_str())
    emoji = [library.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    letter = library.token_to_id("a")
    assert pieces_of(tokenizer, [letter, *emoji, letter]) == ["a", "", "", "", "", "😀a", ""]
    # Half an emoji after a whole one: the library gives up all bytes of the run, in `decode` and here alike.
    token_ids = [letter, *emoji, *emoji[:2]]
    assert "".join(pieces_of(tokenizer, token_ids)) == library.decode(token_ids) == "a" + 6 * "�"


def test_other_kinds_of_tokenizers_give_up_broken_characters_at_the_end():
    library = byte_fallback()
    tokenizer = Tokenizer(library.to_str())
    lead, letter = library.token_to_id("<0xC3>"), library.token_to_id("a")
    assert "".join(pieces_of(tokenizer, [letter, lead])) == tokenizer.decode([letter, lead]) == "a�"


TEMPLATES = {
    "none": None,
    "around": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
    "behind": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]),
    "in front": processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)]),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
}


@pytest.mark.parametrize(
    "template, opening", [("none", []), ("around", [1]), ("behind", []), ("in front", [1, 1]), ("roberta", [1])]
)
def test_a_prompt_keeps_what_is_put_in_front_and_not_what_would_end_it(template, opening):
    library = LibraryTokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    if TEMPLATES[template] is not None:
        library.post_processor = TEMPLATES[template]
    tokenizer = Tokenizer(library.to_str())
    assert tokenizer.encode("a b") == [*opening, 3, 4]
    assert tokenizer.encode("a b </s>") == [*opening, 3, 4, 2]  # written by the user, so meant
    assert tokenizer.encode("") == tokenizer.encode("  ") == opening


def test_tokens_beyond_the_embeddings_are_refused(byte_level):
    tokenizer = Tokenizer(byte_level.to_str(), model_vocab_size=byte_level.token_to_id("two words"))
    assert tokenizer.encode("two word") == byte_level.encode("two word").ids
    with pytest.raises(TokenizerError, match=r"holds 'two words', whose id \d+ is beyond the model's vocab_size"):
        tokenizer.encode("a two words")


def test_reads_a_file(tmp_path, byte_level):
    (tmp_path / "tokenizer.json").write_text(byte_level.to_str(), encoding="utf-8")
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("the fox 🙂")) == "the fox 🙂"
    assert tokenizer.vocab_size == byte_level.get_vocab_size()


@pytest.mark.parametrize("contents", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_malformed_files(tmp_path, contents):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(contents)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_panic_of_the_library_is_an_error_like_any_other(byte_level):
    contents = json.loads(byte_level.to_str())
    contents["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAA="}
    with pytest.raises(TokenizerError, match="charsmap"):
        Tokenizer(json.dumps(contents))


def test_an_interrupt_is_not_an_error(tokenizer, monkeypatch):
    class Interrupted:
        def decode(self, *_args: object, **_options: object) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([1])


def test_text_that_cannot_be_encoded(tokenizer):
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")
    bare = LibraryTokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(TokenizerError, match="cannot encode"):
        Tokenizer(bare.to_str()).encode("b")


def test_negative_ids_cannot_be_decoded(tokenizer):
    with pytest.raises(TokenizerError, match="cannot decode"):
        tokenizer.decode([-1])
