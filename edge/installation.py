"""Fetch, verify and probe a bundle, and put it among the installed ones. It does not run yet.

The agent does this in a process of its own (`python -m edge.installation`, request on standard input, report on
standard output): a bundle that crashes or hangs the runtime takes down that process only, and its memory goes with it.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from edge.config import EdgeConfig
from edge.errors import FetchError, UpdateError
from edge.models import ModelStore
from edge.secret import load_secret
from splitward.disk import make_folder
from splitward.errors import BundleError, SplitwardError

if TYPE_CHECKING:
    from splitward.wire.bundle import Bundle

PROBE_S = 60.0


class InstallRequest(Struct, frozen=True, kw_only=True):
    """What to install: the file at `path`, or else what `url` gives, which must have `sha256` and `size`."""

    config: EdgeConfig
    path: str = ""
    url: str = ""
    sha256: str = ""
    size: int = 0
    model: str = ""
    allow_older: bool = False


class InstallReport(Struct, frozen=True):
    """What came of it; `reason` is empty where it is installed as `model`."""

    model: str = ""
    name: str = ""
    reason: str = ""
    message: str = ""


def install(request: InstallRequest) -> InstallReport:
    """Install in this process; what is refused is reported, not raised."""
    from splitward.wire.bundle import read_bundle, read_trusted_key

    try:
        store = ModelStore(request.config)
    except SplitwardError as error:
        return InstallReport(request.model, reason="not_installed", message=str(error))
    staged = store.staging / f"{request.sha256 or 'file'}.bundle"
    try:
        _stage(request, staged)
        bundle = read_bundle(staged, read_trusted_key(Path(request.config.device.trusted_key)))
        _check_identity(request, bundle, store)
        _probe(bundle, request.config)
        store.take(staged, bundle.model.hex())
    except (BundleError, FetchError, UpdateError) as error:
        if error.reason not in ("unreachable", "no_space"):  # of a transfer that may go on
            _discard(staged)
        return InstallReport(request.model, reason=error.reason, message=str(error))
    except (SplitwardError, OSError) as error:
        _discard(staged)
        return InstallReport(request.model, reason="not_installed", message=str(error))
    return InstallReport(bundle.model.hex(), bundle.manifest.name)


def install_apart(
    request: InstallRequest, started: Callable[[subprocess.Popen[bytes]], None] = lambda _: None
) -> InstallReport:
    """As `install`, in a process of its own, given to `started`, within the configured time."""
    limit_s = request.config.update.fetch_s
    command = [sys.executable, "-m", "edge.installation"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        started(process)
        try:
            answer, _ = process.communicate(msgspec.json.encode(request), limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return InstallReport(
                request.model, reason="timeout", message=f"not installed within {limit_s:.0f} s."
            )
    if process.returncode != 0:
        reason = "probe_hung" if process.returncode == -signal.SIGALRM else "probe_crashed"
        return InstallReport(
            request.model, reason=reason, message=f"the probe ended with {process.returncode}."
        )
    return msgspec.json.decode(answer, type=InstallReport)


def _discard(staged: Path) -> None:
    with suppress(
        OSError
    ):  # what keeps it from being removed kept it from being written, and is what is reported
        staged.unlink()


def _stage(request: InstallRequest, staged: Path) -> None:
    if request.path:
        make_folder(staged.parent, 0o700)
        staged.unlink(missing_ok=True)  # never written through: it may be a link
        shutil.copyfile(request.path, staged)
        return
    if request.size > request.config.update.max_bytes:
        limit = request.config.update.max_bytes
        raise UpdateError("oversize", f"{request.size} bytes are announced; `update.max_bytes` allows {limit}.")
    for other in staged.parent.glob(f"{'?' * len(request.sha256)}.bundle"):
        if other != staged:  # of an order that this one has taken the place of
            other.unlink(missing_ok=True)
    from edge.fetch import fetch_file

    update, cloud = request.config.update, request.config.cloud
    fetch_file(request.url, staged, request.sha256, request.size, cloud.ca, update.fetch_tries)


def _check_identity(request: InstallRequest, bundle: Bundle, store: ModelStore) -> None:
    if request.model and request.model != bundle.model.hex():
        raise UpdateError(
            "wrong_model", f"the file is model {bundle.model.hex()}, announced was {request.model}."
        )
    if request.allow_older:
        return
    from splitward.wire.bundle import read_bundle, read_trusted_key

    try:
        running = read_bundle(store.path(), read_trusted_key(Path(request.config.device.trusted_key)))
    except SplitwardError:
        return  # what runs cannot be read: anything sound is better
    # ISO 8601 in UTC sorts as it reads.
    if bundle.manifest.created_at < running.manifest.created_at:
        raise UpdateError(
            "older",
            f"{bundle.manifest.name} was made {bundle.manifest.created_at}, what runs {running.manifest.created_at}. "
            "Order it with `allow_older` to go back.",
        )


def _probe(bundle: Bundle, config: EdgeConfig) -> None:
    """Load the bundle as the releaser would; the kernel ends this process if that takes too long."""
    from edge.model import ClientModel

    signal.setitimer(signal.ITIMER_REAL, PROBE_S)
    try:
        ClientModel(bundle, config.runtime, load_secret(config.device.secret_path))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def main() -> int:
    """Read a request, install, and write the report."""
    report = install(msgspec.json.decode(sys.stdin.buffer.read(), type=InstallRequest))
    sys.stdout.buffer.write(msgspec.json.encode(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
