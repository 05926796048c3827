"""TOML into typed structs: every error names the file, the key, and what to do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitward.config import build_config, format_toml, parse_toml, read_config
from splitward.errors import ConfigError


class Tls(msgspec.Struct, frozen=True):
    """A table within a table that may be absent."""

    ca: str


class Broker(msgspec.Struct, frozen=True):
    """A nested table."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1883
    tls: Tls | None = None


class Camera(msgspec.Struct, frozen=True):
    """An element of an array of tables."""

    index: int
    rate_hz: float = 1.0


class Config(msgspec.Struct, frozen=True):
    """Every form of nesting."""

    site: str = "demo"
    broker: Broker = Broker()
    cameras: tuple[Camera, ...] = ()
    labels: dict[str, str] = {}


def read(tmp_path: Path, text: str) -> Config:
    """`text` as a configuration file."""
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, Config)


def error(tmp_path: Path, text: str) -> str:
    """What is said of `text`."""
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'config.toml'}: ")
    return str(refused.value)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Config()


def test_every_value_arrives(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
        site = "ward 7"
        labels = { any-key = "is allowed" }
        [broker]
        host = "broker.example"
        tls = { ca = "ca.pem" }
        [[cameras]]
        index = 0
        [[cameras]]
        index = 1
        rate_hz = 25
        """,
    )
    assert config == Config(
        site="ward 7",
        broker=Broker(host="broker.example", tls=Tls("ca.pem")),
        cameras=(Camera(0), Camera(1, 25.0)),
        labels={"any-key": "is allowed"},
    )


@pytest.mark.parametrize(
    ("text", "key", "advice"),
    [
        ('sight = "x"', "sight", "Did you mean 'site'?"),
        ("xyz = 1", "xyz", "Known keys: broker, cameras, labels, site."),
        ("[broker]\nhosts = 1", "broker.hosts", "Did you mean 'broker.host'?"),
        ("[broker]\nzzz = 1", "broker.zzz", "Known keys: host, port, tls."),
        ("[broker.tls]\nca_file = 1", "broker.tls.ca_file", "Known keys: ca."),
        ("[[cameras]]\nindex = 0\n[[cameras]]\nrate = 2", "cameras.rate", "Did you mean 'cameras.rate_hz'?"),
    ],
)
def test_an_unknown_key_is_named_with_advice(tmp_path: Path, text: str, key: str, advice: str) -> None:
    message = error(tmp_path, text)
    assert f"unknown key '{key}'" in message
    assert message.endswith(advice)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("site = 7", "Expected `str`, got `int` - at `$.site`"),
        ('[broker]\nport = "1883"', "Expected `int`, got `str` - at `$.broker.port`"),
        ("[broker]\nport = 0", "Expected `int` >= 1 - at `$.broker.port`"),
        ("broker = 7", "Expected `object`, got `int` - at `$.broker`"),
        ("[[cameras]]\nindex = true", "Expected `int`, got `bool` - at `$.cameras[0].index`"),
        ("[[cameras]]\nrate_hz = 2", "missing required field `index` - at `$.cameras[0]`"),
        ("[broker.tls]", "missing required field `ca` - at `$.broker.tls`"),
        ("site = 2026-01-01", "Expected `str`, got `date` - at `$.site`"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error(tmp_path, text)


@pytest.mark.parametrize("text", ["site", "site = ", 'site = "a"\nsite = "b"', "[broker", '{"site": "a"}'])
def test_what_is_not_toml_is_said_so(tmp_path: Path, text: str) -> None:
    assert "is not TOML" in error(tmp_path, text)


def test_bytes_that_are_not_utf_8_are_not_toml(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b'site = "\xff"')
    with pytest.raises(ConfigError, match="is not TOML"):
        read_config(tmp_path / "config.toml", Config)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: no such file\. .* --config"):
        read_config(tmp_path / "nothing.toml", Config)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path, Config)


def test_values_from_elsewhere_name_their_origin() -> None:
    assert build_config({"site": "a"}, Config, where="--set") == Config(site="a")
    with pytest.raises(ConfigError, match=r"^--set: unknown key 'sites'"):
        build_config({"sites": "a"}, Config, where="--set")


VALUES = st.text() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), VALUES | st.lists(VALUES), max_size=4))
@example({"emoji": "p\U0001f600w", "controls": "\x00\x1f\x7f\x80\u2028", "ends": [math.inf, -math.inf, 1e300]})
def test_what_is_written_as_toml_is_read_again(values: dict[str, Any]) -> None:
    assert parse_toml(format_toml({"agent": values, "every": [values, values]})) == {
        "agent": values,
        "every": [values, values],
    }


def test_nan_is_written_and_none_is_left_out() -> None:
    assert math.isnan(parse_toml(format_toml({"x": math.nan}))["x"])
    assert format_toml({"x": None, "y": 1}) == "y = 1\n"
