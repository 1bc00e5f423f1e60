"""The clock around a system's calls."""

from typing import Any

import numpy as np
import pytest

from tvm_attn.benchmark.system import MAX_CALLS, MIN_CALLS, CachedSystem, Case, prompts


class Recorder(CachedSystem):
    """A system that notes its calls; its logits are the one-hot of the last token plus one."""

    vocabulary = 50

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def prefill(self, prompts: np.ndarray) -> np.ndarray:
        self.calls.append(("prefill", prompts.shape))
        return self._logits(prompts[:, -1])

    def decode(self, token_ids: np.ndarray, context: int) -> np.ndarray:
        self.calls.append(("decode", (token_ids.shape, context)))
        return self._logits(token_ids)

    def _logits(self, token_ids: np.ndarray) -> np.ndarray:
        return np.eye(50, dtype=np.float32)[(token_ids + 1) % 50]

    def numpy(self, logits: np.ndarray) -> np.ndarray:
        return logits

    def rewind(self, context: int) -> None:
        self.calls.append(("rewind", context))


def test_a_prompt_is_timed_after_a_call_that_is_not_counted() -> None:
    system = Recorder()
    times = system.time(Case("prefill", 7), seconds=0.0)
    assert len(times) == MIN_CALLS
    assert all(time > 0 for time in times)
    assert system.calls == [("prefill", (1, 7))] * (MIN_CALLS + 1)


def test_every_decode_call_is_at_the_same_context() -> None:
    system = Recorder()
    times = system.time(Case("decode", 9, 3), seconds=60.0)
    assert len(times) == MAX_CALLS
    assert system.calls == [("decode", ((3,), 9)), ("rewind", 9)] * (MAX_CALLS + 1)


def test_logits_for_comparing_come_from_both_functions() -> None:
    logits = Recorder().logits(np.array([3, 8, 5], np.int32))
    assert {name: int(values.argmax()) for name, values in logits.items()} == {"prefill": 6, "decode": 6}


def test_prompts_are_the_same_in_every_process() -> None:
    case = Case("decode", 20, 4)
    first, second = prompts(case, 1000), prompts(case, 1000)
    assert first.shape == (4, 20) and first.dtype == np.int32
    assert (first == second).all() and first.max() < 1000 and len(np.unique(first)) > 40


@pytest.mark.parametrize(
    ("case", "text", "tokens"),
    [
        (Case("prefill", 128), "prefill 128", 128),
        (Case("decode", 128), "decode 128", 1),
        (Case("decode", 1, 8), "decode 1, batch 8", 8),
    ],
)
def test_case(case: Case, text: str, tokens: int) -> None:
    assert str(case) == text
    assert case.tokens_per_call == tokens
    assert Case(**case.to_dict()) == case
