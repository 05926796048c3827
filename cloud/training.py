"""Trainings across sites as jobs of the service: made, stopped and gone on with by an operator.

One worker at a time, by a lease in the store, has the process that leads them all beside it
(`splitward.training.remote.lead`): torch never enters the service's own. That process keeps every step in a journal
in `state_dir`, so it may be killed at any time; this one starts it again, and reads how far the trainings are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from cloud import audit, tables
from cloud.config import BrokerConfig
from cloud.errors import CloudError
from cloud.metrics import RECENT_NS, Metrics
from cloud.problem import Problem
from cloud.store import Store, lock_table
from splitward.disk import write_whole

log = logging.getLogger(__name__)

NEEDED = ("torch", "safetensors", "paho", "tqdm", "PIL")
MODULE = "splitward.training.remote.lead"
PERIOD_S = 1.0
LEASE_S = 15.0
END_S = 20.0
MAX_RUNNING = 8
LONGEST_WAIT_S = 60.0
LINGER_NS = 600 * 10**9
"""How long a training that is done is led on, for a site that lost the last answer."""
STATES = ("running", "stopped", "done", "failed")
CHANGES = {"stop": (("running",), "stopped"), "resume": (("stopped", "failed"), "running")}


class Trainings:
    """Keeps the trainings of the store, and the process that leads them."""

    def __init__(self, store: Store, broker: BrokerConfig, folder: Path, metrics: Metrics) -> None:
        self._store, self._broker, self._folder, self._metrics = store, broker, folder, metrics
        self._process: asyncio.subprocess.Process | None = None
        self._led: dict[str, int] = {}
        """What the process leads, and when each was last changed at its start."""
        self._failures = 0
        self._started_s = self._wait_until_s = 0.0

    async def keep(self) -> None:
        """Lead what is to be led, until cancelled."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                try:
                    if await self._store.take_lease("trainings", LEASE_S):
                        await self.step()
                    else:
                        await self._end_process()
                    await self.count()
                except (CloudError, OSError) as error:
                    self._metrics.failures.labels("training").inc()
                    log.warning("trainings: %s", error)
        finally:
            await self._end_process()

    async def create(self, name: str, wanted: dict[str, Any], actor: str) -> dict[str, Any]:
        """Begin a training; what cannot be planned fails a moment later, and says why.

        `Problem` 409 where this host cannot train, or leads as many trainings as it may.
        """
        if missing := [package for package in NEEDED if find_spec(package) is None]:
            what = f"this host has no {', '.join(missing)}: install splitward[cloud] on it."
            raise Problem(409, "cannot_train", what)
        trainings, training = tables.trainings, secrets.token_hex(16)
        row = {
            "id": training,
            "name": name,
            "wanted": wanted,
            "state": "running",
            "reason": "",
            "created_at_ns": time.time_ns(),
            "changed_at_ns": time.time_ns(),
            "actor": actor,
        }
        async with self._store.write() as connection:
            await self._refuse_too_many(connection)
            await connection.execute(trainings.insert(), row)
            await audit.record(connection, actor, "training.create", training, name=name)
        return row

    async def latest(self, limit: int = 100) -> list[dict[str, Any]]:
        """The last trainings, each with how far it is."""
        trainings = tables.trainings
        query = select(trainings).order_by(trainings.c.created_at_ns.desc()).limit(limit)
        rows = await self._store.read(query)
        return [dict(row) | {"progress": self._progress(row["id"])} for row in rows]

    async def find(self, training: str) -> dict[str, Any]:
        """One training; `Problem` 404 when there is none."""
        rows = await self._store.read(select(tables.trainings).where(tables.trainings.c.id == training))
        if not rows:
            raise Problem(404, "unknown_training", f"there is no training {training}.")
        return dict(rows[0]) | {"progress": self._progress(training)}

    async def change(self, training: str, what: str, actor: str) -> dict[str, Any]:
        """`stop` or `resume`; `Problem` 404 or 409 when that cannot be."""
        before, after = CHANGES[what]
        row = await self.find(training)
        if row["state"] not in before:
            raise Problem(409, "wrong_state", f"training {training} is {row['state']}: it cannot {what}.")
        async with self._store.write() as connection:
            if after == "running":
                await self._refuse_too_many(connection)
            await self._set(connection, training, after, "", actor)
        (self._folder / training / "progress.json").unlink(missing_ok=True)  # told before this change
        return await self.find(training)

    async def step(self) -> None:
        """Note what has ended, and let the process lead what is to be led."""
        trainings = tables.trainings
        recent = trainings.c.changed_at_ns > time.time_ns() - LINGER_NS
        lingering = trainings.c.state.in_(("done", "failed")) & recent
        rows = await self._store.read(select(trainings).where((trainings.c.state == "running") | lingering))
        for row in rows:
            progress = self._progress(row["id"]) if row["state"] == "running" else {}
            if progress.get("failure") or progress.get("finished"):
                state = "failed" if progress["failure"] else "done"
                async with self._store.write() as connection:
                    await self._set(connection, row["id"], state, progress["failure"], "training")
        if self._process is not None and self._process.returncode is not None:
            await self._note_end(self._process.returncode)
        led = {row["id"]: row["changed_at_ns"] for row in rows}
        # One that runs and was changed since was stopped or failed, and resumed: it is opened anew.
        resumed = any(led[row["id"]] != self._led.get(row["id"]) for row in rows if row["state"] == "running")
        if resumed or led.keys() != self._led.keys():
            await self._end_process()
        if led and self._process is None and time.monotonic() >= self._wait_until_s:
            await self._start({row["id"]: row["wanted"] for row in rows})
            self._led = led

    async def count(self) -> None:
        """Tell the metrics how many trainings run or are stopped, and how many ended within the last hour."""
        state, changed_at_ns = tables.trainings.c.state, tables.trainings.c.changed_at_ns
        counted = await self._store.read(
            select(state, func.count().label("count"))
            .where(or_(state.in_(("running", "stopped")), changed_at_ns > time.time_ns() - RECENT_NS))
            .group_by(state)
        )
        counts = {one["state"]: one["count"] for one in counted}
        for name in STATES:
            self._metrics.trainings.labels(name).set(counts.get(name, 0))

    async def _refuse_too_many(self, connection: AsyncConnection) -> None:
        await lock_table(connection, tables.trainings)  # until this one is counted, too
        running = select(func.count()).where(tables.trainings.c.state == "running")
        if ((await connection.execute(running)).scalar() or 0) >= MAX_RUNNING:
            raise Problem(409, "too_many", f"{MAX_RUNNING} trainings run: stop one, or wait for its end.")

    async def _start(self, wanted: dict[str, dict[str, Any]]) -> None:
        tls = self._broker.tls
        place = {
            "host": self._broker.host,
            "port": self._broker.port,
            "username": self._broker.username,
            "password": self._broker.password,
        } | ({"ca": tls.ca, "cert": tls.cert, "key": tls.key} if tls else {})
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder / "broker.json", msgspec.json.encode(place))
        for name, values in wanted.items():
            (self._folder / name).mkdir(exist_ok=True)
            (self._folder / name / "wanted.json").write_text(json.dumps(values), encoding="utf-8")
        with (self._folder / "log").open("wb") as told:
            starting = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", MODULE, str(self._folder), *wanted),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=told,
                    stderr=told,
                )
            )
            try:
                self._process = await asyncio.shield(starting)
            except asyncio.CancelledError:
                with contextlib.suppress(OSError):
                    self._process = await starting  # which nobody else would end
                raise
        self._started_s = time.monotonic()
        log.info("process %d leads %d trainings", self._process.pid, len(wanted))

    async def _note_end(self, code: int) -> None:
        """It has ended by itself: start it again, later each time."""
        self._process, self._led = None, {}
        lasted = time.monotonic() - self._started_s > LONGEST_WAIT_S
        self._failures = 1 if lasted else self._failures + 1
        wait_s = min(2.0**self._failures, LONGEST_WAIT_S)
        self._wait_until_s = time.monotonic() + wait_s
        said = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self._metrics.failures.labels("training").inc()
        log.error("the process that leads trainings ended with %d: %s", code, said[-1] if said else "no word")

    async def _end_process(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), END_S)
            except TimeoutError:
                process.kill()  # its journal has every step
                await process.wait()
        self._process, self._led = None, {}  # only now: who is cancelled meanwhile ends it in the end

    def _progress(self, training: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self._folder / training / "progress.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    async def _set(
        self, connection: AsyncConnection, training: str, state: str, reason: str, actor: str
    ) -> None:
        trainings, reason = tables.trainings, reason[:1000]
        change = {"state": state, "reason": reason, "changed_at_ns": time.time_ns()}
        await connection.execute(update(trainings).where(trainings.c.id == training).values(change))
        await audit.record(connection, actor, f"training.{state}", training, reason=reason)
