"""Who shares what, and that everybody gets through: the prefix cache and preemption as a user's requests meet them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from overlap.cache.pages import PAGE, pages_for
from overlap.loop import Loop
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.testing import EchoModel, SimDevice, SimRunner

MODEL = EchoModel()


@dataclass
class Shop:
    """A loop on a simulated device, and what it told."""

    num_pages: int = 64
    max_rows: int = 8
    token_budget: int = 64
    prefill_chunk: int = 32
    prefix_cache: bool = True
    overlap: bool = True
    answers: dict[int, list[int]] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    on_settled: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.planner = Planner(
            max_rows=self.max_rows,
            num_pages=self.num_pages,
            token_budget=self.token_budget,
            prefill_chunk=self.prefill_chunk,
            context=1024,
            prefix_cache=self.prefix_cache,
        )
        self.runner = SimRunner(
            SimDevice().stream("compute"),
            MODEL,
            num_pages=self.num_pages,
            shared=lambda: self.planner._store._tree.pages(),
        )
        self.loop = Loop(self.planner, self.runner, self, overlap=self.overlap)

    def tell_settled(self, settled: Settled) -> None:
        self.planner.check()
        self.cached.update(settled.cached)
        for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
            self.answers.setdefault(key, []).append(token)
        self.finished += [end.key for end in settled.ends]
        self.on_settled()

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        raise AssertionError(f"request {key}: {failure}")

    async def serve(self, *requests: Request) -> None:
        """Serve requests until all have ended."""
        for one in requests:
            self.loop.submit(one)
        running = asyncio.create_task(self.loop.run())
        idle = asyncio.Event()
        self.loop.when_idle(idle.set)
        await asyncio.wait([running, asyncio.create_task(idle.wait())], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        self.planner.check_idle()
        self.loop.close()
        await running
        self.loop._closing = False

    @property
    def prompt_tokens_run(self) -> int:
        return sum(len(plan.prompt) for plan in self.runner.plans)


def request(key: int, prompt: list[int], limit: int, priority: int = 0, salt: str = "") -> Request:
    column = np.array(prompt, dtype=np.int32)
    return Request(key=key, front=0, prompt=column, limit=limit, priority=priority, salt=salt)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(97) for _ in range(length)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("chunk", [5, 16, 32, 64])
async def test_many_equal_prompts_at_once_compute_their_prefix_once(chunk: int, overlap: bool) -> None:
    shop, prompt = Shop(prefill_chunk=chunk, overlap=overlap), prompt_of(100)
    await shop.serve(*(request(key, prompt, 5) for key in range(8)))
    assert shop.prompt_tokens_run == 100 + 7 * 4
    assert shop.cached == dict.fromkeys(range(1, 8), 96)
    assert shop.answers == dict.fromkeys(range(8), MODEL.answer(prompt, 5))


async def test_prompts_that_share_a_prefix_compute_it_once_and_their_ends_each() -> None:
    shop, prefix = Shop(max_rows=16, token_budget=200), prompt_of(64)
    prompts = [[*prefix, *prompt_of(20, seed)] for seed in range(1, 11)]
    await shop.serve(*(request(key, prompt, 3) for key, prompt in enumerate(prompts)))
    assert shop.prompt_tokens_run == 64 + 10 * 20
    assert shop.answers == {key: MODEL.answer(prompt, 3) for key, prompt in enumerate(prompts)}


async def test_who_waits_for_a_prefix_goes_on_when_the_one_who_computes_it_is_ended() -> None:
    shop, prompt = Shop(prefill_chunk=20, max_rows=4), prompt_of(100)
    ended: list[int] = []

    def end_first() -> None:
        if len(ended) < 3:
            ended.append(len(ended))
            assert shop.loop.end(ended[-1])

    shop.on_settled = end_first
    await shop.serve(*(request(key, prompt, 5) for key in range(6)))
    assert sorted(shop.finished) == [3, 4, 5]
    assert all(shop.answers[key] == MODEL.answer(prompt, 5) for key in shop.finished)
    assert shop.prompt_tokens_run < 100 + 5 * 36


@pytest.mark.parametrize(("length", "hit"), [(15, 0), (16, 0), (17, 16), (47, 32), (48, 32), (49, 48), (50, 48)])
async def test_a_full_hit_keeps_its_last_token_to_run(length: int, hit: int) -> None:
    shop, prompt = Shop(), prompt_of(length)
    await shop.serve(request(0, prompt, 3))
    await shop.serve(request(1, prompt, 3))
    assert shop.cached.get(1, 0) == hit
    assert shop.prompt_tokens_run == length + length - hit
    assert shop.answers[1] == shop.answers[0] == MODEL.answer(prompt, 3)


async def test_salts_do_not_share() -> None:
    shop, prompt = Shop(), prompt_of(70)
    await shop.serve(request(0, prompt, 3, salt="one"), request(1, prompt, 3, salt="two"), request(2, prompt, 3))
    assert shop.cached == {}
    assert shop.prompt_tokens_run == 3 * 70
    await shop.serve(request(3, prompt, 3, salt="two"))
    assert shop.cached == {3: 64}
    assert all(answer == MODEL.answer(prompt, 3) for answer in shop.answers.values())


async def test_without_a_prefix_cache_nothing_is_shared_or_kept() -> None:
    shop, prompt = Shop(prefix_cache=False), prompt_of(70)
    await shop.serve(*(request(key, prompt, 3) for key in range(3)))
    assert shop.prompt_tokens_run == 3 * 70
    assert shop.planner.statistics().free_pages == 64


async def test_the_next_turn_of_a_conversation_hits_the_pages_of_the_answer() -> None:
    shop, prompt, expected = Shop(), prompt_of(20), 0
    for turn in range(5):
        await shop.serve(request(turn, prompt, 50))
        assert shop.cached.get(turn, 0) == expected
        prompt = [*prompt, *shop.answers[turn], 5]
        expected = (len(prompt) - 2) // PAGE * PAGE  # the KV of an answer's last token was never computed
    assert shop.prompt_tokens_run < 20 + 4 * (2 + PAGE)


async def test_a_preempted_request_resumes_from_the_cache() -> None:
    shop, low, high = Shop(max_rows=1), prompt_of(40), prompt_of(30, 1)

    def interrupt() -> None:
        if len(shop.answers.get(0, [])) == 30 and 1 not in shop.answers and shop.planner.request(1) is None:
            shop.loop.submit(request(1, high, 4, priority=1))

    shop.on_settled = interrupt
    await shop.serve(request(0, low, 60))
    assert shop.planner.statistics().preemptions == 1
    assert shop.finished == [1, 0]
    assert shop.answers == {0: MODEL.answer(low, 60), 1: MODEL.answer(high, 4)}
    starts = [admission.start for plan in shop.runner.plans for admission in plan.admissions]
    assert starts == [0, 0, 64]
    assert shop.prompt_tokens_run == 40 + 30 + (40 + 32 - 64), "32 tokens of the answer had come"
    assert shop.cached == {}, "what a request computed itself is no hit"


async def test_a_prompt_that_is_preempted_before_its_first_token_reports_no_hit_on_its_own_pages() -> None:
    shop, low, high = Shop(max_rows=1, prefill_chunk=16), prompt_of(100), prompt_of(30, 1)

    def interrupt() -> None:
        if len(shop.runner.plans) == 3:
            shop.loop.submit(request(1, high, 4, priority=1))

    shop.on_settled = interrupt
    await shop.serve(request(0, low, 5))
    assert shop.planner.statistics().preemptions == 1
    assert shop.planner.statistics().cached_tokens > 0
    assert shop.cached == {}


async def test_a_high_priority_waits_for_none_that_is_lower() -> None:
    shop = Shop(num_pages=16, max_rows=4)
    keys = iter(range(4, 8))

    def press() -> None:
        if len(shop.answers.get(0, [])) == 5:
            for key in keys:
                shop.loop.submit(request(key, prompt_of(30, key), 15, priority=1))

    shop.on_settled = press
    await shop.serve(*(request(key, prompt_of(30, key), 50) for key in range(4)))
    assert sorted(shop.finished[:4]) == [4, 5, 6, 7]
    assert shop.answers == {key: MODEL.answer(prompt_of(30, key), 50 if key < 4 else 15) for key in range(8)}


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_pages", range(4, 16))
async def test_at_every_number_of_pages_that_fits_one_request_all_of_them_end(
    num_pages: int, prefix_cache: bool
) -> None:
    draw = random.Random(num_pages)
    for overlap in (True, False):
        shop = Shop(num_pages, 6, token_budget=20, prefill_chunk=7, prefix_cache=prefix_cache, overlap=overlap)
        prompts, limits = [], []
        for key in range(12):
            prompts.append([*prompt_of(draw.choice([0, 17, 33])), *prompt_of(draw.randint(1, 30), key)])
            whole = 4 * PAGE if key % 3 else draw.randint(len(prompts[-1]) + 1, 4 * PAGE)
            limits.append(whole - len(prompts[-1]))
        assert max(pages_for(len(p) + n) for p, n in zip(prompts, limits, strict=True)) == 4
        columns = zip(prompts, limits, strict=True)
        await shop.serve(*(request(key, *of, priority=draw.choice([0, 0, 1, 2])) for key, of in enumerate(columns)))
        assert shop.answers == {key: MODEL.answer(prompts[key], limits[key]) for key in range(12)}
