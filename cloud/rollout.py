"""Staged roll-outs of a bundle: a canary share first, then the rest, halted when it fails.

One worker at a time drives the roll-outs, by a lease in the store; any worker may halt one. A step does a bounded part,
within the lease, and what ends it in its midst is made good by the next (`cloud.orders`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, Subquery, and_, case, exists, func, null, or_, select, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud import audit, tables
from cloud.errors import CloudError
from cloud.metrics import RECENT_NS, Metrics
from cloud.orders import BAD, BATCH, OPEN, Orders, followed, insert, make_order
from cloud.problem import Problem
from cloud.record import HEX, NAME, Order
from cloud.registry import Registry
from cloud.store import Store, lock_table

log = logging.getLogger(__name__)

PERIOD_S = 1.0
LEASE_S = 15.0
GAP_S = 5.0
"""A roll-out that nobody drove for longer waited for a broker, or for a worker."""
LINGER_NS = 30 * 86_400 * 10**9
"""How long a halted roll-out is taken back from devices that answer late."""
RUNNING = ("canary", "rolling")
STATES = (*RUNNING, "done", "halted")

Row = Mapping[str, Any]
"""A row of `rollouts`, with its bundle's `sha256` and `size`."""


class Plan(BaseModel):
    """How a bundle is rolled out.

    Attributes
    ----------
    model : str
        Id of the bundle.
    site : str, optional
        Only devices of this site.
    canary_share : float
        Share of the devices that get it first.
    max_failure_rate : float
        The roll-out halts when a greater share of its answered orders failed.
    min_outcomes : int
        Orders answered before the rate counts.
    patience_s : float
        An order without an answer for so long counts as failed. Time in which no worker had a broker does not count.
    allow_older : bool
        Let devices go back to a bundle that was made before the one that they run.
    roll_back : bool
        Tell the devices that took it to go back, when it halts.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(pattern=HEX)
    site: str | None = Field(default=None, pattern=NAME)
    canary_share: float = Field(default=0.1, gt=0, le=1)
    max_failure_rate: float = Field(default=0.1, ge=0, lt=1)
    min_outcomes: int = Field(default=1, ge=1, le=1_000_000)
    patience_s: float = Field(default=3600.0, gt=0, le=30 * 86_400)
    allow_older: bool = False
    roll_back: bool = True


class Rollouts:
    """Begins, drives, halts and lists roll-outs."""

    def __init__(self, store: Store, orders: Orders, registry: Registry, metrics: Metrics) -> None:
        self._store, self._orders, self._registry, self._metrics = store, orders, registry, metrics

    async def keep(self) -> None:
        """Note outcomes and drive the roll-outs, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self._orders.write_outcomes()
                await self.step()
                await self.count()
            except CloudError as error:
                self._metrics.failures.labels("rollout").inc()
                log.warning("roll-outs: %s", error)

    async def create(self, plan: Plan, actor: str) -> dict[str, Any]:
        """Begin a roll-out; `Problem` 404 without the bundle, 409 while one runs at the same site."""
        await self._registry.find(plan.model)
        rollouts, now_ns = tables.rollouts, time.time_ns()
        row = plan.model_dump() | {
            "id": secrets.token_hex(16),
            "state": "canary",
            "reason": "",
            "created_at_ns": now_ns,
            "changed_at_ns": now_ns,
            "driven_at_ns": now_ns,
            "actor": actor,
        }
        async with self._store.write() as connection:
            await lock_table(connection, rollouts)  # until this one is seen, too
            running = select(rollouts.c.id).where(rollouts.c.state.in_(RUNNING))
            if plan.site is not None:
                running = running.where((rollouts.c.site == plan.site) | rollouts.c.site.is_(None))
            if (await connection.execute(running)).first():
                raise Problem(409, "running", "another roll-out to these devices runs. Halt it first.")
            await connection.execute(rollouts.insert(), row)
            await audit.record(connection, actor, "rollout.create", row["id"], model=plan.model, site=plan.site)
        return row

    async def latest(self, limit: int = 100) -> list[dict[str, Any]]:
        """The last roll-outs, each with its announcements counted by state."""
        rollouts, orders = tables.rollouts, tables.orders.c
        rows = await self._store.read(select(rollouts).order_by(rollouts.c.created_at_ns.desc()).limit(limit))
        counted = await self._store.read(
            select(orders.rollout, orders.state, func.count().label("count"))
            .where(orders.rollout.in_([row["id"] for row in rows]), orders.kind == "bundle")
            .group_by(orders.rollout, orders.state)
        )
        counts: dict[str, dict[str, int]] = {}
        for one in counted:
            counts.setdefault(one["rollout"], {})[one["state"]] = one["count"]
        return [dict(row) | {"orders": counts.get(row["id"], {})} for row in rows]

    async def halt(self, rollout: str, reason: str, actor: str) -> None:
        """Stop a roll-out; `Problem` 404 when it does not run.

        Nothing more is announced from here on. What was is withdrawn, and taken back if the plan says so, step by
        step by the worker that drives roll-outs.
        """
        if not await self._change(rollout, RUNNING, "halted", reason, actor):
            raise Problem(404, "not_running", f"no roll-out {rollout} runs.")

    async def step(self) -> None:
        """Do the next part of every roll-out, if this worker has a broker and no other one does it."""
        if not (self._orders.connected and await self._store.take_lease("rollouts", LEASE_S)):
            return
        await self._wind_down()
        rollouts, bundles = tables.rollouts, tables.bundles.c
        running = (
            select(rollouts, bundles.sha256, bundles.size)
            .join_from(rollouts, tables.bundles, bundles.model == rollouts.c.model)
            .where(rollouts.c.state.in_(RUNNING))
        )
        for rollout in await self._store.read(running):
            await self._advance(dict(rollout))

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

    # --- a roll-out that runs --------------------------------------------------------------------------------

    async def _advance(self, rollout: Row) -> None:
        """Judge a roll-out by its answers; else send what is due, and make the next orders."""
        if time.time_ns() - rollout["driven_at_ns"] > GAP_S * 1e9:
            await self._resume(rollout)
            return
        tally = await self._tally(rollout)
        total = sum(tally.values())
        canaries = max(1, math.ceil(rollout["canary_share"] * total))
        limit = canaries if rollout["state"] == "canary" else total
        if verdict := _judge(rollout, tally, limit):
            await self._change(rollout["id"], (rollout["state"],), *verdict, "roll-out")
            return
        untold = await self._untold(rollout, limit - (total - tally["untold"]))
        async with self._store.write() as connection:
            driven = await _drive(connection, rollout)
            if driven is not None:
                await insert(connection, [_announce(rollout, device) for device in untold])
        if driven is not None and (
            due := await self._orders.due(tables.orders.c.rollout == rollout["id"], "bundle")
        ):
            async with self._store.write() as connection:
                if await _drive(connection, driven) is not None:
                    await self._orders.send(connection, due, driven)

    async def _resume(self, rollout: Row) -> None:
        """Nobody with a broker drove the roll-out for a while: no device could answer, so none is late by that."""
        orders, gap_ns = tables.orders, time.time_ns() - rollout["driven_at_ns"]
        change = update(orders).where(orders.c.rollout == rollout["id"], orders.c.state.in_(OPEN))
        async with self._store.write() as connection:
            if await _drive(connection, rollout) is not None:
                await connection.execute(change.values(sent_at_ns=orders.c.sent_at_ns + gap_ns))

    async def _tally(self, rollout: Row) -> dict[str, int]:
        """How many devices of the fleet answered well (`good`) or badly, are `open`, or `untold`."""
        fleet, orders = _fleet(rollout["site"]), tables.orders.c
        late_ns = time.time_ns() - int(rollout["patience_s"] * 1e9)
        answer = case(
            (orders.id.is_(None), "untold"),
            (orders.state == "done", "good"),
            (orders.state.in_(BAD) | (orders.sent_at_ns < late_ns), "bad"),
            else_="open",
        ).label("answer")
        query = _with_orders(select(answer, func.count().label("count")), fleet, rollout).group_by("answer")
        counts = {row["answer"]: row["count"] for row in await self._store.read(query)}
        return {name: counts.get(name, 0) for name in ("good", "bad", "open", "untold")}

    async def _untold(self, rollout: Row, room: int) -> Sequence[RowMapping]:
        """The next devices that have no order yet, in a steady order."""
        if room <= 0:
            return ()
        fleet = _fleet(rollout["site"])
        query = _with_orders(select(fleet), fleet, rollout).where(tables.orders.c.id.is_(None))
        return await self._store.read(query.order_by(fleet.c.site, fleet.c.device).limit(min(room, BATCH)))

    async def _change(
        self, rollout: str, expected: Collection[str], state: str, reason: str, actor: str
    ) -> bool:
        """Give a roll-out another state if it is in one of those `expected`; whether it was."""
        rollouts = tables.rollouts
        change = (
            update(rollouts)
            .where(rollouts.c.id == rollout, rollouts.c.state.in_(expected))
            .values(state=state, reason=reason, changed_at_ns=time.time_ns())
        )
        async with self._store.write() as connection:
            if (await connection.execute(change)).rowcount == 0:
                return False
            await audit.record(connection, actor, f"rollout.{state}", rollout, reason=reason)
        return True

    # --- one that was halted ---------------------------------------------------------------------------------

    async def _wind_down(self) -> None:
        """Withdraw what halted roll-outs announced, and order back who took it, also when they say so late."""
        orders, rollouts = tables.orders.c, tables.rollouts.c
        recent = (rollouts.changed_at_ns > time.time_ns() - LINGER_NS) & (rollouts.driven_at_ns > 0)
        halted = select(rollouts.id).where(rollouts.state == "halted", recent)
        announced = (
            select(tables.orders).where(orders.rollout.in_(halted), orders.kind == "bundle").limit(BATCH)
        )
        kept = announced.where(
            orders.published_at_ns.is_not(None), orders.withdrawn_at_ns.is_(None), ~followed(bundles_only=True)
        )
        taken = announced.where(
            orders.rollout.in_(halted.where(rollouts.roll_back)),
            orders.state == "done",
            ~followed(bundles_only=False),
        )
        if back := await self._store.read(taken):
            async with self._store.write() as connection:
                await insert(connection, map(_order_back, back))
        withdrawn = await self._store.read(kept)
        due = await self._orders.due(orders.rollout.in_(halted), "command")
        if withdrawn or due:
            async with self._store.write() as connection:
                await self._orders.withdraw(connection, withdrawn)
                await self._orders.send(connection, due)


def _judge(rollout: Row, tally: Mapping[str, int], limit: int) -> tuple[str, str] | None:
    """The state to which the answers of the `limit` devices at hand bring a roll-out, and why; None: they do not."""
    bad, answered = tally["bad"], tally["bad"] + tally["good"]
    enough = bad and answered >= min(rollout["min_outcomes"], limit)
    if enough and bad / answered > rollout["max_failure_rate"]:
        return "halted", f"{bad} of {answered} answered orders failed"
    if answered and answered >= limit:
        return ("rolling" if rollout["state"] == "canary" else "done"), ""
    return None


async def _drive(connection: AsyncConnection, rollout: Row) -> Row | None:
    """Hold a roll-out until the transaction ends; None where it was changed, or driven, since it was read."""
    rollouts, now = tables.rollouts.c, {"driven_at_ns": time.time_ns()}
    same = [rollouts[name] == rollout[name] for name in ("id", "state", "driven_at_ns")]
    change = update(tables.rollouts).where(*same).values(now)
    return {**rollout, **now} if (await connection.execute(change)).rowcount else None


def _fleet(site: str | None) -> Subquery:
    """The devices of `site`, or of all, that have sent a status: where they are enrolled, or, if the broker takes
    devices that never enrolled, wherever those say that they are. A revoked one is none of them."""
    devices, enrolled, certificates = tables.devices.c, tables.enrolled.c, tables.certificates.c
    at_home = exists().where(enrolled.device == devices.device, enrolled.site == devices.site)
    certified = exists().where(certificates.device == devices.device)
    query = select(tables.devices).where(devices.status.is_not(null()), or_(at_home, ~certified))
    return (query if site is None else query.where(devices.site == site)).subquery()


def _with_orders(query: Select[Any], fleet: Subquery, rollout: Row) -> Select[Any]:
    """`query` over `fleet`, each device with its announcement of `rollout` or none."""
    orders = tables.orders.c
    same = and_(
        orders.rollout == rollout["id"],
        orders.kind == "bundle",
        orders.site == fleet.c.site,
        orders.device == fleet.c.device,
    )
    return query.select_from(fleet.outerjoin(tables.orders, same))


def _order_back(taken: RowMapping) -> Order:
    return make_order(taken["site"], taken["device"], "command", "rollback", rollout=taken["rollout"])


def _announce(rollout: Row, device: RowMapping) -> Order:
    runs = device["status"].get("model", "")
    return make_order(
        device["site"],
        device["device"],
        "bundle",
        "announcement",
        model=rollout["model"],
        previous=runs if re.fullmatch(HEX, runs) else "",
        rollout=rollout["id"],
        canary=rollout["state"] == "canary",
        arguments={"allow_older": rollout["allow_older"]},
    )
