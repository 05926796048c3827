"""`edge check`, `bench`, `diagnostics` and `model`, as an engineer runs them; the units that start the agent."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge.agent import run_agent
from edge.check import _sources, check_device
from edge.cli import main
from edge.config import EdgeConfig
from edge.install import EXAMPLE, STATE
from edge.models import ModelStore
from edge.settings import load_settings
from edge.system.health import main as health_of_container
from edge.system.site import AGENT_ID
from firmware_sim.broker import Broker, free_port
from splitward.config import build_config, parse_toml

UNITS = Path(str(files("edge"))) / "systemd"


@pytest.fixture
def settings(tmp_path: Path, tiny_bundle: Any, monkeypatch: Any) -> Path:
    monkeypatch.setenv("SPLITWARD_EDGE__BROKER__PASSWORD", "hunter2")
    path = tmp_path / "edge.toml"
    path.write_text(
        f"""
        [device]
        bundle = "{tiny_bundle.path}"
        trusted_key = "{tiny_bundle.trusted_key}"
        state_dir = "{tmp_path}/state"
        [capture]
        kind = "folder"
        path = "{tmp_path}"
        [health]
        log_file = "{tmp_path}/edge.log"
        """
    )
    return path


def test_check_finds_a_sound_board_sound(
    settings: Path, mosquitto: Broker, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("SPLITWARD_EDGE__BROKER__PORT", str(mosquitto.port))
    monkeypatch.setenv("SPLITWARD_EDGE__BROKER__USERNAME", "anybody")
    assert main(["check", "--config", str(settings), "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert {
        "clock",
        "processor",
        "memory",
        "disk",
        "secret",
        "spool",
        "bundle",
        "orders",
        "tls",
        "source",
        "broker",
    } <= set(found)
    assert "golden input agrees" in found["bundle"]["detail"]
    assert "Success" in found["broker"]["detail"]


def test_check_says_what_is_wrong_and_fails(
    settings: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("SPLITWARD_EDGE__BROKER__PORT", "1")
    monkeypatch.setenv("SPLITWARD_EDGE__CAPTURE__PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("SPLITWARD_EDGE__RUNTIME__PROVIDERS", '["tensorrt"]')
    monkeypatch.setenv("SPLITWARD_EDGE__DEVICE__ORDER_KEY", str(tmp_path / "order.pub"))
    assert main(["check", "--config", str(settings)]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = {line.split()[1]: line for line in lines if line.startswith("fail")}
    assert set(failed) == {"bundle", "orders", "source", "broker"}
    assert "TensorrtExecutionProvider" in failed["bundle"]
    assert "order.pub" in failed["orders"]
    assert "127.0.0.1:1" in failed["broker"]
    monkeypatch.delenv("SPLITWARD_EDGE__RUNTIME__PROVIDERS")
    monkeypatch.delenv("SPLITWARD_EDGE__DEVICE__ORDER_KEY")
    assert main(["check", "--config", str(settings), "--quick"]) == 0


@pytest.mark.parametrize(("answer", "state"), [(0, "ok"), (5, "warn"), (-1, "warn")])
def test_check_calls_no_clock_kept_that_it_cannot_ask_about(
    settings: Path, monkeypatch: Any, answer: int, state: str
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *words, **options: SimpleNamespace(adjtimex=lambda _: answer))
    (clock,) = [one for one in check_device(load_settings(settings), quick=True) if one.name == "clock"]
    assert clock.state == state
    assert ("cannot be asked here" in clock.detail) == (answer == -1)


def test_check_looks_at_a_receivers_folder(settings: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPLITWARD_EDGE__CAPTURE__KIND", "receiver")
    monkeypatch.setenv("SPLITWARD_EDGE__CAPTURE__PATH", str(tmp_path / "new" / "received"))
    look = lambda: next(_sources(load_settings(settings)))  # noqa: E731  # of all checks this one: others take long
    assert look().state == "ok"
    (tmp_path / "new").write_bytes(b"")
    assert look().state == "fail"
    monkeypatch.setenv("SPLITWARD_EDGE__CAPTURE__LISTEN", "here")
    assert "'here': is not HOST:PORT. Set `capture.listen`." in look().detail
    monkeypatch.setitem(sys.modules, "pynetdicom", None)  # as where it is not installed
    assert (look().state, "pynetdicom: is not installed" in look().detail) == ("fail", True)


def test_bench_measures_every_variant_and_chooses(settings: Path, capsys: Any) -> None:
    assert main(["bench", "--config", str(settings), "--frames", "30", "--json", "--choose"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert [one["variant"] for one in report["variants"]] == [
        "onnx-float32",
        "onnx-int8",
        "tflite-float32",
        "tflite-int8",
    ]
    fastest = min(report["variants"], key=lambda one: one["runtime_us_p50"])["variant"]
    runtime = load_settings(settings).runtime
    assert f"{runtime.backend}-{runtime.precision}" == fastest, "it is kept for the next start"
    for one in report["variants"]:
        assert one["error"] == ""
        assert 0 < one["runtime_us_p50"] <= one["runtime_us_p99"]
        assert one["rss_mb"] > 10
        assert one["message_bytes"] > 128
    best = min(report["variants"], key=lambda one: one["runtime_us_p50"])
    chosen = load_settings(settings).runtime
    assert f"{chosen.backend}-{chosen.precision}" == best["variant"]
    assert best["variant"] in said.err


def test_diagnostics_hold_no_secret(settings: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "edge.log").write_text('{"message": "a line"}\n')
    assert main(["diagnostics", "--config", str(settings), "--out", str(tmp_path / "out")]) == 0
    path = Path(capsys.readouterr().out.strip())
    with tarfile.open(path) as archive:
        parts = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]  # files only
    assert set(parts) == {
        "check.json",
        "config.json",
        "models.json",
        "spool.json",
        "system.json",
        "logs/edge.log",
    }
    whole = b"".join(parts.values())
    assert b"hunter2" not in whole
    assert (tmp_path / "state" / "secret").read_bytes() not in whole
    assert json.loads(parts["config.json"])["broker"]["password"] == "(secret)"


def test_a_bundle_is_installed_and_rolled_back_by_hand(
    settings: Path, tmp_path: Path, tiny_bundle: Any, capsys: Any
) -> None:
    second = tiny_bundle.rewrite(tmp_path / "second.bundle", name="second", created_at="2026-03-01T00:00:00Z")
    old = tiny_bundle.rewrite(tmp_path / "old.bundle", name="old", created_at="2020-01-01T00:00:00Z")
    asked = ["--config", str(settings)]
    assert main(["model", "install", *asked, str(second.path)]) == 0
    assert "second" in capsys.readouterr().out
    assert main(["model", "install", *asked, str(old.path)]) == 2
    assert "refused: older" in capsys.readouterr().err
    assert main(["model", "install", *asked, "--allow-older", str(old.path)]) == 0
    capsys.readouterr()
    assert main(["model", "list", *asked, "--json"]) == 0
    assert sorted(one["state"] for one in json.loads(capsys.readouterr().out)) == [
        "installed",
        "previous",
        "trial",
    ]
    assert main(["model", "rollback", *asked]) == 0
    assert "the configured bundle" in capsys.readouterr().out, "the second one never ran"
    (tmp_path / "no.bundle").write_bytes(b"nothing")
    assert main(["model", "install", *asked, str(tmp_path / "no.bundle")]) == 2
    assert "refused: unreadable" in capsys.readouterr().err


def test_what_commands_of_root_write_is_the_agent_s(settings: Path, tmp_path: Path, tiny_bundle: Any) -> None:
    if os.geteuid():
        pytest.skip("only root writes into other users' folders: run as root")
    second = tiny_bundle.rewrite(tmp_path / "second.bundle", name="second", created_at="2026-03-01T00:00:00Z")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, AGENT_ID, AGENT_ID)
    asked = ["--config", str(settings)]
    assert main(["check", *asked, "--quick"]) == 0
    assert main(["bench", *asked, "--frames", "5", "--choose"]) == 0
    assert main(["model", "install", *asked, str(second.path)]) == 0
    written = [path.relative_to(state).as_posix() for path in state.rglob("*")]
    assert {"secret", "remote.json", "models/active.json"} < set(written)
    assert {path.stat().st_uid for path in state.rglob("*")} == {AGENT_ID}, written


def test_no_bundle_runs_where_nothing_says_which(settings: Path, tmp_path: Path, capsys: Any) -> None:
    models = tmp_path / "state/models"
    models.mkdir(parents=True)
    (models / "active.json").write_text("{")
    assert main(["run", "--config", str(settings)]) == 2
    assert "active.json: cannot be read" in capsys.readouterr().err
    assert main(["diagnostics", "--config", str(settings), "--out", str(tmp_path)]) == 0, "now they are needed"


def test_the_configured_bundle_does_not_stand_in_for_one_that_is_gone(
    settings: Path, tmp_path: Path, tiny_bundle: Any, capsys: Any
) -> None:
    second = tiny_bundle.rewrite(tmp_path / "second.bundle", name="second", created_at="2026-03-01T00:00:00Z")
    asked = ["--config", str(settings)]
    assert main(["model", "install", *asked, str(second.path)]) == 0
    models = ModelStore(load_settings(settings))
    models.accept()
    models.path().unlink()
    capsys.readouterr()
    said = f"{models.path()}: is gone"
    assert main(["run", *asked]) == 2
    assert said in capsys.readouterr().err
    assert main(["check", *asked]) == 1
    (line,) = [one for one in capsys.readouterr().out.splitlines() if said in one]
    assert line.startswith("fail  bundle")
    shutil.copy(second.path, models.path())
    assert ModelStore(load_settings(settings)).path() == models.path()


def test_a_port_that_is_taken_costs_the_metrics_and_not_the_agent(settings: Path, caplog: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        environment = {
            "SPLITWARD_EDGE__HEALTH__METRICS": address,
            "SPLITWARD_EDGE__BROKER__PORT": str(free_port()),
        }
        stop = threading.Event()
        stop.set()
        assert run_agent(load_settings(settings, environment), stop=stop).captured == 0
    assert address in caplog.text


def test_the_container_s_health_goes_by_the_agent_s_own_settings(settings: Path, monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        port = broker.getsockname()[1]
        assert health_of_container([str(settings)]) == 1
        with socket.create_connection(("127.0.0.1", port)):
            monkeypatch.setenv("SPLITWARD_EDGE__BROKER__PORT", str(port))
            assert health_of_container([str(settings)]) == 0


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "binary"])
def test_enrolment_says_that_the_token_s_file_cannot_be_read(
    tmp_path: Path, capsys: Any, content: bytes | None
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    asked = ["--url", "https://127.0.0.1", "--site", "s", "--device", "d", "--out", str(tmp_path)]
    assert main(["enroll", "--token-file", str(path), *asked]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edge: --token-file {path}: ")


@pytest.mark.parametrize(
    "url", ["cloud.example.org", "http://127.0.0.1", "https://[::1", "https://127.0.0.1/ä", ""]
)
def test_enrolment_says_that_an_address_is_none(tmp_path: Path, capsys: Any, url: str) -> None:
    asked = ["--token", "t", "--site", "s", "--device", "d", "--out", str(tmp_path)]
    assert main(["enroll", "--url", url, *asked]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no HTTPS address" in line


@pytest.mark.parametrize("spoilt", ["", "models", "models/staging"])
def test_installing_says_that_the_state_folder_cannot_be_used(
    settings: Path, tmp_path: Path, tiny_bundle: Any, capfd: Any, spoilt: str
) -> None:
    path = tmp_path / "state" / spoilt
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert main(["model", "install", "--config", str(settings), str(tiny_bundle.path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert str(path) in line


def test_the_example_that_install_writes_runs_with_what_it_installs() -> None:
    config = build_config(parse_toml(EXAMPLE), EdgeConfig, where="example")
    assert config.capture.kind == "folder", "a camera needs OpenCV, which is not among it"
    assert Path(config.capture.path).is_relative_to(STATE), "elsewhere the unit lets nothing be written"


def test_the_units_are_hardened_and_start_the_agent() -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their capitals
    parser.read(UNITS / "splitward-edge.service")
    service = dict(parser["Service"])
    assert service["Type"] == "notify"
    assert service["ExecStart"].split()[1:4] == ["-m", "edge", "run"]
    assert (service["NoNewPrivileges"], service["ProtectSystem"], service["User"]) == (
        "yes",
        "strict",
        "splitward",
    )
    assert service["CapabilityBoundingSet"] == ""
    for unit in UNITS.glob("*.service"):
        for line in ("LimitCORE=0", "StateDirectoryMode=0700", "UMask=0077"):
            assert f"\n{line}\n" in unit.read_text(), f"{unit.name}: {line}"
    assert int(service["WatchdogSec"]) > 0
    assert service["OOMPolicy"] == "continue", "the agent would end with a releaser that runs out of memory"
    if shutil.which("systemd-analyze"):  # what else would read them is not on every machine
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(UNITS / "splitward-edge.service")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Unknown" not in done.stderr
