"""Settings from their sources, and what orders may change; the order book over restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.config import DeviceConfig, EdgeConfig
from edge.orders import OrderBook
from edge.settings import REMOTE, change_remotely, load_settings
from splitward.errors import ConfigError
from splitward.wire.control import Outcome
from splitward.wire.orders import Command, encode_order

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


class Book:
    """An order book whose outcomes are kept."""

    def __init__(self, config: EdgeConfig) -> None:
        self.told: list[Outcome] = []
        self.book = OrderBook(config, self._publish)

    def _publish(self, outcome: Outcome) -> int:
        self.told.append(outcome)
        return len(self.told)


def test_an_outcome_is_told_until_the_broker_has_it(tmp_path: Path) -> None:
    config = settings(tmp_path)
    first = Book(config)
    assert first.book.take(encode_order(order(3), KEY)) == order(3)
    assert first.book.unfinished == order(3)
    first.book.settle(order(3).id, "done")
    assert first.told == [], "there is no connection"
    second = Book(config)  # a power cut
    assert second.book.unfinished is None
    second.book.connect(resumed=False)
    assert [one.state for one in second.told] == ["done"]
    second.book.acknowledge(1)
    third = Book(config)
    third.book.connect(resumed=False)
    assert third.told == []
    assert third.book.take(encode_order(order(3), KEY)) is None, "it was carried out"
    assert [one.state for one in third.told] == ["done"], "and its outcome is told again"


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


def test_every_remote_setting_exists() -> None:
    values = msgspec.to_builtins(EdgeConfig())
    for key in REMOTE:
        table, _, name = key.partition(".")
        assert name in values[table], key
    assert not any(key.startswith(("device.", "broker.", "cloud.", "update.")) for key in REMOTE)
