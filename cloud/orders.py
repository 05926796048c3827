"""Orders to devices, and what became of them.

What is to be said to a device is on its order in the store before it is said, and marked there after: whatever ends the
work in its midst, the next one says it again, under the same id.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, exists, func, or_, select, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud import audit, tables
from cloud.authority import Authority
from cloud.config import FleetConfig
from cloud.errors import StoreError
from cloud.metrics import Metrics
from cloud.record import Order
from cloud.store import Store
from cloud.transport import Transport
from splitward.wire import topics
from splitward.wire.control import Outcome
from splitward.wire.orders import Announcement, Command, encode_order

log = logging.getLogger(__name__)

BATCH = 100
"""Orders that are made, sent or withdrawn at once, and outcomes in one commit."""
RESEND_S = 60.0
"""Pause before an order without an answer is sent again; each is as long as all before together."""
MAX_OUTCOMES = 10_000
OPEN = ("sent", "accepted")
BAD = ("refused", "rolled_back", "failed")

Row = Mapping[str, Any]


class Orders:
    """Keeps and sends orders, and notes their outcomes."""

    def __init__(
        self,
        store: Store,
        transport: Transport,
        authority: Authority,
        config: FleetConfig,
        address: str,
        metrics: Metrics,
    ) -> None:
        self._store, self._transport, self._authority = store, transport, authority
        self._ticket_s = config.ticket_s
        self._address = config.public_url.rstrip("/") or address
        self._metrics = metrics
        self._outcomes: deque[tuple[str, str, Outcome]] = deque(maxlen=MAX_OUTCOMES)

    @property
    def connected(self) -> bool:
        """Whether there is a broker to give orders to."""
        return self._transport.connected

    def note_outcome(self, site: str, device: str, outcome: Outcome) -> None:
        """A device tells what became of an order; written within a second."""
        self._outcomes.append((site, device, outcome))

    async def command(self, site: str, device: str, name: str, arguments: dict[str, Any], actor: str) -> str:
        """Send a command; its order's id. `TransportError` without a broker: it is not sent later."""
        order = make_order(site, device, "command", name, arguments=arguments, published_at_ns=time.time_ns())
        async with self._store.write() as connection:
            (order,) = await insert(connection, [order])
            await audit.record(connection, actor, f"order.{name}", f"{site}/{device}", id=order.id)
        self._publish(order)
        return order.id

    async def write_outcomes(self) -> None:
        """Write what devices said; a later state of an order never gives way to `accepted`."""
        while self._outcomes:
            some = [self._outcomes.popleft() for _ in range(min(BATCH, len(self._outcomes)))]
            try:
                await self._write(some)
            except StoreError:
                self._outcomes.extendleft(reversed(some))
                raise

    async def _write(self, outcomes: Sequence[tuple[str, str, Outcome]]) -> None:
        """Write them in one commit; what the store can never hold is dropped, and holds up nothing else."""
        # In one order: two workers that heard the same would lock each other out.
        ordered = sorted(outcomes, key=lambda one: one[2].of)
        try:
            async with self._store.write() as connection:
                for one in ordered:
                    await connection.execute(_note(*one))
        except StoreError as error:
            if not isinstance(error.__cause__, DataError):
                raise
            if len(outcomes) > 1:
                for one in ordered:
                    await self._write([one])
                return
            self._metrics.failures.labels("rollout").inc()
            log.warning("an outcome is dropped: %s", error)

    async def due(self, which: ColumnElement[bool], kind: str) -> Sequence[RowMapping]:
        """Orders of roll-outs to be published: for the first time, again without an answer, or as tickets end."""
        orders, now_ns = tables.orders.c, time.time_ns()
        since_ns = now_ns - orders.published_at_ns
        again = (since_ns > int(RESEND_S * 1e9)) & (since_ns > orders.published_at_ns - orders.sent_at_ns)
        ends = since_ns > int(self._ticket_s / 2 * 1e9)
        query = select(tables.orders).where(
            which,
            orders.kind == kind,
            orders.state == "sent",
            or_(orders.published_at_ns.is_(None), again, (orders.kind == "bundle") & ends),
            ~followed(bundles_only=True),
        )
        return await self._store.read(query.order_by(orders.serial).limit(BATCH))

    async def send(
        self, connection: AsyncConnection, due: Sequence[RowMapping], bundle: Row | None = None
    ) -> None:
        """Publish orders that were kept earlier, and mark them."""
        for row in due:
            self._publish(Order(**row), bundle)
        await _mark(connection, due, "published_at_ns")

    async def withdraw(self, connection: AsyncConnection, announced: Sequence[RowMapping]) -> None:
        """Take announcements back from the broker, and mark them."""
        for row in announced:
            self._transport.publish(topics.bundle(row["site"], row["device"]), b"", retain=True)
        await _mark(connection, announced, "withdrawn_at_ns")

    def _publish(self, order: Order, bundle: Row | None = None) -> None:
        """Give the broker an order, the announcement of `bundle` where there is one; `TransportError` without one."""
        site, device = order.site, order.device
        if bundle is None:
            topic = topics.command(site, device)
            message: Announcement | Command = msgspec.convert(order, Command, from_attributes=True)
        else:
            topic = topics.bundle(site, device)
            ticket = self._authority.ticket(order.model, device, int(time.time() + self._ticket_s))
            message = Announcement(
                id=order.id,
                serial=order.serial,
                site=site,
                device=device,
                model=order.model,
                url=f"{self._address}/v1/bundles/{order.model}/file?ticket={ticket}",
                sha256=bundle["sha256"],
                size=bundle["size"],
                allow_older=order.arguments.get("allow_older", False),
            )
        payload = encode_order(message, self._authority.order_key)
        self._transport.publish(topic, payload, retain=bundle is not None)


def followed(*, bundles_only: bool) -> ColumnElement[bool]:
    """Whether the device has had a later bundle, or command to go back, than the order at hand."""
    orders, later = tables.orders.c, tables.orders.alias("later").c
    kind = later.kind == "bundle"
    return exists().where(
        later.device == orders.device,
        later.serial > orders.serial,
        later.site == orders.site,
        kind if bundles_only else kind | (later.name == "rollback"),
    )


def _note(site: str, device: str, outcome: Outcome) -> Any:
    """The statement that writes an outcome, of the device's own order."""
    orders = tables.orders
    return (
        update(orders)
        .where(
            orders.c.id == outcome.of,
            orders.c.site == site,
            orders.c.device == device,
            orders.c.state.in_(OPEN),
        )
        .values(
            state=outcome.state,
            reason=outcome.reason[:64],
            message=outcome.message[:1000],
            answered_at_ns=time.time_ns(),
        )
    )


def make_order(site: str, device: str, kind: str, name: str, **more: Any) -> Order:
    """An order with an id of its own; `more` are other fields of `Order`."""
    identifier, now_ns = secrets.token_hex(16), time.time_ns()
    return Order(id=identifier, site=site, device=device, kind=kind, name=name, sent_at_ns=now_ns, **more)


async def insert(connection: AsyncConnection, orders: Iterable[Order]) -> list[Order]:
    """Keep new orders; each gets a serial above every earlier one's, and above those of a store that was lost."""
    serial, device = tables.orders.c.serial, tables.orders.c.device
    new = list(orders)
    if not new:
        return []
    query = select(device, func.max(serial)).where(device.in_({one.device for one in new})).group_by(device)
    last: dict[str, int] = {row[0]: row[1] for row in await connection.execute(query)}
    for at, order in enumerate(new):
        last[order.device] = max(order.sent_at_ns, last.get(order.device, 0) + 1)
        new[at] = msgspec.structs.replace(order, serial=last[order.device])
    await connection.execute(tables.orders.insert(), [msgspec.structs.asdict(one) for one in new])
    return new


async def _mark(connection: AsyncConnection, rows: Sequence[RowMapping], when: str) -> None:
    """Note on orders that `when` is now."""
    change = update(tables.orders).where(tables.orders.c.id.in_([row["id"] for row in rows]))
    await connection.execute(change.values({when: time.time_ns()}))
