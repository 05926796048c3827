"""HTTPS to the cloud and to the folder of images: small answers, and files whose broken transfer goes on."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import random
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from edge.errors import FetchError
from edge.logs import shown_address

TIMEOUT_S = 30.0
PAUSE_S, LONGEST_PAUSE_S = 1.0, 120.0
CHUNK_BYTES = 64 << 10
MAX_ANSWER_BYTES = 1 << 20
FREE_BYTES = 16 << 20
"""Space that a fetch leaves on the disk for the spool."""
_FINAL = frozenset({400, 401, 403, 404, 405, 409, 410, 422})
log = logging.getLogger(__name__)


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        _check_https(arguments[-1])
        return super().redirect_request(*arguments)


def post_json(url: str, body: dict[str, Any], ca: str | None) -> dict[str, Any]:
    """Answer to a JSON request.

    Raises
    ------
    FetchError
        `bad_url`, `unreachable`, `bad_answer`, or `http_STATUS` with the problem's own detail.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    data = _ask(_request(url, headers, msgspec.json.encode(body)), ca)
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise FetchError("bad_answer", f"{shown_address(url)}: does not answer in JSON: {error}.") from error


def get(url: str, ca: str | None) -> bytes:
    """First `MAX_ANSWER_BYTES` of what lies at `url`; `FetchError` as `post_json`."""
    return _ask(_request(url, {}), ca)


def fetch_file(url: str, target: Path, sha256: str, size: int, ca: str | None, tries: int) -> None:
    """Fetch `size` bytes to `target`, going on with what is there, and check their SHA-256.

    Raises
    ------
    FetchError
        `bad_url`, `no_space`, `unreachable` (after `tries`), `http_STATUS`, `oversize`, or `wrong_hash`; then what was
        fetched is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for attempt in range(tries):
        have = target.stat().st_size if target.exists() else 0
        _check_space(target, size - have)
        try:
            if have < size:
                _fetch_rest(url, target, have, size, ca)
            break
        except FetchError:
            raise
        except (OSError, http.client.HTTPException) as error:
            failure = _error_of(url, error)
            if getattr(error, "code", None) in _FINAL or attempt == tries - 1:
                raise failure from error
            pause_s = min(PAUSE_S * 2.0**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
            log.warning("%s; trying again in %.0f s", failure, pause_s)
            time.sleep(pause_s)
    if target.stat().st_size != size or _sha256(target) != sha256:
        target.unlink()
        raise FetchError(
            "wrong_hash", f"{shown_address(url)}: is not the file that was announced. Announce it again."
        )


def _ask(request: urllib.request.Request, ca: str | None) -> bytes:
    try:
        with _open(request, ca) as answer:
            return bytes(answer.read(MAX_ANSWER_BYTES))
    except (OSError, http.client.HTTPException) as error:
        raise _error_of(request.full_url, error) from error


def _fetch_rest(url: str, target: Path, have: int, size: int, ca: str | None) -> None:
    # No If-Range: a plain web server's tags are its own, and whether the file is still the same its hash says.
    headers = {"Range": f"bytes={have}-"} if have else {}
    with _open(_request(url, headers), ca) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with target.open("ab" if goes_on else "wb") as file:
            written = have if goes_on else 0
            while chunk := answer.read(CHUNK_BYTES):
                written += len(chunk)
                if written > size:
                    raise FetchError("oversize", f"{shown_address(url)}: is longer than was announced.")
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    if written < size:
        raise http.client.IncompleteRead(b"", size - written)


def _request(url: str, headers: dict[str, str], data: bytes | None = None) -> urllib.request.Request:
    _check_https(url)
    return urllib.request.Request(url, data, headers)  # noqa: S310  # HTTPS only


def _open(request: urllib.request.Request, ca: str | None) -> Any:
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _OnlyHttps())
    return opener.open(request, timeout=TIMEOUT_S)


def _check_https(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme == "https" and (parts.path + parts.query).isascii()
    except ValueError:  # such as a bracket that is never closed
        sound = False
    if not sound:
        raise FetchError(
            "bad_url", f"{shown_address(url)}: is no HTTPS address, and nothing is fetched by any other."
        )


def _check_space(target: Path, more: int) -> None:
    disk = os.statvfs(target.parent)
    free = disk.f_bavail * disk.f_frsize
    if more + FREE_BYTES > free:
        raise FetchError(
            "no_space", f"{target.parent}: {free} bytes are free, {more} are to be fetched. Free some space."
        )


def _error_of(url: str, error: Exception) -> FetchError:
    if isinstance(error, urllib.error.HTTPError):
        detail = ""
        try:
            problem = msgspec.json.decode(error.read(MAX_ANSWER_BYTES), type=dict[str, Any])
            detail = str(problem.get("detail") or problem.get("title") or "")
        except (msgspec.DecodeError, OSError):
            pass  # no problem details
        return FetchError(
            f"http_{error.code}", f"{shown_address(url)}: {error.code} {error.reason}. {detail}".strip()
        )
    reason = getattr(error, "reason", None) or error
    return FetchError("unreachable", f"{shown_address(url)}: {reason}. Is the address right, and its `ca`?")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
