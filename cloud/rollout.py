"""Orders to devices, and staged roll-outs of a bundle: a canary share first, then the rest, halted when it fails.

One worker at a time drives the roll-outs, by a lease in the store; any worker may note outcomes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import deque
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud import audit, tables
from cloud.authority import Authority
from cloud.config import FleetConfig
from cloud.errors import CloudError
from cloud.metrics import RECENT_NS, Metrics
from cloud.problem import Problem
from cloud.registry import Registry
from cloud.store import Store
from cloud.transport import Transport
from splitward.wire import topics
from splitward.wire.control import Outcome
from splitward.wire.orders import Announcement, Command, Order, encode_order

log = logging.getLogger(__name__)

PERIOD_S = 1.0
LEASE_S = 15.0
MAX_OUTCOMES = 10_000
RUNNING = ("canary", "rolling")
STATES = (*RUNNING, "done", "halted")
OPEN = ("sent", "accepted")
BAD = ("refused", "rolled_back", "failed")


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a bundle is rolled out.

    Attributes
    ----------
    site : str, optional
        Only devices of this site.
    canary_share : float
        Share of the devices that get it first.
    max_failure_rate : float
        The roll-out halts when a greater share of its answered orders failed.
    min_outcomes : int
        Orders answered before the rate counts.
    patience_s : float
        An order without an answer for so long counts as failed.
    roll_back : bool
        Tell the devices that took it to go back, when it halts.
    """

    model: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    site: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")] | None = None
    canary_share: Annotated[float, Meta(gt=0, le=1)] = 0.1
    max_failure_rate: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    min_outcomes: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    patience_s: Annotated[float, Meta(gt=0, le=30 * 86_400)] = 3600.0
    allow_older: bool = False
    roll_back: bool = True


class Rollouts:
    """Sends orders, notes their outcomes, and drives roll-outs."""

    def __init__(
        self,
        store: Store,
        transport: Transport,
        authority: Authority,
        registry: Registry,
        config: FleetConfig,
        address: str,
        metrics: Metrics,
    ) -> None:
        self._store, self._transport, self._authority, self._registry = store, transport, authority, registry
        self._ticket_s = config.ticket_s
        self._address = config.public_url.rstrip("/") or address
        self._metrics = metrics
        self._outcomes: deque[tuple[str, str, Outcome]] = deque(maxlen=MAX_OUTCOMES)

    def note_outcome(self, site: str, device: str, outcome: Outcome) -> None:
        """A device tells what became of an order; written within a second."""
        self._outcomes.append((site, device, outcome))

    async def keep(self) -> None:
        """Note outcomes and drive the roll-outs, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.write_outcomes()
                if await self._store.take_lease("rollouts", LEASE_S):
                    await self.step()
                await self.count()
            except CloudError as error:
                self._metrics.failures.labels("rollout").inc()
                log.warning("roll-outs: %s", error)

    async def create(self, plan: Plan, actor: str) -> dict[str, Any]:
        """Begin a roll-out; `Problem` 404 without the bundle, 409 while one runs at the same site."""
        await self._registry.find(plan.model)
        rollouts, now_ns = tables.rollouts, time.time_ns()
        row = msgspec.structs.asdict(plan) | {
            "id": secrets.token_hex(16),
            "state": "canary",
            "reason": "",
            "created_at_ns": now_ns,
            "changed_at_ns": now_ns,
            "actor": actor,
        }
        async with self._store.write() as connection:
            running = select(rollouts.c.id).where(rollouts.c.state.in_(RUNNING))
            if plan.site is not None:
                running = running.where((rollouts.c.site == plan.site) | rollouts.c.site.is_(None))
            if (await connection.execute(running)).first():
                raise Problem(409, "running", "another roll-out to these devices runs. Halt it first.")
            await connection.execute(rollouts.insert(), row)
            await audit.record(connection, actor, "rollout.create", row["id"], model=plan.model, site=plan.site)
        return row

    async def latest(self, limit: int = 100) -> list[dict[str, Any]]:
        """The last roll-outs, each with its orders counted by state."""
        rollouts, orders = tables.rollouts, tables.orders.c
        rows = await self._store.read(select(rollouts).order_by(rollouts.c.created_at_ns.desc()).limit(limit))
        counted = await self._store.read(
            select(orders.rollout, orders.state, func.count().label("count"))
            .where(orders.rollout.in_([row["id"] for row in rows]))
            .group_by(orders.rollout, orders.state)
        )
        counts: dict[str, dict[str, int]] = {}
        for one in counted:
            counts.setdefault(one["rollout"], {})[one["state"]] = one["count"]
        return [dict(row) | {"orders": counts.get(row["id"], {})} for row in rows]

    async def halt(self, rollout: str, reason: str, actor: str) -> None:
        """Stop a roll-out and, if its plan says so, take it back; `Problem` 404 when it does not run."""
        rows = await self._store.read(
            select(tables.rollouts).where(tables.rollouts.c.id == rollout, tables.rollouts.c.state.in_(RUNNING))
        )
        if not rows:
            raise Problem(404, "not_running", f"no roll-out {rollout} runs.")
        await self._halt(dict(rows[0]), reason, actor)

    async def command(self, site: str, device: str, name: str, arguments: dict[str, Any], actor: str) -> str:
        """Send a command; its order's id."""
        order = {"kind": "command", "name": name, "arguments": arguments, "model": "", "canary": False}
        return await self._order(site, device, order, actor)

    async def step(self) -> None:
        """Look at every running roll-out once."""
        rows = await self._store.read(select(tables.rollouts).where(tables.rollouts.c.state.in_(RUNNING)))
        for row in rows:
            await self._advance(dict(row))

    async def count(self) -> None:
        """Tell the metrics how many roll-outs run, and how many ended within the last hour."""
        state, changed_at_ns = tables.rollouts.c.state, tables.rollouts.c.changed_at_ns
        counted = await self._store.read(
            select(state, func.count().label("count"))
            .where(or_(state.in_(RUNNING), changed_at_ns > time.time_ns() - RECENT_NS))
            .group_by(state)
        )
        counts = {one["state"]: one["count"] for one in counted}
        for name in STATES:
            self._metrics.rollouts.labels(name).set(counts.get(name, 0))

    async def write_outcomes(self) -> None:
        """Write what devices said; a later state of an order never gives way to `accepted`."""
        while self._outcomes:
            site, device, outcome = self._outcomes[0]
            orders = tables.orders
            change = (
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
            async with self._store.write() as connection:
                await connection.execute(change)
            self._outcomes.popleft()

    async def _advance(self, rollout: dict[str, Any]) -> None:
        orders = await self._store.read(select(tables.orders).where(tables.orders.c.rollout == rollout["id"]))
        late_ns = time.time_ns() - int(rollout["patience_s"] * 1e9)
        bad = sum(
            one["state"] in BAD or (one["state"] in OPEN and one["sent_at_ns"] < late_ns) for one in orders
        )
        good = sum(one["state"] == "done" for one in orders)
        answered = bad + good
        enough = bad and answered >= min(rollout["min_outcomes"], len(orders))
        if enough and bad / answered > rollout["max_failure_rate"]:
            await self._halt(rollout, f"{bad} of {answered} answered orders failed", "roll-out")
            return
        devices = await self._devices(rollout["site"])
        if not devices:
            return
        told = {(one["site"], one["device"]) for one in orders}
        canaries = max(1, math.ceil(rollout["canary_share"] * len(devices)))
        limit = canaries if rollout["state"] == "canary" else len(devices)
        for site, device, model in devices:
            if len(told) >= limit:
                break
            if (site, device) not in told:
                told.add((site, device))
                await self._announce(rollout, site, device, model)
        if rollout["state"] == "canary" and answered >= canaries:
            await self._change(rollout, "rolling", "", "roll-out")
        elif rollout["state"] == "rolling" and answered >= len(devices):
            await self._change(rollout, "done", "", "roll-out")

    async def _announce(self, rollout: dict[str, Any], site: str, device: str, previous: str) -> None:
        order = {
            "kind": "bundle",
            "name": "announcement",
            "arguments": {"allow_older": rollout["allow_older"]},
            "model": rollout["model"],
            "previous": previous,
            "rollout": rollout["id"],
            "canary": rollout["state"] == "canary",
        }
        await self._order(site, device, order, "roll-out")

    async def _order(self, site: str, device: str, order: dict[str, Any], actor: str) -> str:
        """Keep an order, then send it; what cannot be sent now is left unanswered and becomes late."""
        identifier, now_ns = secrets.token_hex(16), time.time_ns()
        async with self._store.write() as connection:
            serial = await self._next_serial(connection, device, now_ns)
            row = {
                "id": identifier,
                "site": site,
                "device": device,
                "serial": serial,
                "state": "sent",
                "reason": "",
                "message": "",
                "sent_at_ns": now_ns,
                "previous": "",
                "rollout": None,
            } | order
            await connection.execute(tables.orders.insert(), row)
            if actor != "roll-out":
                await audit.record(
                    connection, actor, f"order.{order['name']}", f"{site}/{device}", id=identifier
                )
        sent = await self._build(row)
        topic = topics.command(site, device) if row["kind"] == "command" else topics.bundle(site, device)
        self._transport.publish(
            topic, encode_order(sent, self._authority.order_key), retain=row["kind"] == "bundle"
        )
        return identifier

    async def _build(self, row: dict[str, Any]) -> Order:
        place = {name: row[name] for name in ("id", "serial", "site", "device")}
        if row["kind"] == "command":
            return Command(**place, name=row["name"], arguments=row["arguments"])
        bundle = await self._registry.find(row["model"])
        ticket = self._authority.ticket(row["model"], row["device"], int(time.time() + self._ticket_s))
        return Announcement(
            **place,
            model=row["model"],
            url=f"{self._address}/v1/bundles/{row['model']}/file?ticket={ticket}",
            sha256=bundle["sha256"],
            size=bundle["size"],
            allow_older=row["arguments"].get("allow_older", False),
        )

    async def _next_serial(self, connection: AsyncConnection, device: str, now_ns: int) -> int:
        """Greater than every earlier one, and than those of a store that was lost."""
        query = select(func.max(tables.orders.c.serial)).where(tables.orders.c.device == device)
        last = (await connection.execute(query)).scalar()
        return max(now_ns, (last or 0) + 1)

    async def _halt(self, rollout: dict[str, Any], reason: str, actor: str) -> None:
        await self._change(rollout, "halted", reason, actor)
        orders = await self._store.read(select(tables.orders).where(tables.orders.c.rollout == rollout["id"]))
        for one in orders:
            self._transport.publish(topics.bundle(one["site"], one["device"]), b"", retain=True)  # withdraw it
            if rollout["roll_back"] and one["state"] == "done":
                await self.command(one["site"], one["device"], "rollback", {}, actor)

    async def _change(self, rollout: dict[str, Any], state: str, reason: str, actor: str) -> None:
        rollouts = tables.rollouts
        async with self._store.write() as connection:
            await connection.execute(
                update(rollouts)
                .where(rollouts.c.id == rollout["id"])
                .values(state=state, reason=reason, changed_at_ns=time.time_ns())
            )
            await audit.record(connection, actor, f"rollout.{state}", rollout["id"], reason=reason)

    async def _devices(self, site: str | None) -> list[tuple[str, str, str]]:
        """Site, name and model of every enrolled device that has sent a status, in a steady order."""
        found, after = [], ("", "")
        while page := await self._store.devices(site=site, after=after, limit=1000):
            found += [(one.site, one.device, one.status.model) for one in page if one.status is not None]
            after = (page[-1].site, page[-1].device)
        return found
