"""Text to token ids and back, whole or as a stream, from a checkpoint's `tokenizer.json`.

Special tokens such as `<|endoftext|>` are left out of text and kept in ids, as in transformers'
`decode(..., skip_special_tokens=True)`: an answer should not end in markup.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from tvm_attn.errors import TokenizerError, one_line, shorten
from tvm_attn.jsonfile import TOKENIZER_BYTES, read_text


def _byte_of_character() -> dict[str, int]:
    """The printable stand-in for each byte in a byte-level vocabulary (`bytes_to_unicode` of GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
_BYTE_TOKEN = re.compile("<0x..>")


@contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into a TokenizerError that starts with `what`.

    The library reports a broken `tokenizer.json` as a plain Exception or, if its Rust code panics, as a BaseException
    whose type cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {one_line(error)}") from error


class Tokenizer:
    """A checkpoint's tokenizer.

    Truncation and padding that the file may ask for are switched off: a prompt is used unchanged, or refused.

    Args:
        text: the contents of a `tokenizer.json`.
        source: names the file in messages.
        model_vocab_size: `encode` refuses ids from here on: the tokenizer may have tokens that the model has no
            embedding for, such as a padding token added later. None accepts all ids.

    Raises:
        TokenizerError: `text` is malformed.
    """

    def __init__(self, text: str, source: str = "tokenizer.json", model_vocab_size: int | None = None) -> None:
        with _tokenizer_errors(f"{source} is malformed, get the checkpoint's file again"):
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self._model_vocab_size = model_vocab_size
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes_of_token: dict[int, bytes] = {}
        decoder = self._tokenizer.decoder
        self._decoder_steps = [] if decoder is None else _decoder_steps(json.loads(decoder.__getstate__()))

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises TokenizerError if it cannot be read or is malformed."""
        return cls(read_text(path, TOKENIZER_BYTES, TokenizerError), str(path))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def longest_token(self) -> int | None:
        """Most characters of text that one token can come from; None if that is not known.

        It is known for byte-level BPE: elsewhere a normalizer or an unknown token may swallow any number of them.
        """
        library = self._tokenizer
        is_plain = library.normalizer is None and isinstance(library.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel)
        is_plain = is_plain and isinstance(library.model, tokenizers.models.BPE) and library.model.unk_token is None
        strips = any(token.lstrip or token.rstrip for token in library.get_added_tokens_decoder().values())
        return None if strips or not is_plain else max(map(len, library.get_vocab()), default=1)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: the tokens that the tokenizer puts first, such as `<s>` or `[CLS]`, then `text`.

        Tokens that it adds after a text (`</s>`, `[SEP]`) are left out: they would end what is to be continued. GPT-2's
        tokenizer adds none. Special tokens written out in `text` become their ids.

        Raises TokenizerError if `text` is not Unicode text (a lone surrogate), or contains something for which the
        vocabulary has no token or the model no embedding.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode: {one_line(error)}; decode it as UTF-8 first"
            ) from None
        ids = self._encode(text) or self._opening
        limit = self._model_vocab_size
        if limit is not None and ids and max(ids) >= limit:
            outside = next(token_id for token_id in ids if token_id >= limit)
            token = shorten(self._tokenizer.id_to_token(outside))
            raise TokenizerError(
                f"the text holds {token}, whose id {outside} is beyond the model's vocab_size of {limit}; leave it out"
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        """Ids of `text` and of the tokens that are put first; [] for a text without tokens."""
        with _tokenizer_errors("the tokenizer cannot encode the text"):
            encoding = self._tokenizer.encode(text)
        ids, is_wrapping = encoding.ids, encoding.special_tokens_mask
        while ids and is_wrapping[len(ids) - 1]:
            ids.pop()
        return ids

    @cached_property
    def _opening(self) -> list[int]:
        """The ids that are put before every text."""
        with _tokenizer_errors("the tokenizer cannot encode an empty text"):
            wrapped = self._tokenizer.encode("").ids
        if not wrapped or self._anchor is None:
            return []
        same = zip(wrapped, self._encode(self.decode([self._anchor])), strict=False)
        return [opening for opening, _ in takewhile(lambda pair: pair[0] == pair[1], same)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, without special tokens and without ids that the tokenizer does not know.

        Bytes that are not UTF-8 become U+FFFD. Raises TokenizerError for a negative id.
        """
        with _tokenizer_errors("the tokenizer cannot decode the token ids"):
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for one stream of token ids, starting empty."""
        if self._is_byte_level:
            return ByteStreamDecoder(self)
        if _is_tokenwise(self._decoder_steps) and self._anchor is not None:
            return RunStreamDecoder(self, self._anchor)
        return HeldStreamDecoder(self)

    @cached_property
    def _anchor(self) -> int | None:
        """Some token with text of its own, after which others are decoded; None if there is none."""
        ids = sorted(self._tokenizer.get_vocab().values())
        return next((i for i in ids if self.has_text(i) and not self.is_byte(i) and self.decode([i])), None)

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte in byte-fallback notation, e.g. <0xF0>."""
        return _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "") is not None

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` uses the id at all: it is known and not special."""
        return token_id not in self._special_ids and self._tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a byte-level token stands for; b"" for a token without text."""
        known = self._bytes_of_token.get(token_id)
        if known is None:
            known = self._bytes_of_token[token_id] = self._spell(token_id)
        return known

    def written(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; its name for a special token, b"" for an unknown one."""
        if not self.has_text(token_id):
            return (self._tokenizer.id_to_token(token_id) or "").encode("utf-8")
        if self._is_byte_level:
            return self.token_bytes(token_id)
        # The first token of a text may lose its space.
        before = [] if self._anchor is None else [self._anchor]
        return self.decode([*before, token_id])[len(self.decode(before)) :].encode("utf-8")

    @property
    def _is_byte_level(self) -> bool:
        return [step["type"] for step in self._decoder_steps] == ["ByteLevel"]

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:
            # An added token is stored as plain text; the library treats it so as soon as one character is not a
            # stand-in.
            return token.encode("utf-8")


class StreamDecoder(Protocol):
    """Decodes a stream of token ids piece by piece.

    The pieces returned by `push` and the final `flush` never split a character, are never taken back, and joined they
    equal `Tokenizer.decode` of all the ids.
    """

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain, "" while a character is incomplete."""

    def flush(self) -> str:
        """End the stream and return what was held back; bytes that did not become a character are U+FFFD."""


class ByteStreamDecoder:
    """For byte-level BPE, as in GPT-2: tokens are bytes, so an incremental UTF-8 decoder is exact, O(1) per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Replaces each maximal invalid part with one U+FFFD, as the Unicode standard recommends and `decode` does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class RunStreamDecoder:
    """For decoders that handle one token after the other, such as SentencePiece's and WordPiece's.

    A token's text depends on whether it is the first (which loses its leading space) and, with byte fallback, on the
    run of byte tokens around it: one byte that fits no character turns the whole run into U+FFFD. So a run is held back
    until it ends. What follows the first text is decoded after a token whose text is known, and that text is cut off.
    """

    def __init__(self, tokenizer: Tokenizer, anchor: int) -> None:
        self._tokenizer = tokenizer
        self._anchor = anchor
        self._anchor_length = len(tokenizer.decode([anchor]))
        self._pending: list[int] = []
        self._is_start = True

    def push(self, token_id: int) -> str:
        if not self._tokenizer.has_text(token_id):
            return ""
        self._pending.append(token_id)
        return "" if self._tokenizer.is_byte(token_id) else self.flush()

    def flush(self) -> str:
        if self._is_start:
            piece = self._tokenizer.decode(self._pending)
            if not piece:
                return ""  # the next token may still be the one that loses its space
        else:
            piece = self._tokenizer.decode([self._anchor, *self._pending])[self._anchor_length :]
        self._is_start = False
        self._pending = []
        return piece


class HeldStreamDecoder:
    """For decoders that may change any text until the last token: nothing is returned before `flush`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        return ""

    def flush(self) -> str:
        piece, self._pending = self._tokenizer.decode(self._pending), []
        return piece


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a `decoder` entry of tokenizer.json, in order; none if it is null."""
    if not decoder:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
    return [decoder]


def _is_tokenwise(steps: list[dict[str, Any]]) -> bool:
    """Whether a token's text depends only on whether it is the first and on the run of byte tokens around it."""
    kinds = [step["type"] for step in steps]
    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    before = {"Replace", "WordPiece", "ByteFallback", "Strip", "Metaspace"}
    # After Fuse all text is one: only steps that look at single characters, or at the very start, are still local.
    return before.issuperset(kinds[:fuse]) and all(
        step["type"] == "Fuse"
        or (step["type"] == "Strip" and step["stop"] == 0)
        or (step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1)
        for step in steps[fuse:]
    )
