"""The scheduler over an engine whose next token depends on all before it: what is computed, when, and for whom."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.runtime.engines import EOS, VOCAB, FakeEngine, HostLogits, wait_for
from tvm_attn.config import GPT2Config
from tvm_attn.errors import GenerationError, QueueFullError
from tvm_attn.runtime.decoding import Completion, GenerationOptions, GenerationStats
from tvm_attn.runtime.request import Request
from tvm_attn.runtime.scheduler import Scheduler
from tvm_attn.runtime.slots import SHORTEST_PREFIX
from tvm_attn.runtime.worker import Worker

CONTEXT = 160
TEN = GenerationOptions(max_new_tokens=10)


def next_id(ids: Sequence[int]) -> int:
    """A token that depends on all ids and their order."""
    found = 0
    for token_id in ids:
        found = (found * 31 + token_id + 7) % 1_000_003
    return found % (VOCAB - 1)  # never EOS


def continued(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_id(ids))
    return tuple(ids[len(prompt) :])


class HashEngine(FakeEngine):
    """Answers with `next_id`; notes how many rows each call has."""

    def __init__(self, max_batch: int = 4) -> None:
        config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, eos_token_id=EOS)
        super().__init__(config, max_batch)
        self.rows: list[tuple[str, list[int]]] = []

    def prefill(self, prompts: Sequence[np.ndarray], slots: Sequence[int], starts: Sequence[int]) -> HostLogits:
        self.rows.append(("prefill", [len(prompt) for prompt in prompts]))
        return super().prefill(prompts, slots, starts)

    def decode(
        self, token_ids: np.ndarray, slots: np.ndarray, positions: np.ndarray, *, ahead: bool = False
    ) -> HostLogits:
        self.rows.append(("decode", [1] * len(slots)))
        return super().decode(token_ids, slots, positions, ahead=ahead)

    def next_logits(self, token_ids: list[int]) -> np.ndarray:
        logits = np.zeros(VOCAB)
        logits[next_id(token_ids)] = 1
        return logits


def random_prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB - 1, length).tolist()


@pytest.fixture
def engine() -> HashEngine:
    return HashEngine()


@pytest.fixture
def scheduler(engine: HashEngine) -> Iterator[Scheduler]:
    scheduler = Scheduler(engine)
    yield scheduler
    wait_for(lambda: is_idle(scheduler))


def is_idle(scheduler: Scheduler) -> bool:
    stats = scheduler.stats
    return (stats.running, stats.waiting, stats.free_slots) == (0, 0, scheduler.engine.max_batch)


def ids_of(request: Request) -> tuple[int, ...]:
    return tuple(token.id for token in request)


# --- requests ---


def test_a_request_gives_its_tokens_and_its_completion(scheduler: Scheduler) -> None:
    prompt = random_prompt(5, 0)
    request = scheduler.submit(prompt, TEN)
    assert request.prompt_ids == tuple(prompt)
    assert ids_of(request) == continued(prompt, 10)
    assert ids_of(request) == ()  # each token once
    assert request.result() == request.result(0) == Completion("", continued(prompt, 10), "length")
    stats = request.stats
    assert (stats.prompt_tokens, stats.decode_tokens, stats.reused_tokens) == (5, 9, 0)
    assert stats.first_token_seconds > 0
    assert is_idle(scheduler)
    assert (scheduler.stats.prompt_tokens, scheduler.stats.generated_tokens, scheduler.stats.batch) == (5, 10, 1)


def test_a_result_that_is_not_there_in_time(scheduler: Scheduler, engine: HashEngine) -> None:
    with engine.pause_at(3):
        request = scheduler.submit([1], TEN)
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            request.result(0.01)
    assert request.result(60).token_ids == continued([1], 10)


def test_options_of_requests_in_one_batch_are_their_own(scheduler: Scheduler, engine: HashEngine) -> None:
    prompt = random_prompt(4, 1)
    options = [
        GenerationOptions(max_new_tokens=3),
        GenerationOptions(max_new_tokens=7, temperature=1.0, seed=1),
        GenerationOptions(max_new_tokens=5, stop_token_ids=continued(prompt, 2)[1]),
        GenerationOptions(max_new_tokens=6, temperature=1.0, top_k=1),
    ]
    alone = [scheduler.submit(prompt, each).result() for each in options]
    calls = len(engine.rows)
    with engine.pause_at(1):
        first = scheduler.submit([1], GenerationOptions(max_new_tokens=1))
        wait_for(lambda: len(engine.rows) == calls + 1)
        requests = [scheduler.submit(prompt, each) for each in options]  # all of which begin with the next call
    assert first.result().token_ids == continued([1], 1)
    assert [request.result() for request in requests] == alone
    assert alone[0].token_ids == continued(prompt, 3) and alone[3].token_ids == continued(prompt, 6)
    assert (alone[2].token_ids, alone[2].finish_reason) == (continued(prompt, 2), "stop")
    assert ("decode", [1] * 3) in engine.rows


def test_sequences_of_one_seed_differ_by_their_index(scheduler: Scheduler) -> None:
    options = GenerationOptions(max_new_tokens=10, temperature=5.0, seed=3)
    both = scheduler.generate([[1], [1]], options)
    assert both[0] != both[1]
    assert [scheduler.submit([1], options, index=index).result() for index in (0, 1)] == both


@pytest.mark.parametrize("give", [lambda s: s.submit, lambda s: s.stream_ids])
def test_one_sequence_has_one_prompt_and_one_completion(scheduler: Scheduler, give: Callable[..., Any]) -> None:
    with pytest.raises(GenerationError, match="one prompt, not 2"):
        give(scheduler)([[1], [2]])
    with pytest.raises(GenerationError, match="one completion, not 3"):
        give(scheduler)([1], GenerationOptions(n=3))


def test_n_completions_of_each_prompt(scheduler: Scheduler, engine: HashEngine) -> None:
    prompts = [random_prompt(3, 0), random_prompt(4, 1)]
    sampled = GenerationOptions(max_new_tokens=5, temperature=9.0, seed=1, n=3)
    found = scheduler.generate(prompts, sampled)
    assert len(found) == 6 and len(set(found)) == 6
    alone = [
        scheduler.submit(prompts[index // 3], GenerationOptions(max_new_tokens=5, temperature=9.0, seed=1), index=index)
        for index in range(6)
    ]
    assert [request.result() for request in alone] == found
    assert scheduler.generate(prompts[0], GenerationOptions(max_new_tokens=5, n=2)) == [
        Completion("", continued(prompts[0], 5), "length")
    ] * 2  # fmt: skip


# --- chunks of prompts ---


def test_long_prompts_are_computed_between_the_steps_of_others(scheduler: Scheduler, engine: HashEngine) -> None:
    with engine.pause_at(3):
        running = scheduler.submit([1], GenerationOptions(max_new_tokens=30))
        wait_for(lambda: len(engine.rows) == 3)
        late = [scheduler.submit(random_prompt(length, length), TEN) for length in (21, 3, 40)]
    assert running.result().token_ids == continued([1], 30)
    for request in late:
        assert request.result().token_ids == continued(request.prompt_ids, 10)
    rows = engine.rows[3:]
    # 64 tokens in chunks of 8, the first prompts first, and a step of those that run after each.
    expected = [[8], [8], [5, 3], [8], [8], [8], [8], [8]]
    assert [rows for kind, rows in rows if kind == "prefill"] == expected
    assert [kind for kind, _ in rows[: 2 * len(expected)]] == ["prefill", "decode"] * len(expected)


def test_sequences_of_one_request_do_not_wait_for_each_other(scheduler: Scheduler, engine: HashEngine) -> None:
    prompts = [random_prompt(60, seed) for seed in range(5)]
    completions = scheduler.generate(prompts, TEN)
    assert [completion.token_ids for completion in completions] == [continued(prompt, 10) for prompt in prompts]
    # As many tokens as a call takes; the last prompt gets a slot when the others have ended.
    assert engine.rows[:2] == [("prefill", [60, 60, 40]), ("prefill", [20, 60])]
    assert [kind for kind, _ in engine.rows] == ["prefill"] * 2 + ["decode"] * 9 + ["prefill"] + ["decode"] * 9


# --- common prefixes ---


def test_a_prompt_goes_on_in_the_slot_that_holds_its_beginning(scheduler: Scheduler, engine: HashEngine) -> None:
    common = random_prompt(50, 0)
    first, second, again = [*common, 1, 2, 3], [*common, 4], common
    for prompt, computed in ((first, 53), (second, 1), (again, 1)):
        request = scheduler.submit(prompt, TEN)
        assert request.result().token_ids == continued(prompt, 10)
        assert request.stats.prompt_tokens == len(prompt)
        assert request.stats.reused_tokens == len(prompt) - computed
        assert engine.rows[-10] == ("prefill", [computed])
    assert {slot for _, slots in engine.calls for slot in slots} == {0}
    assert (scheduler.stats.prefix_hits, scheduler.stats.reused_tokens) == (2, 50 + 49)


def test_decoded_tokens_and_short_beginnings_are_not_reused(scheduler: Scheduler, engine: HashEngine) -> None:
    prompt = random_prompt(40, 0)
    whole = [*prompt, *scheduler.submit(prompt, TEN).result().token_ids]
    assert scheduler.submit(whole, TEN).result().token_ids == continued(whole, 10)
    assert engine.rows[-10] == ("prefill", [10])  # 40 of the 50 were a prompt
    short = [*whole[: SHORTEST_PREFIX - 1], 1, 2, 3, 4]
    assert scheduler.submit(short, TEN).result().token_ids == continued(short, 10)
    assert engine.rows[-10] == ("prefill", [len(short)])
    assert scheduler.stats.prefix_hits == 1


def test_a_beginning_is_copied_from_a_slot_in_use(scheduler: Scheduler, engine: HashEngine) -> None:
    common = random_prompt(50, 0)
    with engine.pause_at(2):
        running = scheduler.submit([*common, 1], GenerationOptions(max_new_tokens=40))
        wait_for(lambda: len(engine.rows) == 2)
        late = scheduler.submit([*common, 2, 3], TEN)
    assert late.result().token_ids == continued(late.prompt_ids, 10)
    assert running.result().token_ids == continued(running.prompt_ids, 40)
    assert engine.calls[2:4] == [("copy", [0, 1]), ("prefill", [1])]
    assert late.stats.reused_tokens == 50


def test_prompts_that_begin_together_are_computed_once(scheduler: Scheduler, engine: HashEngine) -> None:
    common = random_prompt(60, 0)
    prompts = [[*common, number] for number in range(6)]
    stats = GenerationStats()
    completions = scheduler.generate(prompts, TEN, stats)
    assert [completion.token_ids for completion in completions] == [continued(prompt, 10) for prompt in prompts]
    prefilled = [rows for kind, rows in engine.rows if kind == "prefill"]
    assert prefilled == [[61], [1, 1, 1], [1, 1]]
    assert (stats.prompt_tokens, stats.reused_tokens) == (6 * 61, 5 * 60)
    assert scheduler.stats.prefix_hits == 5
    # Also for several completions of one prompt, whose last token each computes itself.
    scheduler.generate(random_prompt(70, 1), GenerationOptions(max_new_tokens=2, n=4))
    assert [rows for kind, rows in engine.rows if kind == "prefill"][3:] == [[70], [1, 1, 1]]


def test_the_beginning_of_a_cancelled_prompt_is_used_as_far_as_it_goes(
    scheduler: Scheduler, engine: HashEngine
) -> None:
    common = random_prompt(100, 0)
    with engine.pause_at(5):  # one token, then chunks and steps in turn: two of 13 chunks are done
        with engine.pause_at(1):
            running = scheduler.submit([1], GenerationOptions(max_new_tokens=40))
            wait_for(lambda: len(engine.rows) == 1)
            first, second = scheduler.submit([*common, 1], TEN), scheduler.submit([*common, 2], TEN)
        wait_for(lambda: len(engine.rows) == 5)
        first.cancel()
    assert second.result().token_ids == continued(second.prompt_ids, 10)
    assert running.result().token_ids == continued([1], 40)
    assert first.result() == Completion("", (), "cancelled")
    assert second.stats.prompt_tokens == 101


def test_others_calls_of_the_engine_void_what_slots_hold(scheduler: Scheduler, engine: HashEngine) -> None:
    prompt = random_prompt(50, 0)
    scheduler.submit(prompt, TEN).result()
    engine.cache[0] = [3] * 50  # as `engine.prefill` would
    engine.writes += 1
    assert scheduler.submit(prompt, TEN).result().token_ids == continued(prompt, 10)
    assert scheduler.stats.prefix_hits == 0


def test_prompts_may_change_after_they_were_given(scheduler: Scheduler, engine: HashEngine) -> None:
    ids = np.array(random_prompt(50, 0), np.int32)
    before = ids.tolist()
    with engine.pause_at(1):
        first = scheduler.submit([1], TEN)
        wait_for(lambda: engine.rows != [])
        late = scheduler.submit(ids, TEN)
        ids[:] = 5
    assert late.result().token_ids == continued(before, 10)
    ids[:] = before
    ids[3] += 1
    assert scheduler.submit(ids, TEN).result().token_ids == continued(ids.tolist(), 10)
    first.result()


# --- the queue ---


def test_first_come_first_served(scheduler: Scheduler, engine: HashEngine) -> None:
    scheduler = Scheduler(engine := HashEngine(max_batch=1))
    with engine.pause_at(1):
        requests = [scheduler.submit([number], GenerationOptions(max_new_tokens=2)) for number in range(4)]
        wait_for(lambda: engine.rows != [])
        assert (scheduler.stats.running, scheduler.stats.waiting, scheduler.stats.free_slots) == (1, 3, 0)
    for request in requests:
        request.result()
    assert engine.calls == [("prefill", [0]), ("decode", [0])] * 4


def test_the_queue_is_bounded() -> None:
    scheduler = Scheduler(engine := HashEngine(max_batch=2), queue_limit=3)
    with engine.pause_at(1):
        requests = [scheduler.submit([number], TEN) for number in range(5)]
        with pytest.raises(QueueFullError, match="5 requests run or wait, of 5; try again later"):
            scheduler.submit([9], TEN)
        with pytest.raises(QueueFullError):
            scheduler.generate([[1], [2]], TEN)
        requests[4].cancel()
    assert [request.result().token_ids for request in requests[:4]] == [continued([i], 10) for i in range(4)]
    wait_for(lambda: is_idle(scheduler))
    with pytest.raises(QueueFullError):
        scheduler.generate([[1]] * 6, TEN)  # all or none
    assert len(scheduler.generate([[1]] * 5, TEN)) == 5
    scheduler.queue_limit = None
    assert len(scheduler.generate([[1]] * 20, TEN)) == 20


def test_a_closed_scheduler_finishes_or_cancels(engine: HashEngine) -> None:
    scheduler = Scheduler(engine)
    with engine.pause_at(2):
        requests = [scheduler.submit([number], TEN) for number in range(6)]
        scheduler.close()
        with pytest.raises(GenerationError, match="being closed"):
            scheduler.submit([1], TEN)
    assert [request.result().token_ids for request in requests] == [continued([i], 10) for i in range(6)]
    scheduler = Scheduler(engine)
    with engine.pause_at(2):
        requests = [scheduler.submit([number], TEN) for number in range(6)]
        scheduler.close(cancel=True)
    assert {request.result().finish_reason for request in requests} == {"cancelled"}
    assert is_idle(scheduler)


# --- cancelling ---


def test_cancelling_in_every_state() -> None:
    """Waiting, between the chunks of a prompt, and running; the others go on, and the slots go to the next."""
    scheduler = Scheduler(engine := HashEngine(max_batch=2))
    long = random_prompt(60, 0)
    with engine.pause_at(8):
        with engine.pause_at(1):
            running = scheduler.submit([1], GenerationOptions(max_new_tokens=100))
            wait_for(lambda: len(engine.rows) == 1)
            beginning = scheduler.submit(long, TEN)
            waiting, last = scheduler.submit([3], TEN), scheduler.submit([4], TEN)
        wait_for(lambda: len(engine.rows) == 8)
        for request in (running, beginning, waiting):
            request.cancel()
            request.cancel()
    tokens = ids_of(running)
    assert 0 < len(tokens) < 10 and tokens == continued([1], len(tokens))
    assert running.result() == Completion("", tokens, "cancelled")
    assert beginning.result() == waiting.result() == Completion("", (), "cancelled")
    assert ids_of(beginning) == ids_of(waiting) == ()
    assert last.result().token_ids == continued([4], 10)
    assert is_idle(scheduler)
    last.cancel()  # too late
    assert last.result().finish_reason == "length"


def test_a_request_that_nobody_has_is_cancelled(scheduler: Scheduler, engine: HashEngine) -> None:
    with engine.pause_at(2):
        request = scheduler.submit([1], GenerationOptions(max_new_tokens=100))
        wait_for(lambda: len(engine.rows) == 2)
        del request
    wait_for(lambda: is_idle(scheduler))
    assert len(engine.rows) == 2


def test_cancelling_many(scheduler: Scheduler) -> None:
    requests = [scheduler.submit([number % 200], TEN) for number in range(3000)]
    for request in requests[::2]:
        request.cancel()
    assert all(request.result().finish_reason == "length" for request in requests[1::2])
    wait_for(lambda: is_idle(scheduler))


# --- asyncio ---


def test_tasks_wait_without_threads(scheduler: Scheduler) -> None:
    async def ask(number: int) -> None:
        request = scheduler.submit([number], GenerationOptions(max_new_tokens=20))
        found = [token.id async for token in request]
        assert tuple(found) == (await request.wait()).token_ids == continued([number], 20)
        assert threading.active_count() <= before + 1

    async def main() -> None:
        await asyncio.gather(*(ask(number) for number in range(50)))
        assert await scheduler.submit([3], TEN).wait() == Completion("", continued([3], 10), "length")

    before = threading.active_count()
    asyncio.run(main())


def test_a_cancelled_task_and_its_request(scheduler: Scheduler, engine: HashEngine) -> None:
    async def read(request: Request) -> None:
        try:
            async for _ in request:
                pass
        finally:
            request.cancel()

    async def main() -> None:
        with engine.pause_at(4):
            request = scheduler.submit([1], GenerationOptions(max_new_tokens=100))
            task = asyncio.create_task(read(request))
            while len(engine.rows) < 4:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(request.wait(), 0.01)
        completion = await asyncio.wait_for(request.wait(), 60)
        assert completion.finish_reason == "cancelled" and len(completion.token_ids) == 4

    asyncio.run(main())
    assert is_idle(scheduler)


def test_a_loop_that_ends_leaves_the_others_alone(scheduler: Scheduler, engine: HashEngine) -> None:
    async def main() -> None:
        request = scheduler.submit([1], TEN)
        kept.append(request)
        task = asyncio.create_task(anext(aiter(request)))
        await asyncio.sleep(0)
        task.cancel()

    kept: list[Request] = []
    other = scheduler.submit([2], TEN)
    with engine.pause_at(1):
        asyncio.run(main())
    assert other.result().token_ids == continued([2], 10)
    assert kept[0].result().token_ids == continued([1], 10)


# --- errors ---


def test_a_failing_call_fails_its_sequences_only(scheduler: Scheduler, engine: HashEngine) -> None:
    def fail(prompts: Sequence[np.ndarray], slots: Sequence[int], starts: Sequence[int]) -> HostLogits:
        if any(13 in prompt for prompt in prompts):
            raise OverflowError("a kernel failed")
        return prefill(prompts, slots, starts)

    prefill = engine.prefill
    engine.prefill = fail  # type: ignore[method-assign]
    with engine.pause_at(2):
        running = scheduler.submit([1], TEN)
        wait_for(lambda: len(engine.rows) == 2)
        broken = scheduler.submit([13], TEN)
    with pytest.raises(OverflowError, match="a kernel failed"):
        broken.result()
    with pytest.raises(OverflowError):
        list(broken)

    async def wait() -> None:
        with pytest.raises(OverflowError):
            await broken.wait()
        with pytest.raises(OverflowError):
            async for _ in broken:
                pass

    asyncio.run(wait())
    assert running.result().token_ids == continued([1], 10)
    with pytest.raises(OverflowError):
        scheduler.generate([[1], [13], [2]], TEN)
    assert scheduler.submit([2], TEN).result().token_ids == continued([2], 10)


def test_a_sequence_whose_logits_are_nan_ends_alone(scheduler: Scheduler, engine: HashEngine) -> None:
    def next_logits(ids: list[int]) -> np.ndarray:
        return np.full(VOCAB, np.nan) if ids[0] == 13 and len(ids) == 4 else logits(ids)

    logits = engine.next_logits
    engine.next_logits = next_logits  # type: ignore[method-assign]
    for options in (TEN, GenerationOptions(max_new_tokens=10, temperature=1.0, top_k=1)):
        with engine.pause_at(1):
            good, bad = scheduler.submit([1], options), scheduler.submit([13], options)
        assert good.result().token_ids == continued([1], 10)
        with pytest.raises(GenerationError, match="next-token logits"):
            bad.result()
        wait_for(lambda: is_idle(scheduler))


# --- functions that need slots ---


def test_calls_wait_for_free_slots(engine: HashEngine) -> None:
    scheduler = Scheduler(engine)
    assert scheduler.call(lambda slots: slots, 9) == [0, 1, 2, 3]
    assert scheduler.call(lambda slots: slots, 1) == [0]
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda slots: 1 // 0, 1)
    order: list[str] = []
    with engine.pause_at(1):
        requests = [scheduler.submit([number], TEN) for number in range(5)]
        thread = threading.Thread(target=lambda: scheduler.call(lambda slots: order.append(f"{slots}"), 2))
        thread.start()
        wait_for(lambda: len(engine.rows) == 1)
    thread.join()
    assert len(order) == 1
    assert [request.result().token_ids for request in requests] == [continued([i], 10) for i in range(5)]


def test_a_call_voids_what_its_slots_hold(scheduler: Scheduler, engine: HashEngine) -> None:
    prompt = random_prompt(50, 0)
    scheduler.submit(prompt, TEN).result()
    scheduler.call(lambda slots: engine.cache.update({slot: [] for slot in slots}), 1)
    assert scheduler.submit(prompt, TEN).result().token_ids == continued(prompt, 10)
    assert scheduler.stats.prefix_hits == 0


# --- forks ---


def test_a_child_keeps_the_requests_of_the_thread_that_forked() -> None:
    """What `after_fork_in_child` does; forks themselves are tested in test_worker.py."""
    scheduler = Scheduler(engine := HashEngine(max_batch=3))
    own, others = list[Request](), list[Request]()

    def submit(requests: list[Request]) -> None:
        requests += [scheduler.submit([number], TEN) for number in range(3)]

    lost: list[Callable[[], object]] = []
    with engine.pause_at(2):
        with engine.pause_at(1):
            submit(own)
            thread = threading.Thread(target=submit, args=(others,))
            thread.start()
            thread.join()
        wait_for(lambda: len(engine.rows) == 2)
        engine.post = lost.append  # type: ignore[method-assign, assignment]
    wait_for(lambda: lost != [])  # the next step is queued for a thread that does not exist
    scheduler.after_fork_in_child()
    engine.post = Worker("child").post  # type: ignore[method-assign]
    for request in others:
        with pytest.raises(GenerationError, match="start it again"):
            request.result()
    assert scheduler.stats.running + scheduler.stats.waiting == 3
    assert [request.result().token_ids for request in own] == [continued([number], 10) for number in range(3)]
    assert is_idle(scheduler)


# --- everything at once ---


@pytest.mark.parametrize("seed", range(4))
def test_random_load(seed: int) -> None:
    """Threads and tasks submit, read, drop and cancel; what is read is what the prompt gives alone."""
    scheduler = Scheduler(engine := HashEngine(max_batch=3))
    beginnings = [random_prompt(length, length) for length in (0, 35, 60, 90)]
    wrong: list[Any] = []

    def checked(rng: np.random.Generator) -> tuple[Request, int]:
        prompt = beginnings[rng.integers(4)] + random_prompt(int(rng.integers(1, 30)), int(rng.integers(20)))
        count = int(rng.integers(1, 25))
        return scheduler.submit(prompt, GenerationOptions(max_new_tokens=count)), count

    def check(request: Request, count: int, found: Sequence[int]) -> None:
        completion = request.result()
        if completion.token_ids != continued(request.prompt_ids, count) or tuple(found) != completion.token_ids:
            wrong.append(request.prompt_ids)

    def ask(number: int) -> None:
        rng = np.random.default_rng([seed, number])
        for _ in range(15):
            request, count = checked(rng)
            match rng.integers(5):
                case 0:
                    request.cancel()
                    found = ids_of(request)
                    if found != continued(request.prompt_ids, len(found)):
                        wrong.append(found)
                case 1:
                    pass  # dropped
                case 2:
                    prompts = [beginnings[i] + [int(rng.integers(200))] for i in range(4)]
                    completions = scheduler.generate(prompts, TEN)
                    if [c.token_ids for c in completions] != [continued(prompt, 10) for prompt in prompts]:
                        wrong.append(prompts)
                case _:
                    check(request, count, ids_of(request))

    async def task(number: int) -> None:
        rng = np.random.default_rng([seed, 100 + number])
        for _ in range(10):
            request, count = checked(rng)
            check(request, count, [token.id async for token in request])

    async def main() -> None:
        await asyncio.gather(*(task(number) for number in range(5)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    threads.append(threading.Thread(target=lambda: asyncio.run(main())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    wait_for(lambda: is_idle(scheduler))
    assert scheduler.stats.prefix_hits > 0 and any(name == "copy" for name, _ in engine.calls)
