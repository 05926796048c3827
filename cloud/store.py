"""What the service keeps: results, the last word of each device, and a bounded table of refused messages.

`Store` is the connection to the database and what the pipeline and the readers of results need of it. The fleet's
records (`cloud.registry`, `cloud.enrolment`, ...) use the same connection by `read` and `write`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from sqlalchemy import (
    Select,
    Table,
    and_,
    case,
    column,
    delete,
    event,
    func,
    select,
    table,
    text,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import RowMapping, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cloud import tables
from cloud.config import StoreConfig
from cloud.errors import StoreError
from cloud.metrics import CpuClock
from cloud.record import DeadLetter, Device, Key, Label, Page, Record
from cloud.sqlite import SqliteResults, make_durable
from splitward.errors import ConfigError
from splitward.wire.control import Result, Status
from splitward.wire.names import MAX_INTEGER

_key = (tables.results.c.device, tables.results.c.boot, tables.results.c.sequence)
_number, _stored_at_ns = tables.results.c.number, tables.results.c.stored_at_ns
_last_number: dict[str, Select[Any]] = {
    "sqlite": select(column("seq")).select_from(table("sqlite_sequence")).where(column("name") == "results"),
    "postgresql": select(column("last_value")).select_from(table("results_number_seq")),
}
"""The highest number that a result ever had; the result may be deleted."""
_MAX_COMMIT_NS = 10_000_000_000
"""A result may be stamped so long before its commit."""


class Store:
    """SQLAlchemy Core on SQLite or PostgreSQL. Every method raises `StoreError` when the database fails."""

    def __init__(self, config: StoreConfig, clock: CpuClock | None = None) -> None:
        self.url = config.url
        self._engine = _make_engine(config.url)
        self._writer = self._engine.execution_options(writes=True)
        self._single = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._max_dead_letters = config.max_dead_letters
        # Containers on one host's network may have its name and one number each.
        self._holder = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.insert: Callable[[Table], sqlite.Insert | postgresql.Insert]
        self._direct: SqliteResults | None = None
        if self._engine.dialect.name == "postgresql":
            self.insert = postgresql.insert
        else:
            self.insert = sqlite.insert
            self._direct = SqliteResults(str(self._engine.url.database), clock or CpuClock())

    async def open(self) -> None:
        """Bring the tables up to date."""
        from cloud.migrate import upgrade

        try:
            await asyncio.to_thread(upgrade, self.url)
        except (SQLAlchemyError, OSError) as error:
            raise self._error(error) from error

    async def close(self) -> None:
        """Close every connection."""
        if self._direct is not None:
            await self._direct.close()
        await self._engine.dispose()

    async def check(self) -> None:
        """Take and release the database's write lock."""
        async with self.write() as connection:
            await connection.execute(
                delete(tables.results).where(tables.results.c.device == "")
            )  # no device has this name

    async def take_lease(self, name: str, lease_s: float) -> bool:
        """Whether this worker alone does the work `name` from now for `lease_s`; asked again, it goes on."""
        leases, now_ns = tables.leases, time.time_ns()
        row = {"name": name, "holder": self._holder, "until_ns": now_ns + int(lease_s * 1e9)}
        insert = self.insert(leases)
        take = insert.on_conflict_do_update(
            index_elements=[leases.c.name],
            set_={"holder": insert.excluded.holder, "until_ns": insert.excluded.until_ns},
            where=(leases.c.until_ns < now_ns) | (leases.c.holder == self._holder),
        ).returning(leases.c.name)  # PostgreSQL counts no rows of an insert
        async with self.write() as connection:
            return (await connection.execute(take, row)).first() is not None

    # --- the pipeline ----------------------------------------------------------------------------------------

    async def find(self, keys: Collection[Key]) -> dict[Key, Record]:
        """Stored records of those `keys` that have one."""
        rows = await self.read(select(tables.results).where(tuple_(*_key).in_(list(keys))))
        return {record.key: record for record in map(_record, rows)}

    async def add(self, records: Sequence[Record]) -> dict[Key, Record]:
        """Keep `records` in one commit; those that are there already keep their first record, and are returned."""
        if self._direct is not None:
            try:
                return await self._direct.add(records)
            except sqlite3.Error as error:
                raise self._error(error) from error
        insert = self.insert(tables.results).on_conflict_do_nothing().returning(*_key)
        # A statement that is a transaction: between the two, the other workers would wait for this one's next step.
        whole = {"insertmanyvalues_page_size": len(records)}
        async with self._guard(self._single.connect) as connection:
            values = [_row(record) for record in records]
            rows = (await connection.execute(insert, values, execution_options=whole)).all()
        added = {tuple(row) for row in rows}
        there = [record.key for record in records if record.key not in added]
        return await self.find(there) if there else {}

    async def save_devices(self, devices: Iterable[Device]) -> None:
        """Keep the last word of `devices`; a device without a status keeps the one that is there."""
        values = [msgspec.to_builtins(device) for device in devices]
        insert = self.insert(tables.devices)
        upsert = insert.on_conflict_do_update(
            index_elements=[tables.devices.c.site, tables.devices.c.device],
            set_={
                "seen_at_ns": insert.excluded.seen_at_ns,
                "status": func.coalesce(insert.excluded.status, tables.devices.c.status),
            },
        )
        async with self.write() as connection:
            await connection.execute(upsert, values)

    async def bury(self, letters: Iterable[DeadLetter]) -> None:
        """Keep refused messages, and of all of them only the last `max_dead_letters`."""
        newest = select(func.max(tables.dead_letters.c.number)).scalar_subquery()
        async with self.write() as connection:
            await connection.execute(
                tables.dead_letters.insert(), [msgspec.to_builtins(item) for item in letters]
            )
            surplus = tables.dead_letters.c.number <= newest - self._max_dead_letters
            await connection.execute(delete(tables.dead_letters).where(surplus))

    # --- readers ---------------------------------------------------------------------------------------------

    async def page(
        self,
        *,
        device: str | None = None,
        model: str | None = None,
        site: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> Page:
        """Records in the order of storing, which is that of commits. Whoever follows `next` gets each one once.

        Parameters
        ----------
        device, model, site : str, optional
            Only those of this device, model id or site.
        after : str, optional
            The `next` of a page: the first `limit` records after it. Or a time in nanoseconds: those from the first
            one stored then or later. Without it, the last `limit` records.

        Raises
        ------
        ValueError
            `after` is not a cursor.
        """
        query = _results(device=device, model=model, site=site).limit(limit)
        if after is None:
            rows = list(reversed(await self.read(query.order_by(_number.desc()))))
        else:
            rows = list(await self.read(query.where(_number > await self._place(after)).order_by(_number)))
        last = f"{rows[-1]['stored_at_ns']}.{rows[-1]['number']}" if rows else after
        return Page([_record(row) for row in rows], last)

    async def _place(self, after: str) -> int:
        """Number after which to go on; a cursor that this database did not give is read as its time.

        A cursor tells number and time: in a database brought back from a copy, numbers are given once more. That of
        an earlier release tells the time and the key; results stamped before it may have come after it.
        """
        at_ns, number = _cursor(after)
        if number is not None:
            stamp = select(_stored_at_ns).where(_number == number).scalar_subquery()
            last = _last_number[self._engine.dialect.name].scalar_subquery()
            [row] = await self.read(select(stamp.label("stamp"), func.coalesce(last, 0).label("last")))
            if number <= row["last"] and row["stamp"] in (None, at_ns):  # None: deleted since
                return number
        if "." in after:
            at_ns -= _MAX_COMMIT_NS
        oldest = select(_stored_at_ns).order_by(_number).limit(1).scalar_subquery()
        # The sum keeps the planners from walking through the numbers until one is late enough.
        first = select(func.min(_number + 0)).where(_stored_at_ns >= at_ns).scalar_subquery()
        [row] = await self.read(select(case((oldest >= at_ns, 1), else_=first).label("first")))
        return MAX_INTEGER if row["first"] is None else row["first"] - 1

    async def history(
        self, since_ns: int, size: int, *, device: str | None, model: str | None, site: str | None
    ) -> AsyncIterator[list[Record]]:
        """The records stored at `since_ns` or later, by that time, in pages of `size`."""
        query = _results(device=device, model=model, site=site).order_by(_stored_at_ns, _number).limit(size)
        last = (since_ns, 0)
        while rows := await self.read(query.where(tuple_(_stored_at_ns, _number) > tuple_(*last))):
            yield [_record(row) for row in rows]
            last = rows[-1]["stored_at_ns"], rows[-1]["number"]

    async def devices(
        self, *, site: str | None = None, after: tuple[str, str] = ("", ""), limit: int = 100
    ) -> list[Device]:
        """The first `limit` devices by site and name, after `after`."""
        order = (tables.devices.c.site, tables.devices.c.device)
        query = select(tables.devices).where(tuple_(*order) > tuple_(*after)).order_by(*order).limit(limit)
        if site is not None:
            query = query.where(tables.devices.c.site == site)
        rows = await self.read(query)
        return [Device(**row | {"status": _status(row["status"])}) for row in map(dict, rows)]

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The last refused messages, newest first."""
        columns = (tables.dead_letters.c[name] for name in DeadLetter.__struct_fields__)
        query = select(*columns).order_by(tables.dead_letters.c.number.desc()).limit(limit)
        return [DeadLetter(**row) for row in await self.read(query)]

    async def save_labels(self, labels: Sequence[Label], at_ns: int, actor: str) -> None:
        """Keep the true classes of frames; a later label replaces an earlier one."""
        insert = self.insert(tables.labels)
        upsert = insert.on_conflict_do_update(
            index_elements=list(tables.labels.primary_key.columns),
            set_={name: insert.excluded[name] for name in ("class_index", "at_ns", "actor")},
        )
        rows = [msgspec.to_builtins(label) | {"at_ns": at_ns, "actor": actor} for label in labels]
        async with self.write() as connection:
            await connection.execute(upsert, rows)

    async def accuracy(self) -> list[dict[str, Any]]:
        """For each model: how many of its results have a label, and how many of those the decision got right."""
        results, labels = tables.results.c, tables.labels.c
        right = func.sum(case((results.class_index == labels.class_index, 1), else_=0))
        same = and_(
            results.device == labels.device, results.boot == labels.boot, results.sequence == labels.sequence
        )
        query = (
            select(results.model, func.count().label("labelled"), right.label("right"))
            .join_from(tables.results, tables.labels, same)
            .group_by(results.model)
            .order_by(results.model)
        )
        return [dict(row) for row in await self.read(query)]

    async def forget(self, before_ns: int, limit: int = 5000) -> int:
        """Delete up to `limit` of the oldest results stored before `before_ns`, and their labels; how many."""
        oldest = select(*_key).where(_stored_at_ns < before_ns).order_by(_stored_at_ns).limit(limit)
        keys = [tuple(row.values()) for row in await self.read(oldest)]
        for first in range(0, len(keys), 500):
            some = keys[first : first + 500]
            async with self.write() as connection:
                label = tuple_(*(tables.labels.c[name] for name in ("device", "boot", "sequence")))
                await connection.execute(delete(tables.labels).where(label.in_(some)))
                await connection.execute(delete(tables.results).where(tuple_(*_key).in_(some)))
        return len(keys)

    # --- for all ---------------------------------------------------------------------------------------------

    async def read(self, query: Select[Any]) -> Sequence[RowMapping]:
        """Rows of `query`."""
        async with self._guard(self._engine.connect) as connection:
            rows: Sequence[RowMapping] = (await connection.execute(query)).mappings().all()
            return rows

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction, committed when the block ends well."""
        async with self._guard(self._writer.begin) as connection:
            yield connection

    @asynccontextmanager
    async def _guard(self, enter: Callable[[], Any]) -> AsyncIterator[AsyncConnection]:
        try:
            async with enter() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> StoreError:
        url = self._engine.url.render_as_string(hide_password=True)
        return StoreError(f"store {url}: {error}. Check that it is there, writable, and not full.")


async def lock_table(connection: AsyncConnection, table: Table) -> None:
    """Nobody else writes to `table` until the transaction of `connection` ends."""
    if connection.dialect.name == "postgresql":  # SQLite's transactions that write take turns anyway
        await connection.execute(text(f"LOCK TABLE {table.name} IN EXCLUSIVE MODE"))


def _make_engine(url: str) -> AsyncEngine:
    try:
        parsed = make_url(url)
        dialect = parsed.get_backend_name()
        if dialect not in ("sqlite", "postgresql"):
            raise ConfigError(
                f"store.url: {dialect} is not supported. Use sqlite+aiosqlite or postgresql+psycopg."
            )
        if dialect == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise ConfigError("store.url: a database in memory forgets its results. Name a file.")
        engine = create_async_engine(url, pool_pre_ping=dialect == "postgresql")
    except (ArgumentError, SQLAlchemyError, ImportError) as error:
        raise ConfigError(f"store.url: {error}. An example: sqlite+aiosqlite:///cloud.db") from error
    if dialect == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare)
        event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # `_begin` begins
    make_durable(connection)


def _begin(connection: Any) -> None:
    """A transaction that reads first and then writes would fail where another one wrote in between."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _row(record: Record) -> dict[str, Any]:
    values = msgspec.structs.asdict(record.result)
    place = {"site": record.site, "device": record.device, "received_at_ns": record.received_at_ns}
    return values | place | {"checksum": record.checksum}


def _record(row: RowMapping) -> Record:
    values = {name: row[name] for name in Result.__struct_fields__} | {"scores": tuple(row["scores"])}
    return Record(row["site"], row["device"], row["received_at_ns"], Result(**values), row["checksum"])


def _status(stored: Any) -> Status | None:
    """The status that was kept; None of one that an earlier release took and this one would refuse."""
    try:
        return msgspec.convert(stored, Status | None)
    except msgspec.ValidationError:
        return None


def _results(**wanted: str | None) -> Select[Any]:
    """Results whose columns have the wanted values; None wants none."""
    query = select(tables.results)
    for name, value in wanted.items():
        if value is not None:
            query = query.where(tables.results.c[name] == value)
    return query


def _cursor(text: str) -> tuple[int, int | None]:
    """Time in a cursor, and the number if it has one: time, time and number, or an earlier release's time and key."""
    parts = text.split(".")
    at_ns, last = int(parts[0]), int(parts[-1])
    if len(parts) not in (1, 2, 4) or not 0 <= at_ns <= MAX_INTEGER or not 0 <= last <= MAX_INTEGER:
        raise ValueError(f"cursor {text!r} is not a time in nanoseconds, nor what an answer gave as `next`")
    return at_ns, last if len(parts) == 2 else None
