"""The form that the tables of benchmarks have."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table


def new_table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """An empty table with columns of text, then columns of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
