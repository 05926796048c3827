"""The fetch of a system update against a real HTTPS server, and the check-in against a table of connections."""

from __future__ import annotations

import hashlib
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edge.errors import FetchError, SystemUpdateError
from edge.system.checkin import connections, settle, wait_for_checkin
from edge.system.site import UpdateConfig
from edge.system.slot import SystemdBoot, current_slot
from edge.system.update import Release, fetch_bundle, fetch_release
from firmware_sim.authority import Authority

DATA = bytes(range(256)) * 4096


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `DATA` with ranges and a tag of its own, as web servers do; breaks off after `limit` bytes of a body."""

    limit: ClassVar[int] = len(DATA)
    ranges: ClassVar[bool] = True
    starts: ClassVar[list[int]] = []
    manifest: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if self.headers.get("If-Range", '"tag"') != '"tag"':
            start = 0
        body = self.manifest if self.path.endswith("update.json") else DATA[start:]
        if not self.path.endswith("update.json"):
            self.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"tag"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.limit])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpdateConfig]:
    Server.limit, Server.ranges, Server.starts = len(DATA), True, []
    Server.manifest = json.dumps(
        {
            "build": 2,
            "version": "2",
            "file": "edge.raucb",
            "size": len(DATA),
            "sha256": hashlib.sha256(DATA).hexdigest(),
        }
    ).encode()
    folder = tmp_path_factory.mktemp("server")
    Authority(folder).issue("server", ("127.0.0.1",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"https://127.0.0.1:{server.server_address[1]}/ward"
        yield UpdateConfig(url=address, ca=str(folder / "ca.pem"))
        server.shutdown()


def test_a_bundle_is_fetched_and_kept(tmp_path: Path, config: UpdateConfig) -> None:
    release = fetch_release(config)
    assert release.version == "2"
    path = fetch_bundle(config, release, tmp_path)
    assert path.read_bytes() == DATA
    assert fetch_bundle(config, release, tmp_path) == path
    assert Server.starts == [0]


def test_a_broken_fetch_goes_on_where_it_was(tmp_path: Path, config: UpdateConfig) -> None:
    release = fetch_release(config)
    Server.limit = 300_000
    with pytest.raises(FetchError, match="more expected"):
        fetch_bundle(config, release, tmp_path)
    Server.limit = len(DATA)
    assert fetch_bundle(config, release, tmp_path).read_bytes() == DATA
    assert Server.starts == [0, 300_000]


def test_a_server_without_ranges_gives_the_whole_again(tmp_path: Path, config: UpdateConfig) -> None:
    release = fetch_release(config)
    (tmp_path / f"{release.sha256}.raucb").write_bytes(b"stale")
    Server.ranges = False
    assert fetch_bundle(config, release, tmp_path).read_bytes() == DATA


def test_what_differs_from_the_manifest_is_thrown_away(tmp_path: Path, config: UpdateConfig) -> None:
    release = Release(2, "2", "edge.raucb", len(DATA), "0" * 64)
    (tmp_path / "older.raucb").write_bytes(b"of another release")
    with pytest.raises(FetchError, match="is not the file that was announced"):
        fetch_bundle(config, release, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"build": 2, "version": "2", "file": "../etc", "size": 1, "sha256": "' + "0" * 64 + '"}'],
)
def test_a_bad_manifest_is_refused(config: UpdateConfig, text: str) -> None:
    Server.manifest = text.encode()
    with pytest.raises(SystemUpdateError, match=r"update.json"):
        fetch_release(config)


def test_nobody_there_and_no_https_are_fetch_errors() -> None:
    with pytest.raises(FetchError, match="Is the address right"):
        fetch_release(UpdateConfig(url="https://127.0.0.1:9/ward"))
    with pytest.raises(FetchError, match="is no HTTPS address"):
        fetch_release(UpdateConfig(url="http://127.0.0.1:9/ward"))


def test_only_the_agents_own_connections_to_the_broker_count(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    rows = [
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
        "   0: 0F02000A:9C40 0202000A:22B3 01 00000000:00000000 00:00000000 00000000   900        0 111 1",
        "   1: 0F02000A:9C41 0202000A:22B3 02 00000000:00000000 00:00000000 00000000   900        0 222 1",
        "   2: 0F02000A:9C42 0202000A:22B3 01 00000000:00000000 00:00000000 00000000     0        0 333 1",
        "   3: 0F02000A:9C43 0202000A:0050 01 00000000:00000000 00:00000000 00000000   900        0 444 1",
    ]
    table.write_text("\n".join(rows) + "\n")
    assert connections(8883, 900, (table, tmp_path / "tcp6")) == {"111"}


BROKEN = '[broker]\nhost = "x"\nold_key = 1\n'


def test_a_version_that_cannot_use_its_settings_has_not_checked_in(tmp_path: Path, capsys: Any) -> None:
    settings = tmp_path / "edge.toml"
    assert not wait_for_checkin(settings, 900, (), 0.1)
    settings.write_text(BROKEN)
    assert not wait_for_checkin(settings, 900, (), 0.1)
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("edge.toml: ")[2][:13] for line in said] == ["no such file.", "unknown key '"]
    entries = tmp_path / "loader/entries"
    entries.mkdir(parents=True)
    (entries / f"slot-{current_slot()}+2-1.conf").touch()
    assert settle(SystemdBoot(tmp_path), checked_in=False), "it must restart"
    assert [path.name for path in entries.iterdir()] == [f"slot-{current_slot()}+2-1.conf"]


def test_settings_that_are_mended_in_time_keep_the_slot(tmp_path: Path, monkeypatch: Any) -> None:
    settings, table = tmp_path / "edge.toml", tmp_path / "tcp"
    settings.write_text(BROKEN)
    table.write_text("head\n0: 0F02000A:9C40 0202000A:22B3 01 0:0 0:0 0 900 0 111 1\n")
    mended = threading.Timer(
        0.2, settings.write_text, ['[device]\nid = "d"\n[broker]\nhost = "x"\nport = 8883\n']
    )
    monkeypatch.setattr("edge.system.checkin.HOLD_S", 0.0)
    monkeypatch.setattr("edge.system.checkin.POLL_S", 0.01)
    mended.start()
    assert wait_for_checkin(settings, 900, (table,), 60.0)
    mended.join()
