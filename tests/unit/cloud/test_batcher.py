from __future__ import annotations

import asyncio

import pytest

from cloud.batcher import Batcher

pytestmark = pytest.mark.anyio


async def test_a_full_lane_leaves_at_once_and_alone():
    batcher: Batcher[int] = Batcher(max_size=2, max_wait_s=60, max_held=10)
    for model, item in [(b"a", 1), (b"b", 2), (b"a", 3), (b"a", 4)]:
        await batcher.put(model, item)
    assert await batcher.take() == (b"a", [1, 3])
    assert batcher.held == 2


async def test_a_lane_leaves_when_its_first_item_has_waited_long_enough():
    batcher: Batcher[int] = Batcher(max_size=8, max_wait_s=0.02, max_held=10)
    await batcher.put(b"a", 1)
    assert await asyncio.wait_for(batcher.take(), 5) == (b"a", [1])


async def test_put_waits_for_room():
    batcher: Batcher[int] = Batcher(max_size=1, max_wait_s=0, max_held=1)
    await batcher.put(b"a", 1)
    waiting = asyncio.create_task(batcher.put(b"a", 2))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await batcher.take() == (b"a", [1])
    assert await asyncio.wait_for(waiting, 5)
    assert await batcher.take() == (b"a", [2])


async def test_a_closed_batcher_hands_out_what_it_holds_and_takes_nothing():
    batcher: Batcher[int] = Batcher(max_size=8, max_wait_s=60, max_held=1)
    await batcher.put(b"a", 1)
    waiting = asyncio.create_task(batcher.put(b"a", 2))
    await asyncio.sleep(0)
    await batcher.close()
    assert not await waiting
    assert await batcher.take() == (b"a", [1])
    assert await batcher.take() is None
