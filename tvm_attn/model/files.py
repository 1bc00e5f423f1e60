"""Reading the small text files of a checkpoint folder, with one error for everything that can be wrong with one."""

import json
from pathlib import Path
from typing import Any

from tvm_attn.errors import TvmAttnError

_MAX_BYTES = 256 * 2**20  # far above any real vocabulary or shard index; keeps a wrong file out of memory


def read_text(path: Path, error_type: type[TvmAttnError]) -> str:
    """The UTF-8 text of `path`; raises `error_type` where it is missing, unreadable, too large, or not UTF-8."""
    try:
        if not path.is_file():
            raise error_type(f"{path} is missing or not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise error_type(f"{path} is larger than {_MAX_BYTES // 2**20} MiB, so it is not the file it should be")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise error_type(f"{path} cannot be read: {one_line(error)}") from None


def read_json(path: Path, error_type: type[TvmAttnError]) -> Any:
    """The parsed JSON of `path`; raises `error_type` also where it is not JSON."""
    try:
        return json.loads(read_text(path, error_type))
    except (ValueError, RecursionError) as error:
        raise error_type(f"{path} is not valid JSON: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
