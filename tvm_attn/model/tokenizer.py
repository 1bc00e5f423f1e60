"""A checkpoint's tokenizer as the text of one `tokenizer.json`, the format of the `tokenizers` library.

| files of the checkpoint | what is read from them |
|---|---|
| `tokenizer.json` | everything |
| else `vocab.json`, `merges.txt` | GPT-2's byte-level BPE (Sennrich et al. 2016, as in the GPT-2 paper, section 2.2) |
| else `vocab.txt` | BERT's WordPiece, which Chinese GPT-2s use |
| `tokenizer_config.json` | `tokenizer_class` and its settings, `added_tokens_decoder`, special tokens by name |
| `special_tokens_map.json`, `added_tokens.json` | the same in the older layout, without `added_tokens_decoder` |

Two classes have settings that apply even if there is a `tokenizer.json`: `GPT2Tokenizer`, the default, takes
`add_prefix_space` (and, without a `tokenizer.json`, `add_bos_token`), `BertTokenizer` takes `do_lower_case`,
`strip_accents` and `tokenize_chinese_chars`.

Token ids are those of transformers' `AutoTokenizer`, with two exceptions. Nothing is added after a prompt, because it
is
to be continued: no `[SEP]` and no `add_eos_token`. And `GPT2Tokenizer` keeps the normalizer and the pre-tokenizer of a
`tokenizer.json`. `clean_up_tokenization_spaces` is ignored: text is what the tokenizer's decoder gives.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tvm_attn.errors import TokenizerError, one_line, shorten
from tvm_attn.jsonfile import CONFIG_BYTES, TOKENIZER_BYTES, exists, read_json, read_text, shorten_path

_END_OF_TEXT = "<|endoftext|>"
# The named special tokens, in the order in which transformers adds them.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The default texts of named tokens in transformers' two classes.
_DEFAULT_TOKENS = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT),
    "BertTokenizer": {name: f"[{name[:-6].upper()}]" for name in _NAMES[2:]},
}
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_CONVERT = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A checkpoint's tokenizer: JSON text for `tokenizers.Tokenizer.from_str`, or None, and notes for the user."""

    text: str | None
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, vocab_size: int | None = None) -> CheckpointTokenizer:
    """The tokenizer of the checkpoint in `folder`.

    Truncation and padding that a `tokenizer.json` may switch on are removed: the model must get the whole prompt.

    Raises TokenizerError if the files are malformed, or if a token that was not added later has an id of `vocab_size`
    or more.
    """
    settings = _settings(folder)
    chosen = settings.get("tokenizer_class")
    kind = chosen.removesuffix("Fast") if isinstance(chosen, str) else "GPT2Tokenizer"
    if _exists(folder / "tokenizer.json"):
        source = folder / "tokenizer.json"
        tokenizer = _parsed(source, read_text(source, TOKENIZER_BYTES, TokenizerError))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if kind == "BertTokenizer" and isinstance(tokenizer.model, models.WordPiece):
            added = sorted(tokenizer.get_added_tokens_decoder().items())
            tokenizer = _word_piece(tokenizer.get_vocab(with_added_tokens=False), settings)
            tokenizer.add_tokens([token for _, token in added])
        elif kind == "GPT2Tokenizer" and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
            tokenizer.pre_tokenizer.add_prefix_space = _flag(settings, "add_prefix_space")
        else:
            kind = ""  # neither of the two classes above: the file names its own tokens
    elif _exists(folder / "vocab.json") or _exists(folder / "merges.txt"):
        source, kind = folder / "vocab.json", "GPT2Tokenizer"
        tokenizer = _byte_level(folder, _flag(settings, "add_prefix_space"))
    elif _exists(folder / "vocab.txt"):
        source, kind = folder / "vocab.txt", "BertTokenizer"
        tokenizer = _word_piece(_read_lines(source), settings)
    else:
        found = [name for name in _SENTENCEPIECE if _exists(folder / name)]
        note = (
            "the checkpoint has no tokenizer: prompts and completions are token ids; for text, put its tokenizer.json, "
        )
        note += "or vocab.json and merges.txt, into the folder and build again"
        if found:
            note = f"the checkpoint has its tokenizer only as {found[0]}; convert it: {_CONVERT}, or use token ids"
        return CheckpointTokenizer(None, (note,))
    defaults = _DEFAULT_TOKENS.get(kind, {})
    _add_tokens(tokenizer, folder, defaults | settings, set(defaults.values()), vocab_size)
    _wrap(tokenizer, kind, defaults | settings, has_template=source.name == "tokenizer.json")
    return CheckpointTokenizer(tokenizer.to_str(), tuple(_check_ids(tokenizer, source, vocab_size)))


def _exists(path: Path) -> bool:
    return exists(path, TokenizerError)


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, completed from older checkpoints' `special_tokens_map.json` and `config.json`."""
    settings = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_object(folder / "special_tokens_map.json")
    if settings.get("tokenizer_class") is None:
        settings["tokenizer_class"] = _read_object(folder / "config.json").get("tokenizer_class")
    return {name: value for name, value in settings.items() if value is not None}


def _read_object(path: Path) -> dict[str, Any]:
    entries = read_json(path, CONFIG_BYTES, TokenizerError) if _exists(path) else {}
    if not isinstance(entries, dict):
        raise TokenizerError(f"{shorten_path(path)} is not a JSON object; get the checkpoint anew")
    return entries


def _flag(settings: dict[str, Any], name: str, default: bool = False) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"{name} in tokenizer_config.json must be true or false, not {shorten(value)}")
    return value


def _parsed(path: Path, text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:
        # The library raises a bare Exception for most mistakes, and a panic, which is not an Exception, for a few.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{shorten_path(path)} is not a valid tokenizer: {one_line(error)}") from None
        raise


def _byte_level(folder: Path, add_prefix_space: bool) -> Tokenizer:
    """GPT-2's tokenizer from its original files."""
    vocab = _read_vocab(folder / "vocab.json")
    merges = _read_merges(folder / "merges.txt", vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_piece(vocab: dict[str, int], settings: dict[str, Any]) -> Tokenizer:
    """BERT's tokenizer (Devlin et al. 2019), like transformers' BertTokenizer."""
    unknown = _content(settings.get("unk_token", _DEFAULT_TOKENS["BertTokenizer"]["unk_token"]))
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_flag(settings, "tokenize_chinese_chars", True),
        strip_accents=_flag(settings, "strip_accents") if "strip_accents" in settings else None,
        lowercase=_flag(settings, "do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path, TOKENIZER_BYTES, TokenizerError)
    if not isinstance(vocab, dict) or not all(_is_id(value) for value in vocab.values()):
        raise TokenizerError(f"{shorten_path(path)} does not map tokens to ids; get the checkpoint anew")
    return vocab


def _read_lines(path: Path) -> dict[str, int]:
    """A vocabulary with one token per line; the last of equal tokens counts, as in transformers."""
    lines = read_text(path, TOKENIZER_BYTES, TokenizerError).replace("\r\n", "\n").removesuffix("\n").split("\n")
    return {token: token_id for token_id, token in enumerate(lines)}


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path, TOKENIZER_BYTES, TokenizerError).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not space or not {left, right, left + right} <= vocab.keys():
            raise TokenizerError(
                f"{shorten_path(path)}, line {number}: {shorten(line)} does not merge two tokens of vocab.json"
            )
        merges.append((left, right))
    return merges


def _add_tokens(
    tokenizer: Tokenizer, folder: Path, settings: dict[str, Any], assumed: set[str], vocab_size: int | None
) -> None:
    """Adds the tokens that the files name in addition to the vocabulary, in transformers' order, which decides new ids.

    Default names that no file gives (`assumed`) are used only if the token exists or the model has room for it.
    """
    named, extra = _named_tokens(settings)
    path, numbered = _numbered_tokens(folder, settings, {token.content for token in named + extra})
    present = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    special = {token.content for token in named} | {content for content, flag in present.items() if flag}
    for token_id, token in numbered:
        token.special = token.special or token.content in special
        tokenizer.add_tokens([token])
        present[token.content] = token.special
        if (given := tokenizer.token_to_id(token.content)) != token_id:
            raise TokenizerError(
                f"{shorten_path(path)} gives {shorten(token.content)} the id {token_id}, but after the vocabulary it "
                f"would be {given}; get the checkpoint anew"
            )
    for token in named + extra:
        is_new = tokenizer.token_to_id(token.content) is None
        has_room = vocab_size is None or tokenizer.get_vocab_size() < vocab_size
        if token.content not in present and not (is_new and token.content in assumed and not has_room):
            tokenizer.add_tokens([token])


def _named_tokens(settings: dict[str, Any]) -> tuple[list[AddedToken], list[AddedToken]]:
    """The special tokens that have a name, and the other ones."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise TokenizerError(f"the tokenizer's additional special tokens are {shorten(extra)}, not a list")
    own = [name for name, value in settings.items() if name.endswith("_token") and isinstance(value, str | dict)]
    named = [settings[name] for name in dict.fromkeys((*_NAMES, *own)) if name in settings]
    if isinstance(extra, dict):
        named, extra = [*named, *extra.values()], []
    # The first of equal entries counts, but the last of different entries for the same token.
    tokens = [_added(token) for i, token in enumerate(named) if token not in named[:i]]
    for token in tokens:
        token.special = True
    return tokens, [_added(token) for token in extra]


def _numbered_tokens(
    folder: Path, settings: dict[str, Any], special: set[str]
) -> tuple[Path, list[tuple[int, AddedToken]]]:
    """The file that gives ids to added tokens, and the tokens in the order of their ids."""
    entries: dict[str, Any] = settings.get("added_tokens_decoder", {})
    path = folder / "added_tokens.json"
    if "added_tokens_decoder" in settings:
        path = folder / "tokenizer_config.json"
    elif _exists(path):
        added = _read_vocab(path)
        entries = {
            str(i): {"content": t, "special": t in special, "normalized": t not in special} for t, i in added.items()
        }
        if len(entries) < len(added):
            raise TokenizerError(f"{shorten_path(path)} gives one id to several tokens; get the checkpoint anew")
    if not isinstance(entries, dict) or not all(key.isascii() and key.isdigit() and len(key) < 10 for key in entries):
        raise TokenizerError(f"{shorten_path(path)} does not map tokens to ids; get the checkpoint anew")
    tokens = [(int(token_id), _added(entry, False)) for token_id, entry in entries.items()]
    return path, sorted(tokens, key=lambda pair: pair[0])


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"the tokenizer's files have {shorten(token)} where a token should be")
    return content


def _added(token: Any, special: bool = True) -> AddedToken:
    """The library's form of a token in a file; `special` is the default if the file does not say."""
    flags = {"special": special} | {
        name: token[name]
        for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
        if isinstance(token, dict) and name in token
    }
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"the flags of the token {shorten(_content(token))} must be true or false")
    return AddedToken(_content(token), **flags)


def _wrap(tokenizer: Tokenizer, kind: str, settings: dict[str, Any], has_template: bool) -> None:
    """Adds the tokens that the class puts before a text; the runtime leaves out those that would come after it."""
    if kind == "BertTokenizer":
        first = settings["cls_token"]
    elif kind == "GPT2Tokenizer" and not has_template and _flag(settings, "add_bos_token"):
        first = settings["bos_token"]
    else:
        return
    token = _content(first)
    if (token_id := tokenizer.token_to_id(token)) is not None:
        try:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, token_id)]
            )
        except ValueError:  # a colon or a dollar sign means something in a template
            raise TokenizerError(f"{shorten(token)} cannot be put in front of every text; rename the token") from None


def _check_ids(tokenizer: Tokenizer, source: Path, vocab_size: int | None) -> Iterator[str]:
    """Notes on tokens that the model has no embedding for; raises TokenizerError if ids make no sense."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise TokenizerError(f"{shorten_path(source)} has no tokens; get the checkpoint anew")
    if len(set(ids.values())) < len(ids):
        raise TokenizerError(f"{shorten_path(source)} gives one id to several tokens; get the checkpoint anew")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    beyond = [token for token, token_id in ids.items() if vocab_size is not None and token_id >= vocab_size]
    for token in beyond:
        if token not in added:
            raise TokenizerError(
                f"{shorten_path(source)} gives {shorten(token)} the id {ids[token]}, but the model's vocab_size is "
                f"{vocab_size}; the tokenizer belongs to another model"
            )
    if beyond:
        names = ", ".join(shorten(token) for token in sorted(beyond, key=ids.__getitem__)[:4])
        yield (
            f"the tokenizer adds {len(beyond)} token{'s' * (len(beyond) > 1)} that the model has no embedding for "
            f"({names}{', ...' * (len(beyond) > 4)}): a prompt that holds one is refused"
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
