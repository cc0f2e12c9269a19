from __future__ import annotations

import asyncio

from overlap.serve.turnstile import Turnstile


async def test_a_crowd_passes_in_its_order_a_few_in_each_turn_and_leavers_hold_nobody_up() -> None:
    turnstile, turn, passed = Turnstile(4), 0, []

    async def go(number: int) -> None:
        await turnstile.wait_turn()
        passed.append((number, turn))

    crowd = [asyncio.create_task(go(number)) for number in range(50)]
    await asyncio.sleep(0)
    for number in range(10, 20):
        crowd[number].cancel()
    while len(passed) < 40:
        await asyncio.sleep(0)
        turn += 1
        assert turn < 100, "somebody was forgotten"
    assert [number for number, _ in passed] == [*range(10), *range(20, 50)]
    turns = [at for _, at in passed]
    assert max(map(turns.count, turns)) <= 4
    await asyncio.gather(*crowd, return_exceptions=True)
    await asyncio.wait_for(turnstile.wait_turn(), 5)


async def test_who_comes_alone_does_not_wait() -> None:
    turnstile = Turnstile(1)
    for _ in range(3):
        coroutine = turnstile.wait_turn()
        try:
            coroutine.send(None)
        except StopIteration:
            pass
        else:
            raise AssertionError("it waited")
        await asyncio.sleep(0.01)
