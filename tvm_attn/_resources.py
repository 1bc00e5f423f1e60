"""Finds the data folders: `targets`, `schedules` and `models/demo`.

A checkout keeps them at its top level, a wheel carries them in `tvm_attn/_data/` (see pyproject.toml).
"""

from pathlib import Path

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
