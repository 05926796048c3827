"""What the agent looks after once in a while: its certificate, which is renewed before it ends."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from edge.config import EdgeConfig
from edge.health import certificate_expires_apart

FIRST_S, PERIOD_S, LIMIT_S = 30.0, 6 * 3600.0, 120.0
log = logging.getLogger(__name__)


class Upkeep:
    """Renews the certificate in a process of its own, where the configuration names a cloud.

    Attributes
    ----------
    certificate_expires_at_ns : int or None
        None without one, and in the first moments, as the agent does not wait for it.
    """

    def __init__(self, config: EdgeConfig, now_s: float) -> None:
        self._config = config
        self._due_s = now_s + FIRST_S
        self._renewed = threading.Event()
        tls = config.broker.tls
        self._files = (
            None if tls is None or tls.cert is None or tls.key is None else (Path(tls.cert), Path(tls.key))
        )
        if self._files is not None and any(path.with_name(path.name + ".new").exists() for path in self._files):
            from edge.enrolment import finish_renewal  # a power cut was in the middle of it

            finish_renewal(*self._files)
        self.certificate_expires_at_ns: int | None = None
        if self._files is not None:
            threading.Thread(target=self._look, name="certificate", daemon=True).start()

    def turn(self, now_s: float) -> bool:
        """Start what is due; whether a new certificate is there since the last turn."""
        if self._files is not None and self._config.cloud.url is not None and now_s >= self._due_s:
            self._due_s = now_s + PERIOD_S
            threading.Thread(target=self._renew, name="renewal", daemon=True).start()
        if not self._renewed.is_set():
            return False
        self._renewed.clear()
        return True

    def _renew(self) -> None:
        before = self._stamp()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "edge.enrolment"],
                input=msgspec.json.encode(self._config),
                capture_output=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            log.error("the certificate was not renewed within %.0f s", LIMIT_S)
            return
        if done.returncode:
            log.error("the certificate is not renewed: %s", done.stderr.decode(errors="replace").strip()[-300:])
        elif self._stamp() != before:
            log.info("the certificate is renewed")
            self._look()
            self._renewed.set()

    def _stamp(self) -> int:
        assert self._files is not None  # noqa: S101  # only then a renewal is due
        return self._files[0].stat().st_mtime_ns

    def _look(self) -> None:
        if self._files is not None:
            self.certificate_expires_at_ns = certificate_expires_apart(self._files[0])
