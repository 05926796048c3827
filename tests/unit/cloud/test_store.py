from __future__ import annotations

import pytest

from cloud.config import StoreConfig
from cloud.errors import StoreError
from cloud.record import Device, Record
from cloud.store import Store
from splitward.errors import ConfigError
from splitward.wire.control import Result, Status

pytestmark = pytest.mark.anyio


def record(sequence: int, *, device: str = "pi-1", stored_at_ns: int = 5, class_index: int = 0) -> Record:
    scores, streams = (0.75, 0.25), {"attacked": 0, "recovered": 0, "fused": 1}
    result = Result("b" * 32, sequence, "m" * 32, class_index, "zero", scores, streams, 1, stored_at_ns)
    return Record("ward", device, 2, result)


@pytest.fixture
async def store(tmp_path):
    opened = Store(StoreConfig(f"sqlite+aiosqlite:///{tmp_path}/cloud.db"))
    await opened.open()
    yield opened
    await opened.close()


async def test_the_first_record_of_a_frame_stays(store):
    await store.add([record(1), record(2)])
    await store.add([record(2, class_index=1), record(3)])
    found = await store.find([record(2).key, record(9).key])
    assert found == {record(2).key: record(2)}
    assert len(await store.results()) == 3


async def test_pages_cover_everything_once_even_within_one_commit(store):
    records = [record(n, stored_at_ns=5 + n // 4) for n in range(10)]
    await store.add(records)
    seen, after = [], "0"
    while page := await store.results(after=after, limit=3):
        seen += page
        after = page[-1].cursor
    assert seen == records


async def test_without_a_cursor_the_last_records_come_in_order(store):
    await store.add([record(n) for n in range(10)])
    assert [item.result.sequence for item in await store.results(limit=3)] == [7, 8, 9]


async def test_results_by_device_and_model(store):
    await store.add([record(1), record(1, device="pi-2")])
    assert [item.device for item in await store.results(device="pi-2")] == ["pi-2"]
    assert len(await store.results(model="m" * 32)) == 2
    assert await store.results(model="x") == []


@pytest.mark.parametrize("after", ["", "x", "-1", "1.a", "1.a.b.c", str(1 << 63)])
async def test_a_cursor_that_is_none_is_refused(store, after):
    with pytest.raises(ValueError):  # noqa: PT011  # int's own message, or ours
        await store.results(after=after)


async def test_devices_by_page(store):
    status = Status("online", queued=1)
    await store.save_devices([Device("ward", f"pi-{n}", n, status if n else None) for n in range(3)])
    assert [item.device for item in await store.devices(after=("ward", "pi-0"))] == ["pi-1", "pi-2"]
    assert (await store.devices(limit=1))[0].status is None


async def test_a_commit_is_durable(store):
    async with store._engine.connect() as connection:
        journal = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar()
        synchronous = (await connection.exec_driver_sql("PRAGMA synchronous")).scalar()
    assert (journal, synchronous) == ("wal", 2)


async def test_a_failing_database_is_an_error_of_ours(tmp_path):
    (tmp_path / "cloud.db").write_bytes(b"not a database" * 100)
    store = Store(StoreConfig(f"sqlite+aiosqlite:///{tmp_path}/cloud.db"))
    with pytest.raises(StoreError, match="not a database"):
        await store.open()
    await store.close()


@pytest.mark.parametrize("url", ["nonsense", "mysql+aiomysql://x/y", "sqlite:///sync.db"])
def test_a_url_of_no_use_is_refused(url):
    with pytest.raises(ConfigError, match=r"store\.url"):
        Store(StoreConfig(url))
