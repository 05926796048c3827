"""What the service keeps: results, the last word of each device, and a bounded table of refused messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from sqlalchemy import Select, Table, delete, event, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import RowMapping, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cloud import tables
from cloud.config import StoreConfig
from cloud.errors import StoreError
from splitward.errors import ConfigError
from splitward.wire.control import Result, Status

Key = tuple[str, str, int]
"""Device, boot (32 hexadecimal digits) and sequence: names a frame for ever."""

MAX_INTEGER = (1 << 63) - 1
"""Largest integer that both databases hold; the wire's are unsigned and reach further."""

_key = (tables.results.c.device, tables.results.c.boot, tables.results.c.sequence)
_order = (tables.results.c.stored_at_ns, *_key)


class Record(msgspec.Struct, frozen=True):
    """A result, and where and when its activation came in."""

    site: str
    device: str
    received_at_ns: int
    result: Result

    @property
    def key(self) -> Key:
        """Name of the frame."""
        return self.device, self.result.boot, self.result.sequence

    @property
    def cursor(self) -> str:
        """Place of the record in the order of storing, for `Store.results`."""
        return ".".join(map(str, (self.result.stored_at_ns, *self.key)))


class Device(msgspec.Struct, frozen=True):
    """When a device was last heard of, and its last status if it sent one."""

    site: str
    device: str
    seen_at_ns: int
    status: Status | None


class DeadLetter(msgspec.Struct, frozen=True):
    """A refused message: `head` is its first bytes in hexadecimal."""

    at_ns: int
    topic: str
    reason: str
    head: str


class Store:
    """SQLAlchemy Core on SQLite or PostgreSQL. Every method raises `StoreError` when the database fails."""

    def __init__(self, config: StoreConfig) -> None:
        self._engine = _make_engine(config.url)
        self._max_dead_letters = config.max_dead_letters
        self._insert: Callable[[Table], sqlite.Insert | postgresql.Insert]
        self._insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert

    async def open(self) -> None:
        """Create what is missing of the tables."""
        async with self._write() as connection:
            await connection.run_sync(tables.metadata.create_all)

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def check(self) -> None:
        """Take and release the database's write lock."""
        async with self._write() as connection:
            await connection.execute(
                delete(tables.results).where(tables.results.c.device == "")
            )  # no device has this name

    async def find(self, keys: Collection[Key]) -> dict[Key, Record]:
        """Stored records of those `keys` that have one."""
        rows = await self._read(select(tables.results).where(tuple_(*_key).in_(list(keys))))
        return {record.key: record for record in map(_record, rows)}

    async def add(self, records: Iterable[Record]) -> None:
        """Keep `records` in one commit; a key that is there already keeps its first record."""
        values = [_row(record) for record in records]
        async with self._write() as connection:
            await connection.execute(self._insert(tables.results).on_conflict_do_nothing(), values)

    async def results(
        self, *, device: str | None = None, model: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[Record]:
        """Records in the order of storing.

        Parameters
        ----------
        device, model : str, optional
            Only those of this device, or of this model id.
        after : str, optional
            A record's `cursor`, or a time in nanoseconds: the first `limit` records after it. Without it, the
            last `limit` records.

        Raises
        ------
        ValueError
            `after` is not a cursor.
        """
        query = select(tables.results).limit(limit)
        if device is not None:
            query = query.where(tables.results.c.device == device)
        if model is not None:
            query = query.where(tables.results.c.model == model)
        if after is not None:
            query = query.where(tuple_(*_order) > tuple_(*_cursor(after)))
            return [_record(row) for row in await self._read(query.order_by(*_order))]
        last = await self._read(query.order_by(*(column.desc() for column in _order)))
        return [_record(row) for row in reversed(last)]

    async def save_devices(self, devices: Iterable[Device]) -> None:
        """Keep the last word of `devices`; a device without a status keeps the one that is there."""
        values = [msgspec.to_builtins(device) for device in devices]
        insert = self._insert(tables.devices)
        upsert = insert.on_conflict_do_update(
            index_elements=[tables.devices.c.site, tables.devices.c.device],
            set_={
                "seen_at_ns": insert.excluded.seen_at_ns,
                "status": func.coalesce(insert.excluded.status, tables.devices.c.status),
            },
        )
        async with self._write() as connection:
            await connection.execute(upsert, values)

    async def devices(self, *, after: tuple[str, str] = ("", ""), limit: int = 100) -> list[Device]:
        """The first `limit` devices by site and name, after `after`."""
        order = (tables.devices.c.site, tables.devices.c.device)
        query = select(tables.devices).where(tuple_(*order) > tuple_(*after)).order_by(*order).limit(limit)
        rows = await self._read(query)
        return [
            Device(**row | {"status": msgspec.convert(row["status"], Status | None)}) for row in map(dict, rows)
        ]

    async def bury(self, letters: Iterable[DeadLetter]) -> None:
        """Keep refused messages, and of all of them only the last `max_dead_letters`."""
        newest = select(func.max(tables.dead_letters.c.number)).scalar_subquery()
        async with self._write() as connection:
            await connection.execute(
                tables.dead_letters.insert(), [msgspec.to_builtins(item) for item in letters]
            )
            surplus = tables.dead_letters.c.number <= newest - self._max_dead_letters
            await connection.execute(delete(tables.dead_letters).where(surplus))

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The last refused messages, newest first."""
        columns = (tables.dead_letters.c[name] for name in DeadLetter.__struct_fields__)
        query = select(*columns).order_by(tables.dead_letters.c.number.desc()).limit(limit)
        return [DeadLetter(**row) for row in await self._read(query)]

    async def _read(self, query: Select[Any]) -> Sequence[RowMapping]:
        async with self._guard(self._engine.connect) as connection:
            rows: Sequence[RowMapping] = (await connection.execute(query)).mappings().all()
            return rows

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[AsyncConnection]:
        async with self._guard(self._engine.begin) as connection:
            yield connection

    @asynccontextmanager
    async def _guard(self, enter: Callable[[], Any]) -> AsyncIterator[AsyncConnection]:
        try:
            async with enter() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            url = self._engine.url.render_as_string(hide_password=True)
            raise StoreError(
                f"store {url}: {error}. Check that it is there, writable, and not full."
            ) from error


def _make_engine(url: str) -> AsyncEngine:
    try:
        dialect = make_url(url).get_backend_name()
        if dialect not in ("sqlite", "postgresql"):
            raise ConfigError(f"store.url: {dialect} is not supported. Use sqlite+aiosqlite or postgresql.")
        engine = create_async_engine(url)
    except (ArgumentError, SQLAlchemyError, ImportError) as error:
        raise ConfigError(f"store.url: {error}. An example: sqlite+aiosqlite:///cloud.db") from error
    if dialect == "sqlite":
        event.listen(engine.sync_engine, "connect", _make_durable)
    return engine


def _make_durable(connection: Any, _record: Any) -> None:
    """WAL lets the API read while a batch commits; FULL makes a commit outlive a power cut."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA busy_timeout = 5000")
    cursor.close()


def _row(record: Record) -> dict[str, Any]:
    values = msgspec.structs.asdict(record.result)
    place = {"site": record.site, "device": record.device, "received_at_ns": record.received_at_ns}
    return values | place


def _record(row: RowMapping) -> Record:
    values = {name: row[name] for name in Result.__struct_fields__} | {"scores": tuple(row["scores"])}
    return Record(row["site"], row["device"], row["received_at_ns"], Result(**values))


def _cursor(text: str) -> tuple[int, str, str, int]:
    """Place after which to go on; a bare time stands before everything that was stored then."""
    parts = text.split(".")
    at_ns = int(parts[0])
    if not 0 <= at_ns <= MAX_INTEGER or len(parts) not in (1, 4):
        raise ValueError(f"cursor {text!r} is not a time in nanoseconds, nor what an answer gave as `next`")
    device, boot, sequence = parts[1:] if len(parts) == 4 else ("", "", "-1")
    return at_ns, device, boot, int(sequence)
