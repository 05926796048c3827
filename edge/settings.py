"""The agent's configuration from its sources: the file, then what signed orders changed and what `edge bench` chose,
then the environment.

`SPLITWARD_EDGE__BROKER__HOST=broker.example.org` sets `broker.host`; values are TOML, or else text. Orders may change
what stands in `REMOTE` and nothing else: neither who the device is, nor whom it trusts, nor what leaves it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edge.config import EdgeConfig
from splitward.config import build_config, parse_toml, read_toml
from splitward.disk import write_whole
from splitward.errors import ConfigError

PREFIX = "SPLITWARD_EDGE__"
REMOTE = frozenset(
    {
        "capture.rate_hz",
        "capture.max_unanswered",
        "capture.priority",
        "health.log_level",
        "link.retry_s",
        "link.retry_max_s",
        "link.status_s",
        "link.window",
        "runtime.deadline_s",
        "spool.drop",
        "spool.max_age_s",
        "spool.max_bytes",
        "spool.order",
    }
)
"""Settings that an order may change."""
CHOSEN = frozenset({"runtime.backend", "runtime.precision"})
"""Settings that a person at the device may keep beside those, and no order: another variant rounds to other clean
values, as another number of threads can, so that the noise of a frame is drawn anew, and whoever could order one after
another had the mean of them."""


def load_settings(path: Path | None, environment: Mapping[str, str] = os.environ) -> EdgeConfig:
    """Configuration of the file at `path` (the defaults without one), with everything on top.

    Raises
    ------
    ConfigError
        A file or a variable cannot be used; the message names it and the key.
    """
    values = {} if path is None else read_toml(path)
    where = "defaults" if path is None else str(path)
    changed = {
        key.removeprefix(PREFIX).lower().replace("__", "."): _value_of(text)
        for key, text in environment.items()
        if key.startswith(PREFIX)
    }
    if changed:
        where = f"{where} with {PREFIX}..."
    config = build_config(_overlay(values, changed), EdgeConfig, where)
    remote = _remote_path(config)  # which the environment may have set
    if not remote.exists():
        return config
    values = _overlay(values, _read_remote(remote))
    return build_config(_overlay(values, changed), EdgeConfig, f"{where} with {remote}")


def change_remotely(config: EdgeConfig, arguments: Mapping[str, Any]) -> None:
    """Keep an order's changes for the next start.

    Raises
    ------
    ConfigError
        As `with_changes`; then nothing is kept.
    """
    with_changes(config, arguments)
    _keep(config, arguments)


def choose_variant(config: EdgeConfig, backend: str, precision: str) -> None:
    """Keep the variant of the bundle that a person at the device chose, for the next start.

    Raises
    ------
    ConfigError
        There is no such variant, or what was kept before cannot be read.
    """
    _keep(config, {"runtime.backend": backend, "runtime.precision": precision})


def with_changes(config: EdgeConfig, arguments: Mapping[str, Any]) -> EdgeConfig:
    """The configuration that an order's changes would give.

    Raises
    ------
    ConfigError
        A key may not be changed from afar, or a value cannot be used.
    """
    for key in arguments:
        if key in CHOSEN:
            raise ConfigError(
                f"order: '{key}' may not be changed from afar. Choose on the device: `edge bench --choose`."
            )
        if key not in REMOTE:
            near = difflib.get_close_matches(key, REMOTE, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"These may: {', '.join(sorted(REMOTE))}."
            raise ConfigError(f"order: '{key}' may not be changed from afar. {hint}")
    return _changed(config, arguments)


def _changed(config: EdgeConfig, changes: Mapping[str, Any]) -> EdgeConfig:
    return build_config(_overlay(msgspec.to_builtins(config), changes), EdgeConfig, where="order")


def _keep(config: EdgeConfig, changes: Mapping[str, Any]) -> None:
    path = _remote_path(config)
    kept = msgspec.json.encode({**(_read_remote(path) if path.exists() else {}), **changes})
    # As it will be read: a start that fails could not be ordered back.
    _changed(config, msgspec.json.decode(kept))
    write_whole(path, kept)


def _remote_path(config: EdgeConfig) -> Path:
    return Path(config.device.state_dir) / "remote.json"


def _read_remote(path: Path) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}. Remove it to go back to the configuration file.") from error
    return {key: value for key, value in values.items() if key in REMOTE | CHOSEN}


def _overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with each change set at its dotted key."""
    result = dict(values)
    for key, value in changes.items():
        table, _, rest = key.partition(".")
        result[table] = _overlay(result.get(table) or {}, {rest: value}) if rest else value
    return result


def _value_of(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
