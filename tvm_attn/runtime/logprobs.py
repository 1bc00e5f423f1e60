"""Log-probabilities of tokens: of the model's own distribution, in nats.

They are those of the logits as the model gives them, before temperature, penalties and filters, as in OpenAI's API: a
sampled token's log-probability says how likely the model finds it, not how likely the sampling options made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import GenerationError
from tvm_attn.runtime.sampling import NOT_NUMBERS

MOST_LOGPROBS = 20
"""The most likely tokens that a compiled library finds for each row."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token after those before it, and the most likely tokens in its place.

    Attributes:
        token_id: the token.
        logprob: its natural logarithm of the probability, <= 0.
        top: ids and log-probabilities of the most likely tokens, best first; of equal ones the lowest id first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities for rows of logits.

    Attributes:
        chosen: of the token that was asked for, (B,) float64; NaN for a row that is not numbers.
        ids: the most likely tokens, (B, k) int32, best first; -1 where the vocabulary has fewer.
        top: their log-probabilities, (B, k) float64.
    """

    chosen: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int32]
    top: npt.NDArray[np.float64]

    @staticmethod
    def from_sums(
        distances: npt.NDArray[np.float32],
        totals: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int32] | None,
        values: npt.NDArray[np.float32] | None,
    ) -> RowLogprobs:
        """From what `ExpSums` and `TopLogits` of `tvm_attn.kernels.logprobs` give; ids and values may be missing."""
        logarithms = np.log(np.where(totals > 0, totals.astype(np.float64), np.nan))
        if ids is None or values is None:
            ids, values = np.empty((len(totals), 0), np.int32), np.empty((len(totals), 0), np.float32)
        top = values.astype(np.float64) - values[:, :1] - logarithms[:, None]
        return RowLogprobs(distances.astype(np.float64) - logarithms, ids, top)

    @staticmethod
    def join(parts: Sequence[RowLogprobs]) -> RowLogprobs:
        """Those of several parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return RowLogprobs(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))

    def rows(self, first: int, last: int) -> RowLogprobs:
        """Those of some rows."""
        return RowLogprobs(*(getattr(self, name)[first:last] for name in _FIELDS))

    def require_numbers(self) -> None:
        """Raises GenerationError if a row was not numbers."""
        if np.isnan(self.chosen).any():
            raise GenerationError(f"the next-token logits hold NaN, {NOT_NUMBERS}")

    def token(self, row: int, token_id: int, count: int) -> TokenLogprobs:
        """The token that was asked for in a row, with the `count` best."""
        best = zip(self.ids[row, :count].tolist(), self.top[row, :count].tolist(), strict=True)
        top = tuple((best_id, logprob) for best_id, logprob in best if best_id >= 0)
        return TokenLogprobs(token_id, float(self.chosen[row]), top)


_FIELDS = ("chosen", "ids", "top")
