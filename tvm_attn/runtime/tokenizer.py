"""Text to token ids and back, whole or as a stream, from a checkpoint's `tokenizer.json`.

Special tokens such as `<|endoftext|>` are left out of text and kept in ids, as transformers'
`decode(..., skip_special_tokens=True)` does: an answer should not end in markup.
"""

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import tokenizers

from tvm_attn.errors import TokenizerError


def _byte_of_character() -> dict[str, int]:
    """The printable stand-in for each byte in a byte-level vocabulary (`bytes_to_unicode` of GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into a TokenizerError that starts with `what`.

    The library reports a broken `tokenizer.json` as plain Exception, or, where its Rust code panics, as a
    BaseException whose type cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = " ".join(str(error).split())
        raise TokenizerError(f"{what}: {cause}") from error


class Tokenizer:
    """A checkpoint's tokenizer.

    Truncation and padding that the file may ask for are switched off: a prompt is used as it is, or refused.
    """

    def __init__(self, json: str, source: str = "tokenizer.json") -> None:
        """Read the contents of a `tokenizer.json`; `source` names them in the TokenizerError where malformed."""
        with _tokenizer_errors(f"{source} is malformed, get the checkpoint's file again"):
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._is_byte_level = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self._bytes_of_token: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises TokenizerError where it cannot be read or is malformed."""
        try:
            json = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read the tokenizer {path}: {error}") from error
        return cls(json, str(path))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer's post-processor adds (GPT-2's adds none).

        Special tokens written out in `text` become their ids. Raises TokenizerError where `text` is no Unicode text
        (a lone surrogate) or holds something that the vocabulary has no token for.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}; decode it as UTF-8 first") from error
        with _tokenizer_errors("the tokenizer cannot encode the text"):
            return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, without special tokens and without ids that the tokenizer does not know.

        Bytes that are not UTF-8 come out as U+FFFD. Raises TokenizerError for a negative id.
        """
        with _tokenizer_errors("the tokenizer cannot decode the token ids"):
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for one stream of token ids, starting empty."""
        return ByteStreamDecoder(self) if self._is_byte_level else WindowStreamDecoder(self)

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at the id at all: it is known and not special."""
        return token_id not in self._special_ids and self._tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a byte-level token stands for; b"" for a token without text."""
        known = self._bytes_of_token.get(token_id)
        if known is None:
            known = self._bytes_of_token[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:
            # An added token is stored as plain text; the library takes it so as soon as one character is no stand-in.
            return token.encode("utf-8")


class StreamDecoder(Protocol):
    """Decodes a stream of token ids piece by piece.

    The pieces that `push` and the final `flush` return never split a character, are never taken back, and together
    equal `Tokenizer.decode` of all the ids.
    """

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain, "" while a character is incomplete."""

    def flush(self) -> str:
        """End the stream and return what was held back; bytes that no character came of are U+FFFD."""


class ByteStreamDecoder:
    """For byte-level BPE, GPT-2's own: tokens are bytes, so an incremental UTF-8 decoder is exact, O(1) a token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Replaces each maximal invalid part by one U+FFFD, as the Unicode standard recommends and `decode` does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStreamDecoder:
    """For every other kind of tokenizer, e.g. WordPiece in Chinese GPT-2: decodes the last few tokens in context.

    A token's text may depend on the token before it (the first one loses its leading space), so each step decodes
    the tokens since the last piece together with that piece's tokens, whose own text is then cut off. Text that ends
    in U+FFFD is held back, as the next token may complete it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if not self._tokenizer.has_text(token_id):
            return ""
        self._pending.append(token_id)
        piece = self._pending_text()
        if piece.endswith(_REPLACEMENT):
            return ""
        self._advance()
        return piece

    def flush(self) -> str:
        piece = self._pending_text()
        self._advance()
        return piece

    def _pending_text(self) -> str:
        context = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(context) :]

    def _advance(self) -> None:
        if self._pending:
            self._context, self._pending = self._pending, []
