"""Who did what: an append-only trail, each entry chained to the one before by its hash.

A changed, removed or inserted entry breaks the chain from there on. Whoever can write the whole database can make a
new chain: keep the last digest elsewhere (`GET /v1/audit` gives it) to be able to tell.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud import tables
from cloud.store import Store, lock_table

START = "0" * 64
PAGE = 1000


class Entry(msgspec.Struct, frozen=True):
    """One thing that was done; `detail` is JSON."""

    number: int
    at_ns: int
    actor: str
    action: str
    target: str
    detail: str
    previous: str
    digest: str


def digest_entry(
    number: int, at_ns: int, actor: str, action: str, target: str, detail: str, previous: str
) -> str:
    """SHA-256 over the entry and the digest of the one before."""
    fields = msgspec.json.encode([number, at_ns, actor, action, target, detail, previous])
    return hashlib.sha256(fields).hexdigest()


async def record(connection: AsyncConnection, actor: str, action: str, target: str, **detail: Any) -> None:
    """Add an entry within the caller's transaction: what it tells of and the entry are kept, or neither."""
    await lock_table(connection, tables.audit)
    last = (
        await connection.execute(
            select(tables.audit.c.number, tables.audit.c.digest).order_by(tables.audit.c.number.desc()).limit(1)
        )
    ).first()
    number, previous = (last.number + 1, last.digest) if last else (1, START)
    fields = (
        number,
        time.time_ns(),
        actor,
        action,
        target,
        msgspec.json.encode(detail, order="sorted").decode(),
    )
    entry = Entry(*fields, previous, digest_entry(*fields, previous))
    await connection.execute(tables.audit.insert(), msgspec.structs.asdict(entry))


async def entries(store: Store, after: int = 0, limit: int = 100) -> list[Entry]:
    """The first `limit` entries after number `after`."""
    query = (
        select(tables.audit).where(tables.audit.c.number > after).order_by(tables.audit.c.number).limit(limit)
    )
    return [Entry(**row) for row in await store.read(query)]


async def verify(store: Store) -> int | None:
    """Number of the first entry that does not follow from the ones before; None when the chain is whole."""
    previous, number = START, 0
    while page := await entries(store, number, PAGE):
        for entry in page:
            number += 1
            fields = (entry.number, entry.at_ns, entry.actor, entry.action, entry.target, entry.detail)
            if (
                entry.number != number
                or entry.previous != previous
                or digest_entry(*fields, previous) != entry.digest
            ):
                return number
            previous = entry.digest
    return None
