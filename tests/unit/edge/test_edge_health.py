"""What the agent tells of itself: systemd, metrics, log, and what must never be in it."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge.config import EdgeConfig, HealthConfig
from edge.errors import EdgeError
from edge.health import Notifier, certificate_expires_apart, disk_free_bytes, memory_of, temperature_c
from edge.logs import JsonFormatter, TextFormatter, redact, shown_address, start_logging
from edge.metrics import Metric, MetricsServer, render
from edge.pipe import FromReleaser, Logged, Pipe, ToReleaser
from edge.releaser import PipeHandler
from firmware_sim.broker import free_port
from tests.integration.cloud_https import Authority


@pytest.fixture
def notices(tmp_path: Path) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind(str(tmp_path / "notify"))
        door.settimeout(5)
        yield door


def test_systemd_hears_that_the_agent_is_ready_and_lives(tmp_path: Path, notices: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"})
    notifier.say("READY=1", "MAINPID=1")
    assert notices.recv(100) == b"READY=1\nMAINPID=1"
    for now_s in (10.0, 10.5, 11.1, 12.2):
        notifier.live(now_s)
    heard = [notices.recv(100) for _ in range(3)]
    assert heard == [b"WATCHDOG=1"] * 3, "once in a third of the limit"
    notices.setblocking(False)
    with pytest.raises(BlockingIOError):
        notices.recv(100)


def test_without_systemd_nothing_is_said() -> None:
    Notifier({}).say("READY=1")
    Notifier({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}).live(1.0)


def test_the_machine_is_asked_for_its_health(tmp_path: Path) -> None:
    zone = tmp_path / "thermal_zone0"
    zone.mkdir()
    assert temperature_c(tmp_path) is None
    (zone / "temp").write_text("47500\n")
    assert temperature_c(tmp_path) == 47.5
    free = disk_free_bytes(tmp_path)
    assert free is not None
    assert free > 0
    assert disk_free_bytes(tmp_path / "nowhere") is None
    assert 1 < memory_of()["Pss"] <= memory_of()["Rss"] + 1
    assert memory_of(999_999_999) == {}


METRICS = [
    Metric("results_total", "counter", "Frames: results.", {"": 7}),
    Metric("dropped_total", "counter", "Frames lost, by reason.", {'odd "reason"\\\n': 1}, "reason"),
]


def test_metrics_are_in_the_format_of_prometheus() -> None:
    text = render(METRICS)
    assert "# TYPE splitward_edge_results_total counter\nsplitward_edge_results_total 7\n" in text
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus-client")
    families = {one.name: one for one in parser.text_string_to_metric_families(text)}
    (sample,) = families["splitward_edge_dropped"].samples
    assert sample.labels == {"reason": 'odd "reason"\\\n'}


def test_metrics_are_served_on_a_socket_and_on_the_loopback(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    server = MetricsServer(f"unix:{path}", lambda: "here\n")
    try:
        assert path.stat().st_mode & 0o007 == 0
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        assert connection.getresponse().read() == b"here\n"
        connection.close()
    finally:
        server.close()
    assert not path.exists()
    port = free_port()
    server = MetricsServer(f"127.0.0.1:{port}", lambda: "there\n")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.read() == b"there\n"
    finally:
        server.close()
    MetricsServer(f"127.0.0.1:{port}", lambda: "").close()  # a restart, right after a scrape
    with pytest.raises(EdgeError, match=r"health\.metrics"):
        MetricsServer("nonsense", lambda: "")


def record(**extra: str) -> logging.LogRecord:
    made = logging.LogRecord("edge.folder", logging.WARNING, "f.py", 1, "a file is passed over", (), None)
    made.__dict__.update(extra)
    return made


def test_a_log_line_is_json_and_names_no_patient() -> None:
    file = "/images/DOE^JANE 1970-01-01.dcm"
    error = f"{file}: is no whole DICOM file."
    for formatter in (JsonFormatter(), TextFormatter()):
        text = formatter.format(record(file=file, error=error))
        assert "DOE" not in text
        assert "is no whole DICOM file" in text
    line = json.loads(JsonFormatter().format(record(file=file, error=error)))
    assert (line["level"], line["logger"]) == ("warning", "edge.folder")
    assert line["file"] in line["error"], "one pseudonym for one name"
    assert line["file"] == json.loads(JsonFormatter().format(record(file=file)))["file"]


def test_secrets_are_taken_out_by_their_key() -> None:
    shown = redact(
        "",
        {
            "broker": {"password": "hunter2", "host": "h", "tls": {"key": "/etc/k"}},
            "patient": ["4711"],
            "token": None,
        },
    )
    assert shown["broker"] == {"password": "(secret)", "host": "h", "tls": {"key": "(secret)"}}
    assert shown["patient"] != ["4711"]
    assert shown["token"] is None


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://admin:s3cret@10.0.0.7:554/1", "rtsp://10.0.0.7:554/1"),
        ("rtsp://admin:s3=c@ret@10.0.0.7/1", "rtsp://10.0.0.7/1"),
        ("rtsp://admin:s3/cret@10.0.0.7/1", "(address)"),
        ("rtsp://admin:s3[cret@10.0.0.7/1", "(address)"),
        ("http://10.0.0.7/video?user=admin&password=s3cret", "http://10.0.0.7/video"),
        ("rtsp://10.0.0.7/user=admin&password=s3cret", "rtsp://10.0.0.7/user"),
        ("rtspsrc location=rtsp://admin:s3cret@10.0.0.7 ! appsink", "(address)"),
        ("/dev/video0", "/dev/video0"),
        ("0", "0"),
    ],
)
def test_an_address_is_shown_without_its_login(address: str, shown: str) -> None:
    assert shown_address(address) == shown
    assert redact("", {"capture": {"camera": address}, "cloud": {"url": address}}) == {
        "capture": {"camera": shown},
        "cloud": {"url": shown},
    }


@pytest.mark.parametrize("level", ["debug", "info", "error"])
def test_other_libraries_write_no_more_than_warnings_whatever_the_level(tmp_path: Path, level: str) -> None:
    path = tmp_path / "scan.tif"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path, tiffinfo={270: "DOE^JANE 1960-01-01"})
    code = f"""
import logging
from pathlib import Path
from edge.config import HealthConfig
from edge.logs import start_logging
from splitward.imaging.files import read_image
start_logging(HealthConfig(log_level={level!r}))
read_image(Path({str(path)!r}))
logging.getLogger("pydicom").error("DOE^JANE is no date")
logging.getLogger("PIL").warning("theirs")
logging.getLogger("edge.agent").debug("ours")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DOE" not in done.stderr
    assert ("theirs" in done.stderr) == (level != "error")
    assert ("ours" in done.stderr) == (level == "debug")


def test_the_releaser_hands_on_no_chatter_of_other_libraries() -> None:
    ours, theirs = socket.socketpair()
    handler = PipeHandler(Pipe(theirs, ToReleaser))
    with ours, theirs:
        for name in ("PIL.TiffImagePlugin", "edge.folder"):
            handler.handle(logging.makeLogRecord({"name": name, "levelno": logging.DEBUG, "msg": f"of {name}"}))
        theirs.shutdown(socket.SHUT_WR)
        pipe = Pipe(ours, FromReleaser)
        assert pipe.receive() == Logged(logging.DEBUG, "edge.folder", "of edge.folder", {})
        assert pipe.receive() is None


def test_the_log_file_rotates(tmp_path: Path) -> None:
    config = HealthConfig(log_file=str(tmp_path / "log" / "edge.log"), log_bytes=2000, log_files=2)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        start_logging(config)
        for number in range(100):
            logging.getLogger("edge").info("line %d", number)
        for handler in root.handlers:
            handler.close()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    files = sorted((tmp_path / "log").iterdir())
    assert [path.name for path in files] == ["edge.log", "edge.log.1", "edge.log.2"]
    assert all(path.stat().st_size <= 2000 for path in files)
    assert json.loads(files[0].read_text().splitlines()[-1])["message"] == "line 99"


def test_the_default_log_goes_to_standard_error() -> None:
    assert EdgeConfig().health.log_file is None


def test_the_agent_knows_its_certificate_s_end_and_does_not_keep_what_read_it(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    code = f"""
import sys, time
import edge.agent
from edge.config import BrokerConfig, EdgeConfig, TlsConfig
from edge.upkeep import Upkeep
tls = TlsConfig(ca="ca.pem", cert={str(authority.path)!r}, key="device.key")
upkeep = Upkeep(EdgeConfig(broker=BrokerConfig(tls=tls)), time.monotonic())
while upkeep.certificate_expires_at_ns is None:
    time.sleep(0.05)
print(upkeep.certificate_expires_at_ns)
assert "cryptography" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == authority.certificate.not_valid_after_utc.timestamp() * 10**9
    assert certificate_expires_apart(tmp_path / "missing.pem") is None
