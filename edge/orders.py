"""Signed orders: whom they are from, whether they were carried out already, and what became of them.

An order is on the disk before it is carried out, each with an outcome of its own. After a power cut unfinished ones are
taken up again, and an outcome that the broker has not acknowledged is sent again.
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
KEPT = 16
"""Orders of a kind whose outcomes are kept."""
log = logging.getLogger(__name__)


class Entry(Struct, frozen=True):
    """The latest outcome of an order, the order while that is not final, and whether the broker has the outcome."""

    outcome: Outcome
    order: Announcement | Command | None = None
    told: bool = False


class Serials(Struct, frozen=True):
    """The last orders that were taken up: of those that choose the model, and of all others."""

    model: int
    agent: int


class Record(Struct, frozen=True):
    """`orders.json`, `orders` oldest first. `serial` is the highest: all that agents before this form understand."""

    serial: int
    serials: Serials
    orders: tuple[Entry, ...]


class FirstRecord(Struct, frozen=True):
    """`orders.json` in its first form: the last order alone, and outcomes that nobody has yet."""

    serial: int
    order: Announcement | Command | None = None
    outcome: Outcome | None = None
    untold: tuple[Outcome, ...] = ()

    def upgrade(self) -> Record:
        """The same in the present form."""
        order, last = self.order, self.outcome
        entries = [Entry(one) for one in self.untold if one != last]
        if last is not None:
            entries.append(
                Entry(last, order if last.state == "accepted" else None, told=last not in self.untold)
            )
        return Record(self.serial, Serials(self.serial, self.serial), tuple(entries))


def chooses_model(order: Order) -> bool:
    """Whether an order says which bundle is to run. A later one takes the place of an earlier one."""
    return isinstance(order, Announcement) or order.name == "rollback"


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
    def unfinished(self) -> tuple[Order, ...]:
        """Orders that were taken up and have no final outcome, oldest first."""
        return tuple(one.order for one in self._record.orders if one.order is not None)

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
        before = self._record
        known = [one.outcome for one in before.orders if one.outcome.of == order.id]
        if known:
            self._tell(known[-1])
            return None
        subject = "model" if chooses_model(order) else "agent"
        last = getattr(before.serials, subject)
        if order.serial <= last:
            message = f"serial {order.serial} is not above {last}, that of the last such order."
            self._tell(self._outcome(order, "refused", "old_order", message))
            self._refuse("old_order", message)
            return None
        accepted = Entry(self._outcome(order, "accepted", "", ""), order)
        alike = [one for one in before.orders if one.outcome.kind == accepted.outcome.kind]
        kept = [self._overtake(one, order) for one in before.orders if one not in alike[: 1 - KEPT]]
        serials = msgspec.structs.replace(before.serials, **{subject: order.serial})
        if not self._save(Record(max(before.serial, order.serial), serials, (*kept, accepted))):
            self._record = before  # an order that cannot be noted is not carried out
            self._tell(self._outcome(order, "failed", "no_space", "the order cannot be written to the disk."))
            return None
        for entry in self._record.orders:
            if entry not in before.orders:  # the new one, and one whose place it takes
                self._tell(entry.outcome)
        return order

    def settle(self, order_id: str, state: State, reason: str = "", message: str = "") -> None:
        """Note and tell what became of the order `order_id`, once: what is final stays."""
        for entry in self._record.orders:
            if entry.order is not None and entry.order.id == order_id:
                level = logging.INFO if state == "done" else logging.ERROR
                log.log(level, "order %s: %s %s %s", order_id, state, reason, message)
                settled = Entry(self._outcome(entry.order, state, reason, message))
                self._change(entry, settled)
                self._tell(settled.outcome)

    def connect(self, resumed: bool) -> None:
        """Tell again what was not acknowledged."""
        self._connected = True
        if not resumed:
            self._under_way.clear()
        for entry in self._record.orders:
            if not entry.told and entry.outcome not in self._under_way.values():
                self._tell(entry.outcome)

    def disconnect(self) -> None:
        """Keep outcomes until there is a connection."""
        self._connected = False

    def acknowledge(self, mid: int, kept: bool) -> None:
        """Note that the broker has the outcome that was published as `mid`, or that it has not `kept` it."""
        outcome = self._under_way.pop(mid, None)
        for entry in self._record.orders:
            if kept and entry.outcome == outcome and not entry.told:
                self._change(entry, msgspec.structs.replace(entry, told=True))

    def _overtake(self, entry: Entry, order: Order) -> Entry:
        """What `order`, taken up now, leaves of an earlier one."""
        earlier = entry.order
        if earlier is None or not (chooses_model(earlier) and chooses_model(order)):
            return entry
        message = f"order {order.id} came before it was finished."
        return Entry(self._outcome(earlier, "failed", "superseded", message))

    def _change(self, entry: Entry, changed: Entry) -> None:
        orders = tuple(changed if one is entry else one for one in self._record.orders)
        self._save(msgspec.structs.replace(self._record, orders=orders))

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
        nothing = Record(-1, Serials(-1, -1), ())
        try:
            data = self._path.read_bytes()
            try:
                return msgspec.json.decode(data, type=Record)
            except msgspec.ValidationError:
                return msgspec.json.decode(data, type=FirstRecord).upgrade()
        except FileNotFoundError:
            return nothing
        except (OSError, msgspec.DecodeError) as error:
            log.error("%s: cannot be read (%s); orders are refused until it is removed", self._path, error)
            self._damaged = True
            return nothing

    def _save(self, record: Record) -> bool:
        self._record = record
        try:
            write_whole(self._path, msgspec.json.encode(record))
        except OSError as error:
            log.error("%s: %s", self._path, error.strerror)
            return False
        return True
