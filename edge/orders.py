"""Signed orders: whom they are from, whether they were carried out already, and what became of them.

The last order is kept on the disk before it is carried out. After a power cut an unfinished one is taken up again, and
an outcome that the broker has not acknowledged is sent again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from edge.config import EdgeConfig
from splitward.disk import write_whole
from splitward.errors import ConfigError, MessageError
from splitward.wire.control import Outcome
from splitward.wire.orders import Announcement, Command, Order, decode_order

State = Literal["accepted", "done", "refused", "rolled_back", "failed"]
MAX_UNTOLD = 32
log = logging.getLogger(__name__)


class Record(Struct, frozen=True):
    """`orders.json`: the last order that was taken up, its latest outcome, and outcomes that nobody has yet."""

    serial: int = -1
    order: Announcement | Command | None = None
    outcome: Outcome | None = None
    untold: tuple[Outcome, ...] = ()


class OrderBook:
    """The orders of one device.

    Parameters
    ----------
    config : EdgeConfig
    publish : callable
        Publishes an outcome and returns its message id.

    Attributes
    ----------
    refused : dict
        Orders that were not taken up, by reason, since the start.
    model : callable
        Id of the model that runs; set by the agent.
    """

    def __init__(self, config: EdgeConfig, publish: Callable[[Outcome], int]) -> None:
        self._config = config
        self._publish = publish
        self._path = Path(config.device.state_dir) / "orders.json"
        self._under_way: dict[int, Outcome] = {}
        self._connected = False
        self.refused: dict[str, int] = {}
        self.model: Callable[[], str] = str
        self._damaged = False
        self._record = self._load()

    @property
    def unfinished(self) -> Order | None:
        """The last order, where it was taken up and has no final outcome."""
        outcome = self._record.outcome
        return self._record.order if outcome is not None and outcome.state == "accepted" else None

    def take(self, payload: bytes) -> Order | None:
        """The order held by `payload`, noted on the disk, if it is to be carried out now."""
        device = self._config.device
        if device.order_key is None:
            self._refuse("no_order_key", "an order came, but `device.order_key` is not set.")
            return None
        try:
            from splitward.wire.bundle import read_trusted_key  # the same kind of key

            key = read_trusted_key(Path(device.order_key))
            order = decode_order(payload, key, site=device.site, device=device.id)
        except ConfigError as error:  # frames are of use without orders, so the agent goes on
            self._refuse("bad_order_key", f"device.order_key: {error}")
            return None
        except MessageError as error:
            self._refuse(error.reason, str(error))
            return None
        if self._damaged:  # which orders are old, nobody can say any more
            message = f"{self._path} is damaged. Look at who wrote to it, remove it, and restart the agent."
            self._tell(self._outcome(order, "refused", "orders_damaged", message))
            self._refuse("orders_damaged", message)
            return None
        last = self._record
        if last.order is not None and order.id == last.order.id:
            if last.outcome is not None:
                self._tell(last.outcome)
            return None
        if order.serial <= last.serial:
            message = f"serial {order.serial} is not above {last.serial}, that of the last order."
            self._tell(self._outcome(order, "refused", "old_order", message))
            self._refuse("old_order", message)
            return None
        accepted = self._outcome(order, "accepted", "", "")
        if not self._save(Record(order.serial, order, accepted, last.untold)):
            self._record = last  # an order that cannot be noted is not carried out
            self._tell(self._outcome(order, "failed", "no_space", "the order cannot be written to the disk."))
            return None
        self._tell(accepted)
        return order

    def settle(self, order_id: str, state: State, reason: str = "", message: str = "") -> None:
        """Note and tell what became of the order `order_id`; of another than the last nothing is kept."""
        order = self._record.order
        if order is None or order.id != order_id:
            return
        outcome = self._outcome(order, state, reason, message)
        level = logging.INFO if state == "done" else logging.ERROR
        log.log(level, "order %s: %s %s %s", order_id, state, reason, message)
        untold = (*self._record.untold, outcome)[-MAX_UNTOLD:]
        self._save(msgspec.structs.replace(self._record, outcome=outcome, untold=untold))
        self._tell(outcome)

    def connect(self, resumed: bool) -> None:
        """Tell again what was not acknowledged."""
        self._connected = True
        if not resumed:
            self._under_way.clear()
        for outcome in self._record.untold:
            if outcome not in self._under_way.values():
                self._tell(outcome)

    def disconnect(self) -> None:
        """Keep outcomes until there is a connection."""
        self._connected = False

    def acknowledge(self, mid: int) -> None:
        """Note that the broker has the outcome that was published as `mid`."""
        outcome = self._under_way.pop(mid, None)
        if outcome in self._record.untold:
            untold = tuple(one for one in self._record.untold if one != outcome)
            self._save(msgspec.structs.replace(self._record, untold=untold))

    def _tell(self, outcome: Outcome) -> None:
        if self._connected:
            self._under_way[self._publish(outcome)] = outcome

    def _outcome(self, order: Order, state: State, reason: str, message: str) -> Outcome:
        kind: Literal["bundle", "command"] = "bundle" if isinstance(order, Announcement) else "command"
        return Outcome(order.id, kind, state, reason, message, self.model(), time.time_ns())

    def _refuse(self, reason: str, message: str) -> None:
        log.error("an order is refused: %s: %s", reason, message)
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def _load(self) -> Record:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Record)
        except FileNotFoundError:
            return Record()
        except (OSError, msgspec.DecodeError) as error:
            log.error("%s: cannot be read (%s); orders are refused until it is removed", self._path, error)
            self._damaged = True
            return Record()

    def _save(self, record: Record) -> bool:
        self._record = record
        try:
            write_whole(self._path, msgspec.json.encode(record))
        except OSError as error:
            log.error("%s: %s", self._path, error.strerror)
            return False
        return True
