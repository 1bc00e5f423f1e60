"""Reads small files, mostly JSON, and raises one type of error for everything that can be wrong with one.

Files come from elsewhere: one may be a device, larger than memory, or not the text that its name promises. Only the
standard library is imported, because the runtime reads its manifest with this module.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tvm_attn.errors import TvmAttnError, one_line, shorten

CONFIG_BYTES = 8 << 20
"""Largest size of a configuration, an index or a manifest; real ones have less than 2 MB."""
TOKENIZER_BYTES = 64 << 20
"""Largest size of a tokenizer's vocabulary; the largest in use have about 40 MB."""

_MAX_DIGITS = 400  # more than any float has before its point; int() of a longer text takes quadratic time
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def exists(path: str | Path, error: type[TvmAttnError]) -> bool:
    """Whether there is something at `path`; raises `error` if that cannot be known (no permission, a long name)."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as failure:
        raise error(f"{shorten_path(path)} cannot be read: {_reason(failure)}") from None
    return True


@contextmanager
def opened(path: str | Path, error: type[TvmAttnError]) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises `error` if it is missing, unreadable, or a folder, a device or a pipe; it never waits for a pipe.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            yield file
    except FileNotFoundError:
        raise error(f"{shorten_path(path)} is missing") from None
    except (OSError, ValueError) as failure:
        raise error(f"{shorten_path(path)} cannot be read: {_reason(failure)}") from None


def read_bytes(path: str | Path, limit: int, error: type[TvmAttnError]) -> bytes:
    """The content of a regular file; raises `error` as `opened` does, and if it exceeds `limit` bytes."""
    with opened(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise error(f"{shorten_path(path)} is larger than {limit >> 20} MiB, so it is not the file it should be")
    return content


def read_text(path: str | Path, limit: int, error: type[TvmAttnError]) -> str:
    """The text of a UTF-8 file; raises `error` as `read_bytes` does, and if it is not UTF-8."""
    try:
        return read_bytes(path, limit, error).decode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{shorten_path(path)} is not UTF-8 text: {one_line(failure)}") from None


def read_json(path: str | Path, limit: int, error: type[TvmAttnError]) -> Any:
    """The parsed JSON of a UTF-8 file; raises `error` as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, limit, error), shorten_path(path), error)


def parse_json(text: str, what: str, error: type[TvmAttnError]) -> Any:
    """Parsed JSON (RFC 8259); `what` names the text in messages.

    Raises `error` if it is not JSON, and for what JSON leaves undefined: a name with two different values, NaN and
    infinity, numbers beyond a float's range or of more than 400 digits, half a surrogate pair, very deep nesting.
    """
    try:
        if text.startswith("\N{BYTE ORDER MARK}"):
            raise ValueError("it starts with a byte order mark; save it as UTF-8 without one")
        parsed = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as failure:
        half = shorten(failure.object[failure.start])
        raise error(f"{what} is not valid JSON: {half} is half a surrogate pair and no character") from None
    except RecursionError:
        raise error(f"{what} is not valid JSON: it is nested too deeply") from None
    except ValueError as failure:
        raise error(f"{what} is not valid JSON: {one_line(failure)}") from None
    return parsed


def shorten_path(path: str | Path) -> str:
    """A path for a one-line message; the middle of a very long one is left out."""
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:98]}...{text[-98:]}"


def open_regular(path: str, flags: int = os.O_RDONLY, dir_fd: int | None = None) -> int:
    """Opens a regular file; opening a pipe would wait for a writer, and opening some devices acts on them.

    Raises ValueError if it is something else, and OSError if it cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path, dir_fd=dir_fd).st_mode):
        raise ValueError("it is not a regular file")
    descriptor = os.open(path, flags | os.O_NONBLOCK, dir_fd=dir_fd)  # it may have become a pipe since
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return descriptor


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        for name, value in pairs:
            if result[name] != value:
                raise ValueError(f"{shorten(name)} has two values, {shorten(value)} and {shorten(result[name])}")
    return result


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {shorten(text)} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _reason(failure: Exception) -> str:
    return getattr(failure, "strerror", None) or one_line(failure)
