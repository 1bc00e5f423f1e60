"""Speculation against plain decoding, one sequence, taking turns.

    tvm-attn build --model gpt2 --random-weights --target cpu --draft int4 --out dist/gpt2-draft
    python -m benchmarks.speculate dist/gpt2-draft --json benchmarks/results/speculate-CPU-float32.json
    python -m benchmarks.speculate --acceptance dist/demo-draft

Every call of the model and of its draft is made and measured. What they answer is replayed: random weights have no
draft that is right as often as that of a trained model, so the text is given, and the draft is right at a given rate,
the share of tokens for which the demo model's int4 copy has the same most likely token on its validation text.
With --acceptance, a trained model and its draft are compared on a text instead: how often a guess is accepted when
tokens are sampled, by our rule and by rejection sampling.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

import tvm_attn
from tvm_attn.benchmark.machine import describe_machine
from tvm_attn.runtime.decoding import Completion, GenerationOptions, GenerationStats, Speculate
from tvm_attn.runtime.machine import usable_cores
from tvm_attn.runtime.sampling import SamplingOptions, distribution
from tvm_attn.runtime.scheduler import Scheduler
from tvm_attn.runtime.speculation import Lookup

_RATE = 0.866


class _Answer:
    """Logits whose largest are replaced by given tokens, after they have been found."""

    def __init__(self, logits: Any, token_ids: list[int]) -> None:
        self._logits, self._token_ids = logits, np.array(token_ids, np.int32)

    def argmax(self) -> np.ndarray:
        self._logits.argmax()
        return self._token_ids


class _Replay:
    """An engine that makes every call and answers with a given text.

    Args:
        engine: a compiled engine.
        text: the tokens, the prompt's first.
        wrong: positions at which its answer is another token.
    """

    def __init__(self, engine: Any, text: list[int], wrong: frozenset[int] = frozenset()) -> None:
        self._engine, self.text, self.wrong = engine, text, wrong
        self.draft: _Replay | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _after(self, logits: Any, positions: list[int]) -> _Answer:
        tokens = [self.text[place + 1] ^ (place + 1 in self.wrong) for place in positions]
        return _Answer(logits, tokens)

    def prefill(self, prompts: Any, slots: Any, starts: Any) -> _Answer:
        ends = [start + len(prompt) - 1 for prompt, start in zip(prompts, starts, strict=True)]
        return self._after(self._engine.prefill(prompts, slots, starts), ends)

    def decode(self, token_ids: Any, slots: Any, positions: Any, *, ahead: bool = False) -> _Answer:
        return self._after(self._engine.decode(token_ids, slots, positions, ahead=ahead), positions.tolist())


def _speed(engine: Any, text: list[int], prompt: int, tokens: int, speculate: Speculate) -> tuple[float, float | None]:
    """Tokens/s of decode, and the share of guesses that were right."""
    stats = GenerationStats()
    options = GenerationOptions(max_new_tokens=tokens, speculate=speculate, stop_token_ids=[])
    found = Scheduler(engine).generate(text[:prompt], options, stats)
    assert isinstance(found, Completion)
    assert list(found.token_ids) == text[prompt : prompt + tokens]
    accepted = stats.accepted_tokens / stats.guessed_tokens if stats.guessed_tokens else None
    return stats.decode_tokens_per_second or 0.0, accepted


def _measure(artifact: Path, rate: float, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    model = tvm_attn.load(artifact, device="cpu", max_batch=1)
    rng = np.random.default_rng(0)
    places = range(prompt, prompt + tokens + 1)
    fresh = rng.permutation(model.config.vocab_size // 2)[: prompt + tokens + 1] * 2
    text = fresh.tolist()
    repeated = (text[:prompt] * (tokens // prompt + 2))[: prompt + tokens + 1]
    missed = frozenset(place for place in places if rng.random() >= rate)
    cases: dict[str, list[tuple[float, float | None]]] = {}
    find = Lookup.find
    for _ in range(rounds):
        engine = _Replay(model.engine, text)
        cases.setdefault("plain", []).append(_speed(engine, text, prompt, tokens, "off"))
        if model.engine.draft is not None:
            engine.draft = _Replay(model.engine.draft, text, missed)
            cases.setdefault("draft", []).append(_speed(engine, text, prompt, tokens, "draft"))
            engine.draft = _Replay(model.engine.draft, text, frozenset(places))
            cases.setdefault("draft, nothing accepted", []).append(_speed(engine, text, prompt, tokens, "draft"))
        engine = _Replay(model.engine, repeated)
        cases.setdefault("prompt, repeated", []).append(_speed(engine, repeated, prompt, tokens, "prompt"))
        engine = _Replay(model.engine, text)
        cases.setdefault("prompt, nothing found", []).append(_speed(engine, text, prompt, tokens, "prompt"))
        Lookup.find = lambda self, most: [1] * most  # type: ignore[method-assign]  # odd: not in the text
        cases.setdefault("prompt, nothing accepted", []).append(_speed(engine, text, prompt, tokens, "prompt"))
        Lookup.find = find  # type: ignore[method-assign]
    plain = [speed for speed, _ in cases["plain"]]
    results = {
        name: {
            "tokens_per_second": [speed for speed, _ in runs],
            "ratio": statistics.median(speed / base for (speed, _), base in zip(runs, plain, strict=True)),
            "right": runs[-1][1],
        }
        for name, runs in cases.items()
    }
    options = {"rate": rate, "prompt": prompt, "tokens": tokens, "rounds": rounds}
    return {
        "artifact": artifact.name,
        "machine": describe_machine(usable_cores()),
        "options": options,
        "results": results,
    }


def _acceptance(artifact: Path, text: Path, temperatures: list[float]) -> dict[str, dict[str, float]]:
    """Probabilities that a guess is accepted, by temperature: means over the text."""
    model, copy = (tvm_attn.load(folder, device="cpu", draft=False) for folder in (artifact, artifact / "draft"))
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))
    length = min(model.config.n_positions, 256)
    rows = [ids[first : first + length] for first in range(0, min(len(ids) - length, 8 * length), length)]
    pairs = [(m, d) for row in rows for m, d in zip(model.logits([row])[0], copy.logits([row])[0], strict=True)]
    found: dict[str, dict[str, float]] = {}
    for temperature in temperatures:
        options = SamplingOptions(temperature=temperature)
        ours, rejection, likeliest = [], [], []
        for logits, drafted in pairs:
            p, q = distribution(logits, [], options), distribution(drafted, [], options)
            rejection.append(np.minimum(p, q).sum())
            likeliest.append(p[drafted.argmax()])
            # The same number falls into the same token's interval of both cumulative sums.
            high = np.minimum(p.cumsum(), q.cumsum())
            low = np.maximum(p.cumsum() - p, q.cumsum() - q)
            ours.append(np.maximum(high - low, 0).sum())
        columns = {"same number": ours, "rejection sampling": rejection, "most likely token": likeliest}
        found[str(temperature)] = {name: float(np.mean(values)) for name, values in columns.items()}
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rate", type=float, default=_RATE, help="share of right guesses of the draft: %(default)s")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each case (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--acceptance", type=Path, metavar="TEXT", help="compare rules of acceptance on a text")
    options = parser.parse_args()
    if options.acceptance is not None:
        result: dict[str, Any] = _acceptance(options.artifact, options.acceptance, [0.0, 0.5, 0.7, 1.0])
        print(json.dumps(result, indent=1))
    else:
        result = _measure(options.artifact, options.rate, options.prompt, options.tokens, options.rounds)
        print("| case | tokens/s | ratio | guesses that were right |\n|---|---|---|---|")
        for name, row in result["results"].items():
            right = "-" if row["right"] is None else f"{row['right']:.0%}"
            print(f"| {name} | {statistics.median(row['tokens_per_second']):.1f} | {row['ratio']:.2f} | {right} |")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
