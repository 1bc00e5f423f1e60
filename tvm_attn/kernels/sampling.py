"""Greedy sampling: the index of the largest logit of each row, by itself or at the end of a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.base import Case


@dataclass(frozen=True)
class Argmax:
    """token_ids = argmax(logits[:, :, :V]); the lowest index wins a tie, as in NumPy. -1 for a row with a NaN.

    Parameters of the function: logits (g, R, N) float32 with N >= V columns, token_ids (g, R) int32.
    """

    family: ClassVar[str] = "argmax"

    vocabulary: int
    columns: int
    """N, the padded vocabulary."""
    rows: int
    groups: int | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for vocabulary, columns, rows, groups, name in (
            (50257, 50272, 8, 2, "124M"),
            (1021, 1024, 8, 3, "odd vocabulary"),
            (5, 32, 8, 1, "vocabulary below a vector"),
            (1021, 1024, 1, 1, "one row"),
        ):
            kernel = Argmax(vocabulary, columns, rows, groups if rows == 1 else None)
            logits = _random_logits(kernel, groups, rng)
            yield _argmax_case(kernel, name, logits)
            yield _argmax_case(kernel, f"{name}, large negative", -np.abs(logits) - np.float32(1e30))
            with_nan = logits.copy()
            with_nan[-1, -1, vocabulary // 3] = np.nan
            yield _argmax_case(kernel, f"{name}, NaN", with_nan)


@dataclass(frozen=True)
class Advance:
    """token_ids = argmax(logits[:, :, :V]), and positions + 1, of the rows whose position is not -1.

    The lowest index wins a tie, as in NumPy; a row with a NaN becomes token -1. A padding row (position -1) becomes
    token 0, and its logits are not read.

    Parameters of the function: logits (g, R, N) float32 with N >= V columns; token_ids (g, R) int32 and positions
    (g, R) int32, both updated in place.
    """

    family: ClassVar[str] = "advance"

    vocabulary: int
    columns: int
    """N, the padded vocabulary."""
    rows: int
    groups: int | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for vocabulary, columns, rows, groups, name in (
            (50257, 50257, 1, 1, "124M, one row"),
            (50257, 50304, 8, 2, "124M, padded columns"),
            (1021, 1024, 8, 3, "odd vocabulary"),
            (5, 5, 8, 1, "vocabulary below a warp"),
        ):
            kernel = Advance(vocabulary, columns, rows, groups if rows == 1 else None)
            logits = _random_logits(kernel, groups, rng)
            positions = np.arange(groups * rows, dtype=np.int32).reshape(groups, rows)
            yield _advance_case(kernel, name, logits, positions)
            if rows == 1:
                continue
            padded = np.where(positions % 3 == 1, np.int32(-1), positions)
            zeros = np.where(rng.random(logits.shape) < 0.5, np.float32(-0.0), np.float32(0.0))
            yield _advance_case(kernel, f"{name}, zeros of both signs", zeros, padded)
            extreme = -np.abs(logits) - np.float32(1e30)
            extreme[0, 0, :vocabulary] = -np.inf
            extreme[-1, -1, vocabulary // 3] = np.inf
            yield _advance_case(kernel, f"{name}, large negative, infinities", extreme, padded)
            with_nan = logits.copy()
            with_nan[-1, -1, [vocabulary // 3, vocabulary - 1]] = np.nan, -np.nan
            with_nan[0, 1] = np.nan  # padding
            yield _advance_case(kernel, f"{name}, NaN", with_nan, padded)


def _random_logits(kernel: Argmax | Advance, groups: int, rng: np.random.Generator) -> np.ndarray:
    """Logits with large values in the padding, which must not matter, and equal maxima, of which the first wins."""
    logits = rng.standard_normal((groups, kernel.rows, kernel.columns), dtype=np.float32)
    logits[..., kernel.vocabulary :] = 1e9
    logits[0, 0, [kernel.vocabulary - 1, kernel.vocabulary // 2]] = 100.0
    return logits


def _best(kernel: Argmax | Advance, logits: np.ndarray) -> np.ndarray:
    wanted = logits[..., : kernel.vocabulary]
    return np.where(np.isnan(wanted).any(-1), -1, wanted.argmax(-1))


def _argmax_case(kernel: Argmax, name: str, logits: np.ndarray) -> Case:
    expected = _best(kernel, logits)
    output = np.zeros(expected.shape, np.int32)
    return Case(kernel, name, (logits,), (output,), (expected.astype(np.float64),), nmse=0.0)


def _advance_case(kernel: Advance, name: str, logits: np.ndarray, positions: np.ndarray) -> Case:
    tokens = _best(kernel, logits)
    expected = np.where(positions < 0, 0, tokens), np.where(positions < 0, -1, positions + 1)
    before = np.full_like(positions, 7)
    results = tuple(array.astype(np.float64) for array in expected)
    return Case(kernel, name, (logits, before, positions), (), results, (1, 2), nmse=0.0)


def random_case(kernel: Argmax | Advance, groups: int) -> Case:
    """A case of `groups` row groups with random operands, of the sizes that a search measures."""
    logits, name = _random_logits(kernel, groups, np.random.default_rng(0)), f"{groups * kernel.rows} rows"
    if isinstance(kernel, Argmax):
        return _argmax_case(kernel, name, logits)
    return _advance_case(kernel, name, logits, np.zeros((groups, kernel.rows), np.int32))
