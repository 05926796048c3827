"""What the agent is told, what it keeps secret, and what it must not load."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from edge.cli import main
from edge.config import BrokerConfig, EdgeConfig, TlsConfig
from edge.errors import LinkError
from edge.link import Link
from edge.secret import load_secret
from edge.spool import Spool
from splitward.config import build_config
from splitward.errors import ConfigError


def test_the_agent_loads_no_heavy_library() -> None:
    heavy = {"torch", "cv2", "onnxruntime", "ai_edge_litert", "pydicom", "PIL"}
    code = (
        f"import edge.agent, edge.cli, sys; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_complete() -> None:
    assert build_config({}, EdgeConfig, where="test") == EdgeConfig()


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("device", "id", "no/slash"),
        ("device", "id", "newline\n"),
        ("device", "site", ""),
        ("capture", "kind", "scanner"),
        ("capture", "rate_hz", -1),
        ("runtime", "threads", 0),
        ("runtime", "precision", "float16"),
        ("broker", "port", 70000),
        ("spool", "drop", "all"),
        ("link", "window", 0),
        ("link", "windwo", 16),
    ],
)
def test_a_bad_value_is_refused_by_its_name(table: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{table}\.{key}"):
        build_config({table: {key: value}}, EdgeConfig, where="edge.toml")


def numbers_of(kind: Any, table: str = "") -> list[tuple[str, str]]:
    """Every (table, key) of a number in the configuration."""
    found = []
    for field in msgspec.structs.fields(kind):
        inner = [part for part in (field.type, *get_args(field.type)) if isinstance(part, type)]
        structs = [part for part in inner if issubclass(part, msgspec.Struct)]
        if structs:
            found += numbers_of(structs[0], f"{table}.{field.name}".strip("."))
        elif isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            found.append((table, field.name))
    return found


NUMBERS = [one for one in numbers_of(EdgeConfig) if one[0] != "sources"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, 10**30, -1, 2**63])
@pytest.mark.parametrize(("table", "key"), NUMBERS)
def test_no_number_is_without_bounds(table: str, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{table}\.{key}"):
        build_config({table: {key: value}}, EdgeConfig, where="edge.toml")


def test_the_longest_and_the_slowest_are_what_clocks_and_timers_take(tmp_path: Path) -> None:
    values = {"spool": {"max_age_s": 10 * 366 * 86400.0}, "runtime": {"deadline_s": 86400.0}}
    config = build_config(values | {"capture": {"rate_hz": 1 / 86400}}, EdgeConfig, where="edge.toml")
    with closing(Spool(tmp_path / "spool.sqlite", config.spool)) as spool:
        spool.expire()
        assert not spool.dropped
    try:
        signal.setitimer(signal.ITIMER_REAL, config.runtime.deadline_s)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    for rate_hz in (1e-300, 1e-6):
        with pytest.raises(ConfigError, match=r"one frame a day.*\$\.capture"):
            build_config({"capture": {"rate_hz": rate_hz}}, EdgeConfig, where="edge.toml")


def test_the_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert load_secret(path) == secret
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_secret(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        load_secret(path)


def test_missing_certificates_are_refused(tmp_path: Path) -> None:
    config = EdgeConfig(broker=BrokerConfig(tls=TlsConfig(ca=str(tmp_path / "nowhere.pem"))))
    with pytest.raises(LinkError, match=r"broker\.tls"):
        Link(config, lambda event: None)


def test_the_command_line_explains_an_error_and_exits_with_2(tmp_path: Path, capsys: Any) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "edge", "run", "--config", str(tmp_path / "nowhere.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "no such file" in process.stderr
    assert "Traceback" not in process.stderr
    with pytest.raises(SystemExit):
        main(["fly"])
