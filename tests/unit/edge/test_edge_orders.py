"""Settings from their sources, and what orders may change; the order book over restarts and replays."""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.config import DeviceConfig, EdgeConfig, UpdateConfig
from edge.models import ModelStore
from edge.orders import KEPT, OrderBook
from edge.settings import CHOSEN, REMOTE, change_remotely, choose_variant, load_settings
from edge.updates import Done, Updates
from splitward.errors import ConfigError
from splitward.wire.control import Outcome
from splitward.wire.orders import Announcement, Command, Order, encode_order

KEY = Ed25519PrivateKey.generate()


def settings(folder: Path) -> EdgeConfig:
    public = KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / "order.pub").write_bytes(public)
    return EdgeConfig(device=DeviceConfig(state_dir=str(folder), order_key=str(folder / "order.pub")))


def order(serial: int, name: Any = "restart", **arguments: Any) -> Command:
    return Command(
        id=f"{serial:032x}", serial=serial, site="demo", device="device-1", name=name, arguments=arguments
    )


def announcement(serial: int, model: str = "0f" * 16) -> Announcement:
    said = {"model": model, "url": "https://127.0.0.1:1/bundle", "sha256": "ab" * 32, "size": 1000}
    return Announcement(id=f"{serial:032x}", serial=serial, site="demo", device="device-1", **said)


class Book:
    """An order book whose outcomes are kept."""

    def __init__(self, config: EdgeConfig) -> None:
        self.told: list[Outcome] = []
        self.book = OrderBook(config, self._publish)

    def _publish(self, outcome: Outcome) -> int:
        self.told.append(outcome)
        return len(self.told)

    def take(self, one: Order) -> bool:
        """Whether an order, sent now, is to be carried out."""
        return self.book.take(encode_order(one, KEY)) is not None

    def said(self, one: Order) -> list[tuple[str, str]]:
        """State and reason of each outcome of `one` so far."""
        return [(told.state, told.reason) for told in self.told if told.of == one.id]


def test_an_outcome_is_told_until_the_broker_has_it(tmp_path: Path) -> None:
    config = settings(tmp_path)
    first = Book(config)
    assert first.book.take(encode_order(order(3), KEY)) == order(3)
    assert first.book.unfinished == (order(3),)
    first.book.settle(order(3).id, "done")
    assert first.told == [], "there is no connection"
    second = Book(config)  # a power cut
    assert second.book.unfinished == ()
    second.book.connect(resumed=False)
    assert [one.state for one in second.told] == ["done"]
    second.book.acknowledge(1, kept=False)  # nobody was there to keep it for
    second.book.connect(resumed=True)
    assert [one.state for one in second.told] == ["done", "done"]
    second.book.acknowledge(2, kept=True)
    third = Book(config)
    third.book.connect(resumed=False)
    assert third.told == []
    assert third.book.take(encode_order(order(3), KEY)) is None, "it was carried out"
    assert [one.state for one in third.told] == ["done"], "and its outcome is told again"


def test_an_announcement_s_outcome_is_kept_over_later_commands(tmp_path: Path) -> None:
    config = settings(tmp_path)
    bundle, diagnostics = announcement(1), order(2, "diagnostics")
    first = Book(config)
    first.book.connect(resumed=False)
    assert first.take(bundle)
    assert first.take(diagnostics)
    first.book.disconnect()
    first.book.settle(diagnostics.id, "done")
    first.book.settle(bundle.id, "rolled_back", "crashed", "as the test wants")
    second = Book(config)  # a power cut
    second.book.connect(resumed=False)
    assert (second.said(bundle), second.said(diagnostics)) == ([("rolled_back", "crashed")], [("done", "")])


def test_a_retained_announcement_is_answered_as_before(tmp_path: Path) -> None:
    book = Book(settings(tmp_path))
    book.book.connect(resumed=False)
    bundle = announcement(1)
    assert book.take(bundle)
    assert book.take(order(2, "diagnostics"))
    assert not book.take(bundle)
    book.book.settle(bundle.id, "done")
    for serial in range(3, 3 + 2 * KEPT):
        assert book.take(order(serial))
        book.book.settle(order(serial).id, "done")
    assert not book.take(bundle)
    assert book.said(bundle) == [("accepted", ""), ("accepted", ""), ("done", ""), ("done", "")]
    assert book.book.refused == {}


def test_an_installation_goes_on_after_a_command_and_a_power_cut(tmp_path: Path) -> None:
    config = msgspec.structs.replace(settings(tmp_path), update=UpdateConfig(fetch_tries=1))
    first = Book(config)
    assert first.take(announcement(1))
    assert first.take(order(2, "diagnostics"))
    assert first.take(order(3, "restart"))
    assert Book(config).book.unfinished == (announcement(1), order(2, "diagnostics"), order(3, "restart"))
    second, done = Book(config), queue.SimpleQueue[Done]()
    Updates(config, ModelStore(config), second.book, done.put, lambda: None).resume()
    assert done.get(timeout=60).order == announcement(1).id, "it was fetched again"
    second.book.connect(resumed=False)
    assert second.said(order(2))[-1] == ("failed", "interrupted")
    assert second.said(order(3))[-1] == ("done", "")


def test_an_installation_ends_with_the_agent_or_when_overtaken(tmp_path: Path, monkeypatch: Any) -> None:
    config, running = settings(tmp_path), tmp_path / "running"
    os.mkfifo(running)
    program = tmp_path / "python"  # an installer that never ends: its end is read at the other end of the pipe
    program.write_text(f"#!/bin/sh\nexec sleep 600 > {running}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    book = Book(config)
    book.book.connect(resumed=False)
    updates = Updates(config, ModelStore(config), book.book, lambda _: None, lambda: None)
    for one, end in (
        (announcement(1), lambda: updates.take(order(2, "rollback"))),
        (announcement(3), updates.stop),
    ):
        assert book.take(one)
        updates.take(one)
        with running.open("rb") as pipe:
            assert book.take(order(2, "rollback")) == (one.serial == 1)
            end()
            assert pipe.read() == b""
    assert book.said(announcement(1)) == [("accepted", ""), ("failed", "superseded")]
    assert book.said(order(2)) == [("accepted", ""), ("failed", "no_previous"), ("failed", "no_previous")]
    assert Book(config).book.unfinished == (announcement(3),), "it is resumed"


def test_no_order_is_followed_after_a_later_one_that_it_would_undo(tmp_path: Path) -> None:
    """An attacker at the broker has every order there was, and holds back or repeats what it likes."""
    config = settings(tmp_path)
    early = {"bundle": announcement(1), "back": order(2, "rollback"), "setting": order(3, "configure")}
    book = Book(config)
    book.book.connect(resumed=False)
    assert book.take(announcement(4))
    assert not book.take(early["bundle"])
    assert not book.take(early["back"])
    assert book.take(early["setting"]), "it waits for no bundle"
    assert book.take(order(6, "rollback"))
    assert not book.take(announcement(5)), "the device was ordered back since"
    assert book.take(order(8, "configure"))
    assert book.take(announcement(7)), "it was under way for longer than a command that has no part in it"
    for serial in range(9, 9 + 2 * KEPT):
        assert book.take(order(serial, "configure"))
    again = Book(config)
    again.book.connect(resumed=False)
    for one in (*early.values(), announcement(4), announcement(5), order(6, "rollback"), order(8, "configure")):
        assert not book.take(one)
        assert not again.take(one), "a restart changes nothing"
    assert ("refused", "old_order") in again.said(early["setting"]), "what became of it is long forgotten"


@pytest.mark.parametrize("last", [announcement(7), order(7)])
def test_a_record_in_its_first_form_is_read(tmp_path: Path, last: Order) -> None:
    def outcome(serial: int, kind: Any, state: Any) -> Outcome:
        return Outcome(f"{serial:032x}", kind, state)

    kind = "bundle" if isinstance(last, Announcement) else "command"
    written = {
        "serial": 7,
        "order": last,
        "outcome": outcome(7, kind, "accepted"),
        "untold": [outcome(6, "command", "done")],
    }
    (tmp_path / "orders.json").write_bytes(msgspec.json.encode(written))
    config = settings(tmp_path)
    book = Book(config)
    assert book.book.unfinished == (last,)
    book.book.connect(resumed=False)
    assert book.said(order(6)) == [("done", "")]
    for old in (announcement(5), order(5), order(5, "rollback")):
        assert not book.take(old)
    book.book.settle(last.id, "done")
    assert not book.take(last)
    assert book.said(last)[-2:] == [("done", ""), ("done", "")]
    assert book.take(announcement(8))
    assert book.take(order(9))
    kept = msgspec.json.decode((tmp_path / "orders.json").read_bytes())
    assert kept["serial"] == 9, "an agent of the first form, where it runs again, takes nothing older"


def test_without_its_key_an_order_is_refused_and_the_agent_goes_on(tmp_path: Path) -> None:
    config = settings(tmp_path)
    key = tmp_path / "order.pub"
    data = key.read_bytes()
    book = Book(config)
    book.book.connect(resumed=True)
    for damaged in (b"no key", None):
        if damaged is None:
            key.unlink()
        else:
            key.write_bytes(damaged)
        assert book.book.take(encode_order(order(1), KEY)) is None
    assert book.book.refused == {"bad_order_key": 2}
    assert book.told == [], "nobody knows whose order it was"
    key.write_bytes(data)
    assert book.book.take(encode_order(order(1), KEY)) == order(1)


def test_an_order_that_cannot_be_noted_is_not_carried_out(tmp_path: Path, monkeypatch: Any) -> None:
    book = Book(settings(tmp_path))
    book.book.connect(resumed=True)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge.orders.write_whole", full)
    assert book.book.take(encode_order(order(1), KEY)) is None
    assert (book.told[-1].state, book.told[-1].reason) == ("failed", "no_space")
    monkeypatch.undo()
    assert book.book.take(encode_order(order(1), KEY)) == order(1), "it may be tried again"


def test_a_damaged_record_lets_no_old_order_in(tmp_path: Path) -> None:
    config = settings(tmp_path)
    record = tmp_path / "orders.json"
    assert Book(config).book.take(encode_order(order(5), KEY)) == order(5)
    record.write_bytes(record.read_bytes()[:-9])
    book = Book(config)
    book.book.connect(resumed=False)
    for serial in (4, 5, 6):
        assert book.book.take(encode_order(order(serial), KEY)) is None
    assert {(one.state, one.reason) for one in book.told} == {("refused", "orders_damaged")}
    record.unlink()
    assert Book(config).book.take(encode_order(order(6), KEY)) == order(6)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(f'[device]\nstate_dir = "{tmp_path}"\n[link]\nstatus_s = 1.0\nwindow = 2\n')
    change_remotely(load_settings(file, {}), {"link.status_s": 3.0})
    assert (load_settings(file, {}).link.status_s, load_settings(file, {}).link.window) == (3.0, 2)
    environment = {"SPLITWARD_EDGE__LINK__STATUS_S": "4.0", "SPLITWARD_EDGE__DEVICE__ID": "pi-4", "PATH": "x"}
    config = load_settings(file, environment)
    assert (config.link.status_s, config.device.id) == (4.0, "pi-4")
    with pytest.raises(ConfigError, match=r"link\.windwo.*Did you mean 'link\.window'"):
        load_settings(file, {"SPLITWARD_EDGE__LINK__WINDWO": "4"})


def test_an_order_s_changes_are_found_where_the_environment_puts_the_state(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(f'[device]\nstate_dir = "{tmp_path}/a"\n')
    environment = {"SPLITWARD_EDGE__DEVICE__STATE_DIR": f"{tmp_path}/b", "SPLITWARD_EDGE__LINK__WINDOW": "3"}
    change_remotely(load_settings(file, environment), {"spool.max_bytes": 12345, "link.window": 5})
    config = load_settings(file, environment)
    assert config.spool.max_bytes == 12345
    assert config.link.window == 3, "the environment wins"
    assert load_settings(file, {}).spool.max_bytes == EdgeConfig().spool.max_bytes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"broker.host": "evil"}, "may not be changed from afar"),
        ({"device.trusted_key": "x"}, "may not be changed"),
        ({"runtime.backend": "tflite"}, "'runtime.backend' may not be changed from afar. Choose on the device"),
        ({"link.window": 3, "runtime.precision": "int8"}, "'runtime.precision' may not be changed from afar"),
        ({"link.windwo": 3}, r"Did you mean 'link\.window'"),
        ({"link.window": "many"}, "window"),
        ({"link.status_s": 5.0, "spool.drop": "all"}, "drop"),
        ({"spool.max_age_s": 1e300}, "max_age_s"),
        ({"runtime.deadline_s": 1e-9}, "deadline_s"),
        ({"capture.rate_hz": 1e-300}, "one frame a day"),
    ],
)
def test_an_order_changes_what_is_safe_or_nothing(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    config = settings(tmp_path)
    with pytest.raises(ConfigError, match=said):
        change_remotely(config, arguments)
    assert not (tmp_path / "remote.json").exists()


def test_a_variant_is_chosen_on_the_device_and_outlives_orders(tmp_path: Path) -> None:
    """Another variant draws another noise for the same frame: whoever could order each in turn had their mean."""
    file = tmp_path / "edge.toml"
    file.write_text(f'[device]\nstate_dir = "{tmp_path}"\n')
    choose_variant(load_settings(file, {}), "tflite", "int8")
    change_remotely(load_settings(file, {}), {"link.window": 3})
    for precision in ("float32", "int8"):
        with pytest.raises(ConfigError, match="edge bench --choose"):
            change_remotely(load_settings(file, {}), {"runtime.precision": precision})
    config = load_settings(file, {})
    assert (config.runtime.backend, config.runtime.precision, config.link.window) == ("tflite", "int8", 3)


def test_every_remote_setting_exists() -> None:
    values = msgspec.to_builtins(EdgeConfig())
    for key in REMOTE | CHOSEN:
        table, _, name = key.partition(".")
        assert name in values[table], key
    assert not any(key.startswith(("device.", "broker.", "cloud.", "update.")) for key in REMOTE)
