"""A checkpoint's tokenizer as the text of one `tokenizer.json`, the format of the `tokenizers` library.

Newer checkpoints have that file; older ones have GPT-2's original pair, `vocab.json` and `merges.txt` (byte-level BPE,
Sennrich et al. 2016, as in the GPT-2 paper, section 2.2), from which the same tokenizer is built here.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tvm_attn.errors import TokenizerError, one_line
from tvm_attn.jsonfile import TOKENIZER_BYTES, read_json, read_text

_END_OF_TEXT = "<|endoftext|>"


def tokenizer_json(folder: Path, vocab_size: int | None = None) -> str | None:
    """The tokenizer of the checkpoint in `folder`, as JSON text for `tokenizers.Tokenizer.from_str`; None without one.

    Truncation and padding that a `tokenizer.json` may switch on are left out: a prompt must reach the model whole.

    Raises TokenizerError where the files are malformed, or where a token's id is not below `vocab_size`.
    """
    if (folder / "tokenizer.json").is_file():
        source = folder / "tokenizer.json"
        tokenizer = _parsed(source, read_text(source, TOKENIZER_BYTES, TokenizerError))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    elif (folder / "vocab.json").is_file() or (folder / "merges.txt").is_file():
        source = folder / "vocab.json"
        tokenizer = _from_vocab_and_merges(folder)
    else:
        return None
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise TokenizerError(f"{source} has no tokens; get the checkpoint anew")
    if len(set(ids.values())) < len(ids):
        raise TokenizerError(f"{source} gives one id to several tokens; get the checkpoint anew")
    last = max(ids, key=ids.__getitem__)
    if vocab_size is not None and ids[last] >= vocab_size:
        raise TokenizerError(
            f"{source} gives {last!r} the id {ids[last]}, but the model's vocab_size is {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    return tokenizer.to_str()


def _parsed(path: Path, text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:
        # The library raises a bare Exception for most mistakes, and a panic, which is none, for a few.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{path} is not a valid tokenizer: {one_line(error)}") from None
        raise


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from its original files: byte-level BPE, no space put in front, `<|endoftext|>` special."""
    vocab = _read_vocab(folder / "vocab.json")
    merges = _read_merges(folder / "merges.txt", vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, folder / "added_tokens.json", _special_tokens(folder / "special_tokens_map.json"))
    return tokenizer


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path, TOKENIZER_BYTES, TokenizerError)
    if not isinstance(vocab, dict) or not all(_is_id(value) for value in vocab.values()):
        raise TokenizerError(f"{path} does not map tokens to ids; get the checkpoint anew")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path, TOKENIZER_BYTES, TokenizerError).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not space or not {left, right, left + right} <= vocab.keys():
            raise TokenizerError(f"{path}, line {number}: {line[:40]!r} does not merge two tokens of vocab.json")
        merges.append((left, right))
    return merges


def _special_tokens(path: Path) -> set[str]:
    """Tokens that `special_tokens_map.json` names: strings, objects with a `content`, or lists of those."""
    entries = read_json(path, TOKENIZER_BYTES, TokenizerError) if path.is_file() else {}
    if not isinstance(entries, dict):
        raise TokenizerError(f"{path} is not a JSON object; get the checkpoint anew")
    flat: list[Any] = []
    for entry in entries.values():
        flat += entry if isinstance(entry, list) else [entry]
    contents = [entry.get("content") if isinstance(entry, dict) else entry for entry in flat]
    return {content for content in contents if isinstance(content, str) and content}


def _add_tokens(tokenizer: Tokenizer, path: Path, special: set[str]) -> None:
    """Add the tokens of `added_tokens.json` (token -> id) behind the vocabulary, and mark the special ones."""
    added = read_json(path, TOKENIZER_BYTES, TokenizerError) if path.is_file() else {}
    if not isinstance(added, dict) or not all(_is_id(value) for value in added.values()):
        raise TokenizerError(f"{path} does not map tokens to ids; get the checkpoint anew")
    special = special | {_END_OF_TEXT}
    for token in sorted(added, key=added.__getitem__):
        tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=token not in special)])
        if tokenizer.token_to_id(token) != added[token]:
            raise TokenizerError(f"{path} gives {token!r} the id {added[token]}, which does not follow vocab.json")
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in sorted(special & known.keys())])


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
