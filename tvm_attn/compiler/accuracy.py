"""Measures what quantization costs: the compiled model against the float32 reference on the unquantized weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tvm_attn._resources import resource_dir
from tvm_attn.config import GPT2Config
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.engine import CompiledEngine
from tvm_attn.runtime.scheduler import Scheduler
from tvm_attn.runtime.scoring import TextScore, score
from tvm_attn.runtime.tokenizer import Tokenizer

_TOKENS = 2048


@dataclass(frozen=True)
class Accuracy:
    """Agreement of next-token distributions, over `tokens` positions of `text`.

    Attributes:
        text: the name of the text.
        tokens: number of positions.
        kl_divergence: mean of KL(reference || compiled), nats.
        kl_divergence_p99: 99th percentile of the same.
        top1: share of positions with the same most likely token.
        perplexity: of the compiled model on the text; None for random tokens.
        reference_perplexity: of the reference.
    """

    text: str
    tokens: int
    kl_divergence: float
    kl_divergence_p99: float
    top1: float
    perplexity: float | None
    reference_perplexity: float | None

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    def summary(self) -> str:
        """One line for the user."""
        line = (
            f"against float32 on {self.tokens} tokens of {self.text}: KL divergence {self.kl_divergence:.4f} nats "
            f"(99 %: {self.kl_divergence_p99:.4f}), same top token {self.top1:.1%}"
        )
        if self.perplexity is None:
            return line
        return f"{line}, perplexity {self.perplexity:.2f} instead of {self.reference_perplexity:.2f}"


def measure_accuracy(
    config: GPT2Config, params: Iterable[tuple[str, np.ndarray]], engine: CompiledEngine, tokenizer: str | None
) -> Accuracy:
    """Compares a compiled model with the float32 reference on the checkpoint's own weights.

    Args:
        config: the model.
        params: the checkpoint's parameters, before they were quantized.
        engine: the compiled model; its slots are overwritten.
        tokenizer: content of `tokenizer.json`; if None, random tokens are used instead of text.
    """
    text, windows = _windows(config, tokenizer)
    reference = Reference(config, dict(params))
    divergences, agreeing = [], 0
    theirs: list[float | None] = []
    for window in windows:
        expected = _log_softmax(reference.logits(window[None])[0])
        actual = _log_softmax(engine.logits([window], [0])[0])
        divergences.append((np.exp(expected) * (expected - actual)).sum(-1))
        agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        theirs += [None, *np.take_along_axis(expected[:-1], window[1:, None], -1)[:, 0].tolist()]
    every = np.concatenate(divergences)
    perplexities: list[float | None] = [None, None]
    if tokenizer is not None:
        ours = [
            logprob
            for found in score(Scheduler(engine), windows, config.n_positions, config.n_positions)
            for logprob in found
        ]
        ids = tuple(np.concatenate(windows).tolist())
        perplexities = [TextScore(ids, tuple(logprobs), None).perplexity for logprobs in (ours, theirs)]
    return Accuracy(
        text,
        len(every),
        float(every.mean()),
        float(np.quantile(every, 0.99)),
        agreeing / len(every),
        *perplexities,
    )


def _windows(config: GPT2Config, tokenizer: str | None) -> tuple[str, list[np.ndarray]]:
    """The name of the text, and its tokens in windows no longer than the context."""
    if tokenizer is None:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, _TOKENS, dtype=np.int32)
        return "random token ids", np.array_split(ids, -(-_TOKENS // config.n_positions))
    text = (resource_dir("models/demo") / "validation.txt").read_text(encoding="utf-8")
    ids = np.array(Tokenizer(tokenizer).encode(text)[:_TOKENS], np.int32)
    return "models/demo/validation.txt", np.array_split(ids, -(-len(ids) // config.n_positions))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
