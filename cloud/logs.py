"""The service's log: text for people, or one JSON object a line for what gathers logs."""

from __future__ import annotations

import logging
from contextvars import ContextVar

import msgspec

from cloud.config import LogConfig

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being answered: what is logged meanwhile tells it."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if given := request_id.get():
            line["request_id"] = given
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """A line for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, after it the request's id if there is one."""
        line = super().format(record)
        return f"{line} [{given}]" if (given := request_id.get()) else line


def start_log(config: LogConfig) -> None:
    """Write the log to stderr as configured."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    logging.basicConfig(level=config.level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
