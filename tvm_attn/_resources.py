"""Finds the data folders: `targets`, `schedules` and `models/demo`, and the user's own `targets` and `schedules`.

A checkout keeps them at its top level, a wheel carries them in `tvm_attn/_data/` (see pyproject.toml). The user's are
in the platform's data folder, on Linux `~/.local/share/tvm-attn`, which XDG_DATA_HOME moves; they are read first.
"""

from pathlib import Path

import platformdirs

from tvm_attn.errors import TvmAttnError

_PACKAGE = Path(__file__).resolve().parent


def _data_root() -> Path:
    project = _PACKAGE.parent / "pyproject.toml"
    if project.is_file() and 'name = "tvm-attn"' in project.read_text(encoding="utf-8").splitlines():
        return _PACKAGE.parent
    return _PACKAGE / "_data"


def resource_dir(name: str) -> Path:
    """The folder `name` ("targets", "schedules" or "models/demo") of the checkout or of the installed package.

    Raises TvmAttnError if it is missing.
    """
    folder = _data_root() / name
    if not folder.is_dir():
        raise TvmAttnError(f"the data folder {folder} is missing: restore it in the checkout or reinstall tvm-attn")
    return folder


def user_dir(name: str) -> Path:
    """The user's folder `name`, "targets" or "schedules"; it need not exist.

    Raises TvmAttnError if this user has no home folder.
    """
    folder = platformdirs.user_data_path("tvm-attn") / name
    if not folder.is_absolute():
        raise TvmAttnError(f"this user has no home folder for {name}; set XDG_DATA_HOME to a folder")
    return folder


def data_dirs(name: str) -> list[Path]:
    """The folders in which "targets" or "schedules" are looked for, in this order: the user's, if there is one, and
    those that come along."""
    try:
        return [user_dir(name), resource_dir(name)]
    except TvmAttnError:
        return [resource_dir(name)]
