"""Fixtures for the tests of benchmarks/."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def python_without(tmp_path: Path) -> str:
    """A Python for peers that lacks transformers."""
    python = tmp_path / "python"
    code = "import sys, runpy; sys.modules['transformers'] = None; sys.argv = sys.argv[2:]; "
    code += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    python.chmod(0o755)
    return str(python)
