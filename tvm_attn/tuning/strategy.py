"""Which candidate is measured next: a model of the decisions' effects, fitted to what was measured.

The model is additive: the logarithm of a candidate's time is a constant plus an effect of each decision. Effects have
a normal prior, so a few measurements are enough to begin with; the next candidate is the best one under effects that
are drawn from the posterior (Thompson sampling: Russo et al., A Tutorial on Thompson Sampling, 2018), which explores
what is not known yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tvm_attn.tuning.measurements import Measurement
from tvm_attn.tuning.space import Choice

_PRIOR = 0.3
"""Standard deviation of an effect before anything is measured, in units of the logarithm of time."""
_NOISE = 0.05
"""That of a measurement, including what decisions do only together."""
_FAILED = 1.0
"""A candidate that failed counts as slower than the slowest by this much, so that its like come later."""


def sampled_pick(known: Iterable[Measurement], rng: np.random.Generator) -> Callable[[Choice, Sequence[int]], int]:
    """A function that chooses branches, for `Explorer.next`: the best one under sampled effects."""
    measured = list(known)
    columns: dict[tuple[str, int], int] = {}
    for measurement in measured:
        for entry in measurement.decisions.items():
            columns.setdefault(entry, len(columns))
    effects = _sample(measured, columns, rng)

    def pick(choice: Choice, open_: Sequence[int]) -> int:
        values = []
        for branch in open_:
            column = columns.get((choice.name, choice.candidates[branch]))
            values.append(rng.normal(0, _PRIOR) if column is None else effects[column])
        return open_[int(np.argmin(values))]

    return pick


def _sample(
    measured: Sequence[Measurement], columns: dict[tuple[str, int], int], rng: np.random.Generator
) -> np.ndarray:
    """Effects (len(columns),) from the posterior of Bayesian linear regression."""
    times = np.log([measurement.mean for measurement in measured if measurement.seconds is not None])
    if len(times) == 0 or not columns:
        return rng.normal(0, _PRIOR, len(columns))
    worst = times.max() + _FAILED
    y = np.array([worst if entry.seconds is None else np.log(entry.mean) for entry in measured]) - np.median(times)
    x = np.zeros((len(measured), len(columns)))
    for row, measurement in enumerate(measured):
        for entry in measurement.decisions.items():
            x[row, columns[entry]] = 1
    precision = x.T @ x / _NOISE**2 + np.eye(len(columns)) / _PRIOR**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ (x.T @ y) / _NOISE**2
    return rng.multivariate_normal(mean, covariance, method="cholesky")
