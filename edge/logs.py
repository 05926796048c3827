"""The agent's log: text for people, or JSON lines, rotated. What may name a patient is never in it, nor a secret.

Where a file's or a frame's name is of use, it is given as `extra`, and a pseudonym is written in its place: the same
name gives the same pseudonym on this device, so that lines can still be followed.
"""

from __future__ import annotations

import hashlib
import logging
import logging.handlers
import secrets
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import msgspec

from edge.config import HealthConfig
from splitward.errors import ConfigError

SECRET_KEYS = frozenset({"password", "secret", "token", "ticket", "key", "csr", "signature"})
NAMING_KEYS = frozenset({"file", "frame", "patient", "patient_id", "name", "path"})
ADDRESS_KEYS = frozenset({"camera", "url"})
OWN = frozenset({"edge", "splitward", "__main__"})
FIELDS = ("file", "frame", "error", "reason", "order", "count")
_salt = secrets.token_bytes(16)


def start_logging(config: HealthConfig, level: str | None = None) -> None:
    """Send every log line where `config` says; `level` overrides its own.

    Raises
    ------
    ConfigError
        The log file cannot be opened.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if config.log_file is not None:
        try:
            Path(config.log_file).parent.mkdir(parents=True, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(
                config.log_file, maxBytes=config.log_bytes, backupCount=config.log_files, encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError(f"health.log_file = {config.log_file}: {error.strerror}.") from error
    as_json = config.log_format == "json" or config.log_file is not None
    handler.addFilter(is_told)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.raiseExceptions = False  # a full disk must not end the agent, nor its log fill standard error
    logging.basicConfig(level=(level or config.log_level).upper(), handlers=[handler], force=True)


def is_told(record: logging.LogRecord) -> bool:
    """Whether a line may be written: ours, and other libraries' warnings.

    Below that Pillow writes down what a file says of a patient, and pydicom does so in its warnings.
    """
    package = record.name.partition(".")[0]
    return package in OWN or (package != "pydicom" and record.levelno >= logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, and the redacted fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """A line for people, the redacted fields at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = " ".join(f"{key}={value}" for key, value in fields_of(record).items())
        return f"{super().format(record)} {fields}".rstrip()


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """Fields that were given as `extra`, redacted by key; names are taken out of the texts of errors as well."""
    given = {key: str(record.__dict__[key]) for key in FIELDS if key in record.__dict__}
    for name in [given[key] for key in ("file", "frame") if key in given]:
        for key in given.keys() - NAMING_KEYS:
            given[key] = given[key].replace(name, pseudonym(name)).replace(Path(name).name, pseudonym(name))
    return {key: redact(key, value) for key, value in given.items()}


def redact(key: str, value: Any) -> Any:
    """`value`, or what may be shown of it, by its key; nested values likewise."""
    if isinstance(value, dict):
        return {name: redact(name, inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(key, inner) for inner in value]
    if value is None or value == "":
        return value
    if key in SECRET_KEYS:
        return "(secret)"
    if key in ADDRESS_KEYS and isinstance(value, str):
        return shown_address(value)
    return pseudonym(str(value)) if key in ("file", "frame", "patient", "patient_id") else value


def shown_address(address: str) -> str:
    """What may be shown of a camera's or a server's address: its scheme, host and path, and no login or query."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:
        return "(address)"
    if "@" in parts.path + parts.query + parts.fragment:  # of a login that is not where it belongs
        return "(address)"
    path = parts.path.partition("=")[0]  # some cameras take `user=` and `password=` there
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))


def pseudonym(name: str) -> str:
    """What stands for `name` until the agent ends; nobody can guess names by trying them."""
    return "#" + hashlib.blake2b(name.encode(errors="replace"), digest_size=5, key=_salt).hexdigest()
