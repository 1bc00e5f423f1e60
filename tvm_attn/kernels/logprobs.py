"""What log-probabilities are made of: the sum of a row's exponentials, and its largest logits.

With the largest logit m of a row, the log-probability of token t is ``(logits[t] - m) - log(sum(exp(logits - m)))``.
Nothing large cancels, and the logarithm is left to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tvm_attn.kernels.base import Case

_EXP_NMSE = (16 * 1.3e-7) ** 2
"""`activation.exp` has a relative error of 1.3e-7 * |x|; terms below exp(-16) hardly count."""


@dataclass(frozen=True)
class ExpSums:
    """distances = logits[token] - m and totals = sum(exp(logits[:V] - m)), m the row's largest logit.

    A row that holds a NaN, or whose largest logit is infinite, gets the total -1 and the distance 0; other totals are
    at least 1. The distance of a token outside 0 .. V - 1 is 0.

    Parameters of the function: logits (n, N) float32 with N >= V columns, token_ids (n,) int32; distances (n,) float32,
    totals (n,) float32.
    """

    family: ClassVar[str] = "exp_sums"
    rows: ClassVar[int] = 1

    vocabulary: int
    columns: int
    """N, the padded vocabulary."""

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for vocabulary, columns, rows, name in (
            (50257, 50272, 3, "124M"),
            (50257, 50257, 1, "124M, no padding"),
            (1021, 1024, 17, "odd vocabulary"),
            (5, 32, 8, "vocabulary below a vector"),
            (1, 16, 2, "one token"),
        ):
            kernel = ExpSums(vocabulary, columns)
            logits = _random_logits(kernel, rows, rng)
            ids = rng.integers(0, vocabulary, rows, dtype=np.int32)
            ids[0], ids[-1] = vocabulary - 1, -1
            yield _sums_case(kernel, name, logits, ids)
            yield _sums_case(kernel, f"{name}, large", logits * np.float32(1e4) - np.float32(1e6), ids)
            yield _sums_case(kernel, f"{name}, equal", np.full_like(logits, -37.5), ids)
            if vocabulary == 1:
                continue
            extreme = logits.copy()
            extreme[0, 1:vocabulary] = -np.inf  # one possible token, a total of 1
            extreme[-1, vocabulary // 3] = np.nan
            extreme[rows // 2, vocabulary - 1] = np.inf if rows > 2 else 80.0
            if rows > 4:
                extreme[1, :vocabulary] = -np.inf
                extreme[2, :vocabulary] = np.nan
            yield _sums_case(kernel, f"{name}, NaN and infinities", extreme, np.zeros_like(ids))


@dataclass(frozen=True)
class TopLogits:
    """The K largest of logits[:V] of each row, largest first; of equal ones the lowest index comes first.

    NaN and minus infinity have no place; where there are fewer than K others, the id is -1 and the value 0.

    Parameters of the function: logits (n, N) float32 with N >= V columns; ids (n, K) int32, values (n, K) float32.
    """

    family: ClassVar[str] = "top_logits"
    rows: ClassVar[int] = 1

    vocabulary: int
    columns: int
    """N, the padded vocabulary."""
    count: int
    """K."""

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for vocabulary, columns, count, rows, name in (
            (50257, 50272, 20, 3, "124M"),
            (50257, 50257, 20, 1, "124M, no padding"),
            (1021, 1024, 20, 17, "odd vocabulary"),
            (1021, 1024, 1, 5, "the largest"),
            (5, 32, 20, 8, "vocabulary below K"),
        ):
            kernel = TopLogits(vocabulary, columns, count)
            logits = _random_logits(kernel, rows, rng)
            yield _top_case(kernel, name, logits)
            yield _top_case(kernel, f"{name}, ties", np.round(logits - np.float32(50)))
            yield _top_case(kernel, f"{name}, equal", np.full_like(logits, -37.5))
            yield _top_case(kernel, f"{name}, ascending", np.sort(logits))
            extreme = -np.abs(logits) - np.float32(1e30)
            extreme[0, 1:vocabulary] = -np.inf
            extreme[-1, : vocabulary // 2] = np.nan
            yield _top_case(kernel, f"{name}, NaN and infinities", extreme)


def _random_logits(kernel: ExpSums | TopLogits, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Logits with large values in the padding, which must not matter."""
    logits = 3 * rng.standard_normal((rows, kernel.columns), dtype=np.float32)
    logits[:, kernel.vocabulary :] = 1e9
    return logits


def _sums_case(kernel: ExpSums, name: str, logits: np.ndarray, ids: np.ndarray) -> Case:
    wanted = logits[:, : kernel.vocabulary].astype(np.float64)
    largest = wanted.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shifted = wanted - largest
    bad = ~np.isfinite(largest[:, 0])  # the largest of numbers and a NaN is NaN
    totals = np.where(bad, -1.0, np.exp(shifted).sum(-1))
    chosen = shifted[np.arange(len(ids)), np.maximum(ids, 0)]
    distances = np.where(bad | (ids < 0), 0.0, chosen)
    outputs = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
    return Case(kernel, name, (logits, ids), outputs, (distances, totals), nmse=_EXP_NMSE)


def _top_case(kernel: TopLogits, name: str, logits: np.ndarray) -> Case:
    wanted = logits[:, : kernel.vocabulary].astype(np.float64)
    wanted[np.isnan(wanted)] = -np.inf
    order = np.argsort(-wanted, axis=-1, kind="stable")[:, : kernel.count]
    found = np.take_along_axis(wanted, order, -1)
    ids, values = np.full((len(logits), kernel.count), -1.0), np.zeros((len(logits), kernel.count))
    has = found > -np.inf
    ids[:, : order.shape[1]] = np.where(has, order, -1)
    values[:, : order.shape[1]] = np.where(has, found, 0.0)
    outputs = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, np.float32)
    return Case(kernel, name, (logits,), outputs, (ids, values), nmse=0.0)


def random_case(kernel: ExpSums | TopLogits, rows: int) -> Case:
    """A case of `rows` rows with random operands, of the sizes that a search measures."""
    rng = np.random.default_rng(0)
    logits = _random_logits(kernel, rows, rng)
    if isinstance(kernel, TopLogits):
        return _top_case(kernel, f"{rows} rows", logits)
    return _sums_case(kernel, f"{rows} rows", logits, rng.integers(0, kernel.vocabulary, rows, dtype=np.int32))
