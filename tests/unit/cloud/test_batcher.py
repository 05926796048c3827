from __future__ import annotations

import asyncio

import pytest

from cloud.batcher import Batcher

pytestmark = pytest.mark.anyio


async def test_a_full_lane_leaves_at_once_and_alone():
    batcher: Batcher[int] = Batcher(max_size=2, max_wait_s=60)
    for model, item in [(b"a", 1), (b"b", 2), (b"a", 3), (b"a", 4)]:
        batcher.put(model, [item])
    assert await batcher.take() == (b"a", [1, 3])
    assert batcher.held == 2


async def test_at_low_load_nothing_waits():
    batcher: Batcher[int] = Batcher(max_size=8, max_wait_s=0.5)
    batcher.put(b"a", [1])  # nothing tells yet of a rate that would make waiting pay
    taken = asyncio.create_task(batcher.take())
    await asyncio.sleep(0)
    assert taken.done()
    assert taken.result() == (b"a", [1])


async def test_at_high_load_a_lane_waits_for_company_but_not_longer_than_it_may():
    batcher: Batcher[int] = Batcher(max_size=1000, max_wait_s=0.5)
    batcher.put(b"a", range(300))
    taken = asyncio.create_task(batcher.take())
    await asyncio.sleep(0)
    assert not taken.done()
    batcher.put(b"a", range(300))
    model, batch = await asyncio.wait_for(taken, 5)
    assert (model, len(batch)) == (b"a", 600)


async def test_two_takers_share_what_there_is():
    batcher: Batcher[int] = Batcher(max_size=2, max_wait_s=0)
    takers = [asyncio.create_task(batcher.take()) for _ in range(2)]
    await asyncio.sleep(0)
    batcher.put(b"a", [1, 2, 3, 4])
    batches = await asyncio.wait_for(asyncio.gather(*takers), 5)
    assert [batch for _, batch in batches] == [[1, 2], [3, 4]]


async def test_a_closed_batcher_hands_out_what_it_holds_and_takes_nothing():
    batcher: Batcher[int] = Batcher(max_size=8, max_wait_s=60)
    batcher.put(b"a", range(4))
    batcher.close()
    assert not batcher.put(b"a", [9])
    assert await batcher.take() == (b"a", [0, 1, 2, 3])
    assert await batcher.take() is None


async def test_a_closed_batcher_hands_out_every_batch_of_a_lane_to_all_takers():
    batcher: Batcher[int] = Batcher(max_size=8, max_wait_s=60)
    taken: list[int] = []

    async def take_all() -> None:
        while (batch := await batcher.take()) is not None:
            taken.extend(batch[1])
            await asyncio.sleep(0)

    for model in (b"a", b"b"):
        batcher.put(model, range(50))
    batcher.close()
    await asyncio.wait_for(asyncio.gather(take_all(), take_all()), 5)
    assert sorted(taken) == sorted([*range(50), *range(50)])
