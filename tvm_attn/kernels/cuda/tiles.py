"""Choosing tiles: the decisions of the templates here are the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TypeVar

from tvm_attn.kernels.template import Chooser

Tiles = TypeVar("Tiles")


def choose_tiles(choose: Chooser, default: Tiles, candidates: Iterable[Tiles]) -> Tiles:
    """One of the candidates, with one decision per field among the candidates that agree with the decisions so far."""
    left = [default, *(candidate for candidate in candidates if candidate != default)]
    for field in fields(default):  # type: ignore[arg-type]
        values = [int(getattr(tiles, field.name)) for tiles in left]
        chosen = choose(field.name, sorted(set(values)), values[0])
        left = [tiles for tiles, value in zip(left, values, strict=True) if value == chosen]
    return left[0]
