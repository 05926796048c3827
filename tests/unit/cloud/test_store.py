from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from itertools import count

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import column, func, insert, inspect, select, table, text
from sqlalchemy.engine.default import DefaultDialect

from cloud import audit, tables
from cloud.config import StoreConfig
from cloud.errors import StoreError
from cloud.migrate import current_revision, transaction, upgrade
from cloud.record import DeadLetter, Device, Label, Record
from cloud.retention import delete_old
from cloud.store import Store, _row
from splitward.errors import ConfigError
from splitward.wire.control import Result, Status

pytestmark = pytest.mark.anyio


def record(sequence: int, *, device: str = "pi-1", stored_at_ns: int = 5, class_index: int = 0) -> Record:
    scores, streams = (0.75, 0.25), {"attacked": 0, "recovered": 0, "fused": 1}
    result = Result("b" * 32, sequence, "m" * 32, class_index, "zero", scores, streams, 1, stored_at_ns)
    return Record("ward", device, 2, result)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    """Address of an empty database of each kind: the tests are the same."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres_url")
    return f"sqlite+aiosqlite:///{tmp_path}/cloud.db"


@pytest.fixture
async def store(url):
    opened = Store(StoreConfig(url))
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def other(url, store):  # the tables are there
    """The store as another worker has it."""
    opened = Store(StoreConfig(url))
    yield opened
    await opened.close()


def sequences(records: list[Record]) -> list[int]:
    return [one.result.sequence for one in records]


async def follow(store: Store, after: str | None, limit: int = 100) -> tuple[list[Record], str | None]:
    """What a poller gets until there is no more, and where it stands then."""
    seen: list[Record] = []
    while (page := await store.page(after=after, limit=limit)).results:
        seen += page.results
        after = page.next
    return seen, page.next


async def test_the_first_record_of_a_frame_stays(store):
    await store.add([record(1), record(2)])
    assert await store.add([record(2, class_index=1), record(3)]) == {record(2).key: record(2)}
    found = await store.find([record(2).key, record(9).key])
    assert found == {record(2).key: record(2)}
    assert len((await store.page()).results) == 3


async def test_pages_cover_everything_once_even_within_one_commit(store):
    records = [record(n, stored_at_ns=5 + n // 4) for n in range(10)]
    await store.add(records)
    assert (await follow(store, "0", limit=3))[0] == records


async def test_without_a_cursor_the_last_records_come_in_order(store):
    await store.add([record(n) for n in range(10)])
    page = await store.page(limit=3)
    assert sequences(page.results) == [7, 8, 9]
    await store.add([record(10, stored_at_ns=1)])
    assert sequences((await follow(store, page.next))[0]) == [10]


async def test_a_poller_gets_what_another_worker_stamped_earlier_and_committed_later(store, other):
    await store.add([record(1, stored_at_ns=100)])
    seen, after = await follow(store, "0")
    await other.add([record(2, stored_at_ns=50)])
    await store.add([record(3, stored_at_ns=200)])
    assert sequences(seen + (await follow(store, after))[0]) == [1, 2, 3]


async def test_a_poller_gets_a_commit_that_began_first_and_ended_last(postgres_url):
    """PostgreSQL alone lets two insert at once."""
    one, two = Store(StoreConfig(postgres_url)), Store(StoreConfig(postgres_url))
    await one.open()
    waiting = select(func.count().label("n")).select_from(table("pg_locks")).where(~column("granted"))
    async with one.write() as connection:
        await connection.execute(one.insert(tables.results), [_row(record(1))])
        second = asyncio.create_task(two.add([record(2)]))
        while not second.done() and not (await one.read(waiting))[0]["n"]:
            await asyncio.sleep(0.01)
        seen, after = await follow(one, "0")
    await second
    assert sorted(sequences(seen + (await follow(one, after))[0])) == [1, 2]
    await one.close()
    await two.close()


async def test_a_poller_gets_what_is_stored_while_the_clock_is_set_back(store):
    seen, after = [], "0"
    for number, at_ns in enumerate((700 * 10**9, 100 * 10**9, 100 * 10**9, 701 * 10**9)):
        await store.add([record(number, stored_at_ns=at_ns)])
        some, after = await follow(store, after)
        seen += some
    assert sequences(seen) == [0, 1, 2, 3]


async def test_the_number_of_a_deleted_result_is_not_given_again(store):
    await store.add([record(n, stored_at_ns=n) for n in (1, 3, 2)])  # the newest is not the last by its time
    _, after = await follow(store, "0")
    assert await store.forget(3) == 2
    assert await follow(store, after) == ([], after)
    assert await store.forget(10) == 1
    await store.add([record(n, stored_at_ns=n) for n in (4, 5)])
    seen, after = await follow(store, after)
    assert sequences(seen) == [4, 5]
    assert await store.forget(10) == 2
    await store.add([record(6, stored_at_ns=1)])
    assert sequences((await follow(store, after))[0]) == [6]


@pytest.mark.parametrize("seed", range(3))
async def test_a_poller_beside_many_writers_gets_every_result_once_and_in_order(url, store, seed):
    draw = random.Random(seed)
    workers = [Store(StoreConfig(url)) for _ in range(3)]
    seen, after, sequence = [], "0", count(1)

    async def write(worker: Store, batches: list[list[Record]]) -> None:
        for batch in batches:
            while True:
                with contextlib.suppress(StoreError):  # it waited for too long: again, as the pipeline does
                    await worker.add(batch)
                    break

    for _ in range(6):
        batches = [
            [record(next(sequence), stored_at_ns=draw.randrange(1000)) for _ in range(5)] for _ in range(12)
        ]
        again = [draw.sample(batch, 5) for batch in batches[:4]]  # frames that another worker got too
        shares = [batches[:4] + batches[8:10], again, batches[4:8] + batches[10:]]
        writers = asyncio.gather(*(write(worker, share) for worker, share in zip(workers, shares, strict=True)))
        while not writers.done():
            page = await store.page(after=after, limit=draw.randrange(1, 12))
            seen += page.results
            after = page.next
        await writers
        some, after = await follow(store, after, limit=draw.randrange(1, 12))
        seen += some
        await store.forget(draw.choice((0, 500, 1001)))
    assert sorted(sequences(seen)) == list(range(1, next(sequence)))
    await store.add([record(next(sequence), stored_at_ns=draw.randrange(1000)) for _ in range(5)])
    seen += (await follow(store, after))[0]
    left, _ = await follow(store, "0", limit=7)
    assert left == [one for one in seen if one in left]
    for worker in workers:
        await worker.close()


async def test_a_time_stands_before_the_first_result_stored_then_or_later(store):
    await store.add([record(n, stored_at_ns=at_ns) for n, at_ns in enumerate((20, 40, 30, 50))])
    for at_ns, wanted in ((0, [0, 1, 2, 3]), (20, [0, 1, 2, 3]), (21, [1, 2, 3]), (41, [3]), (51, [])):
        assert sequences((await store.page(after=str(at_ns))).results) == wanted
    empty = await store.page(after="51")
    await store.add([record(4, stored_at_ns=60)])
    assert sequences((await follow(store, empty.next))[0]) == [4]


async def test_a_cursor_of_an_earlier_release_loses_nothing(store, other):
    second = 10**9
    await store.add([record(1, stored_at_ns=100 * second)])
    await store.add([record(2, stored_at_ns=200 * second)])
    await other.add([record(3, stored_at_ns=199 * second)])
    await store.add([record(4, stored_at_ns=201 * second)])
    cursor = f"{200 * second}.pi-1.{'b' * 32}.2"
    assert sequences((await follow(store, cursor))[0]) == [2, 3, 4]


async def test_a_cursor_from_before_a_database_was_brought_back_loses_nothing(store):
    second = 10**9
    await store.add([record(n, stored_at_ns=n * second) for n in (100, 101, 102)])
    _, after = await follow(store, "0")
    clean = ["DELETE FROM results", "DELETE FROM sqlite_sequence"]
    async with store.write() as connection:
        for statement in clean if store.url.startswith("sqlite") else ["TRUNCATE results RESTART IDENTITY"]:
            await connection.execute(text(statement))
    assert await follow(store, after) == ([], after)
    await store.add([record(n, stored_at_ns=n * second) for n in (103, 104)])
    assert sequences((await follow(store, after))[0]) == [103, 104]  # its number is not given yet
    await store.add([record(n, stored_at_ns=n * second) for n in (105, 106)])
    assert sequences((await follow(store, after))[0]) == [103, 104, 105, 106]  # another result has it


async def test_the_history_goes_by_time(store):
    await store.add([record(n, stored_at_ns=at_ns) for n, at_ns in enumerate((30, 10, 20, 20))])
    pages = [page async for page in store.history(15, 2, device=None, model=None, site=None)]
    assert list(map(sequences, pages)) == [[2, 3], [0]]


async def test_results_by_device_and_model(store):
    await store.add([record(1), record(1, device="pi-2")])
    assert [item.device for item in (await store.page(device="pi-2")).results] == ["pi-2"]
    assert len((await store.page(model="m" * 32)).results) == 2
    assert (await store.page(model="x")).results == []


@pytest.mark.parametrize("after", ["", "x", "-1", "1.a", "1.a.b.c", "1.2.3", "1.-1", str(1 << 63)])
async def test_a_cursor_that_is_none_is_refused(store, after):
    with pytest.raises(ValueError):  # noqa: PT011  # int's own message, or ours
        await store.page(after=after)


async def test_devices_by_page(store):
    status = Status("online", queued=1)
    await store.save_devices([Device("ward", f"pi-{n}", n, status if n else None) for n in range(3)])
    assert [item.device for item in await store.devices(after=("ward", "pi-0"))] == ["pi-1", "pi-2"]
    assert (await store.devices(limit=1))[0].status is None


async def test_a_commit_is_durable(tmp_path):
    store = Store(StoreConfig(f"sqlite+aiosqlite:///{tmp_path}/cloud.db"))
    await store.open()
    async with store._engine.connect() as connection:
        journal = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar()
        synchronous = (await connection.exec_driver_sql("PRAGMA synchronous")).scalar()
    assert (journal, synchronous) == ("wal", 2)
    await store.close()


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


async def test_the_migrations_make_the_tables_that_the_code_knows(store):
    def differences(connection):
        return compare_metadata(MigrationContext.configure(connection), tables.metadata)

    async with store._engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await store.open()  # once more changes nothing


async def make_earlier_form(url: str, revision: str, records: list[Record], without: set[str]) -> None:
    """A database of an earlier revision, whose results are `without` some of the columns."""
    await asyncio.to_thread(upgrade, url, revision)
    columns = [column(one.name, one.type) for one in tables.results.columns if one.name not in without]
    rows = [{one.name: _row(item)[one.name] for one in columns} for item in records]
    store = Store(StoreConfig(url))
    async with store.write() as connection:
        await connection.execute(insert(table("results", *columns)), rows)
    await store.close()


async def make_first_form(url: str) -> None:
    """A database of the first form, which knew no migrations, with one result."""
    await make_earlier_form(url, "0001", [record(7)], {"number", "checksum"})
    with transaction(url) as connection:
        connection.execute(text("DROP TABLE alembic_version"))


async def test_results_are_numbered_in_the_order_that_they_were_read_in(url):
    records = [record(n, stored_at_ns=n // 3) for n in range(20)]
    await make_earlier_form(url, "0004", records[::-1], {"number"})
    store = Store(StoreConfig(url))
    await store.open()
    assert (await follow(store, "0", limit=7))[0] == records
    assert (await store.page(after=f"3.pi-1.{'b' * 32}.10")).results == records
    await store.add([record(20)])
    assert sequences((await store.page(limit=2)).results) == [19, 20]
    await store.close()


async def test_a_database_of_the_first_form_keeps_its_results(url):
    await make_first_form(url)
    store = Store(StoreConfig(url))
    await store.open()
    assert (await store.page()).results == [record(7)]
    await store.close()


class CutError(Exception):
    """A migration gets no further."""


def form(url: str) -> tuple[set[str], str | None]:
    """Tables of a database, and its revision."""
    with transaction(url) as connection:
        return set(inspect(connection).get_table_names()), current_revision(connection)


async def test_a_migration_that_is_cut_off_at_any_statement_has_done_nothing(url, monkeypatch):
    await make_first_form(url)
    execute, before = DefaultDialect.do_execute, form(url)
    for allowed in count():
        left = iter(range(allowed))

        def do_execute(*arguments, left=left, **more):
            if next(left, None) is None:
                raise CutError
            return execute(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(DefaultDialect, "do_execute", do_execute)
            try:
                upgrade(url)
                break
            except CutError:
                pass  # one statement further in the next round
        assert form(url) == before
    assert allowed > 20
    store = Store(StoreConfig(url))
    await store.open()
    assert (await store.page()).results == [record(7)]
    await store.close()


async def test_a_database_of_a_newer_release_is_left_alone(store, url):
    async with store.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"revision 9999, which a newer release made"):
        await store.open()


async def test_workers_that_start_together_migrate_once(url):
    await make_first_form(url)
    program = f"from cloud.migrate import upgrade; upgrade({url!r})"
    workers = [await asyncio.create_subprocess_exec(sys.executable, "-c", program) for _ in range(3)]
    assert [await worker.wait() for worker in workers] == [0, 0, 0]


async def test_old_results_and_their_labels_are_forgotten(store):
    day = 86_400_000_000_000
    await store.add([record(n, stored_at_ns=n * day) for n in range(1, 11)])
    await store.save_labels([Label("pi-1", "b" * 32, n, 0) for n in (2, 9)], 1, "test")
    assert await delete_old(store, 5, 10 * day) == 4
    assert sequences((await store.page()).results) == [5, 6, 7, 8, 9, 10]
    assert [one["labelled"] for one in await store.accuracy()] == [1]
    assert await delete_old(store, 0, 10 * day) == 0


async def test_the_audit_trail_is_chained_even_when_entries_come_at_once(store):
    async def act(number: int) -> None:
        async with store.write() as connection:
            await audit.record(connection, "test", "act", str(number), n=number)

    await asyncio.gather(*map(act, range(8)))
    assert [one.number for one in await audit.entries(store)] == list(range(1, 9))
    assert await audit.verify(store) is None


async def test_a_lease_is_one_holders_until_it_ends(store, url):
    """Two stores of one process stand for two workers whose hosts and processes bear the same name and number."""
    other = Store(StoreConfig(url))
    assert await store.take_lease("work", 60.0)
    assert not await other.take_lease("work", 60.0)
    assert await store.take_lease("work", 0.0)
    assert await other.take_lease("work", 60.0)
    await other.close()


async def test_orders_given_twice_become_one_of_their_rollout(url):
    await asyncio.to_thread(upgrade, url, "0004")
    order = {"site": "ward", "device": "pi-1", "kind": "bundle", "name": "announcement", "model": "m" * 32}
    order |= {"previous": "", "canary": False, "arguments": {}, "state": "sent", "reason": "", "message": ""}
    rows = [
        order | {"id": str(serial), "serial": serial, "sent_at_ns": serial, "rollout": "r" * 32}
        for serial in (1, 2)
    ]
    names = [column(one.name, one.type) for one in tables.orders.columns if one.name in rows[0]]
    store = Store(StoreConfig(url))
    async with store.write() as connection:
        await connection.execute(insert(table("orders", *names)), rows)
    await store.open()
    found = await store.read(tables.orders.select().order_by(tables.orders.c.serial))
    assert [(one["rollout"], one["published_at_ns"]) for one in found] == [(None, 1), ("r" * 32, 2)]
    await store.close()


async def test_a_status_that_was_kept_and_is_refused_by_now_is_none(store):
    async with store.write() as connection:
        row = {"site": "ward", "device": "pi-1", "seen_at_ns": 1}
        status = {"type": "status", "state": "online", "queued": 10**400}
        await connection.execute(tables.devices.insert(), row | {"status": status})
    assert await store.devices() == [Device("ward", "pi-1", 1, None)]


async def test_dead_letters_are_bounded(url):
    store = Store(StoreConfig(url, max_dead_letters=3))
    await store.open()
    for number in range(5):
        await store.bury([DeadLetter(number, "topic", "bad_crc", "")])
    assert [one.at_ns for one in await store.dead_letters()] == [4, 3, 2]
    await store.close()
