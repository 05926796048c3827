"""The service's log: text for people, or one JSON object a line for what gathers logs."""

from __future__ import annotations

import logging

import msgspec

from cloud.config import LogConfig


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
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def start_log(config: LogConfig) -> None:
    """Write the log to stderr as configured."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if config.format == "json" else text)
    logging.basicConfig(level=config.level, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("gmqtt").setLevel(logging.ERROR)  # cloud.transport reports what matters of it
