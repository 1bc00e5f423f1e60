"""Rules for the values of a parsed JSON or TOML table, and a description of the first value that breaks one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm_attn.errors import shorten


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        give: what the value must be, worded to follow "give".
        holds: whether a value follows the rule; the value may be anything that a parser returns.
    """

    give: str
    holds: Callable[[Any], bool]


Rules = Mapping[str, "Rule | Rules"]
"""A rule for each key, or the rules of a table below it; a key that ends with "?" may be absent."""


def problem(table: Any, rules: Rules, above: str = "") -> str | None:
    """The first fault, such as "tile.rows is '8'; give an integer from 1 to 64"; None if there is none."""
    if type(table) is not dict:
        return f"{above.rstrip('.') or 'it'} is {shorten(table)}; give a table"
    for key, rule in rules.items():
        name = key.rstrip("?")
        if name not in table:
            if key == name:
                return f"it lacks the key {above + name!r}"
        elif not isinstance(rule, Rule):
            if fault := problem(table[name], rule, f"{above}{name}."):
                return fault
        elif not rule.holds(table[name]):
            return f"{above}{name} is {shorten(table[name], 60)}; give {rule.give}"
    unknown = next((key for key in table if key not in rules and f"{key}?" not in rules), None)
    return None if unknown is None else f"the key {shorten(f'{above}{unknown}')} is unknown"


def integer(low: int, high: int) -> Rule:
    """An integer within bounds; true and 1.0 do not count."""
    return Rule(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def power_of_two(low: int, high: int) -> Rule:
    """A power of two within bounds."""
    whole = integer(low, high)
    return Rule(f"a power of two from {low} to {high}", lambda value: whole.holds(value) and not value & (value - 1))


def text(pattern: str = r"[^\n]+", give: str = "text on one line") -> Rule:
    """Text of at most 1000 characters that a pattern matches as a whole."""
    return Rule(give, lambda value: type(value) is str and len(value) <= 1000 and bool(re.fullmatch(pattern, value)))


def one_of(*values: str) -> Rule:
    """One of some texts."""
    return Rule(f"one of {', '.join(values)}", lambda value: type(value) is str and value in values)


def list_of(rule: Rule, give: str, least: int = 0, most: int = 1000) -> Rule:
    """A list whose entries follow a rule."""

    def holds(value: Any) -> bool:
        return type(value) is list and least <= len(value) <= most and all(map(rule.holds, value))

    return Rule(give, holds)


def by_name(give: str, *kinds: type) -> Rule:
    """A table of values of some types, whatever its keys."""
    return Rule(give, lambda value: type(value) is dict and all(type(entry) in kinds for entry in value.values()))


INTEGERS = by_name("integers by name", int)
POSITIVE = Rule(
    "a positive number", lambda value: type(value) in (int, float) and 0 < value < 1e300 and math.isfinite(value)
)
TABLE = Rule("a table", lambda value: type(value) is dict)
