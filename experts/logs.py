"""How every process of the service logs: lines of text or of JSON on stderr, from one configuration.

A line may carry fields besides its message: ``logger.info("it began", extra=fields(request_id="a"))``. Where Ray runs a
process, it brings stderr to the terminal of whoever started the service, and keeps it in a file.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

OURS = ("arriero", "cluster", "router", "experts")

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    format: LogFormat = "text"
    level: LogLevel = "info"


def configure_logging(settings: LogSettings, *, process: str) -> None:
    """For this process, named in each line; may be called again, for example once its name is known. Ours from the
    settings' level on, of everybody else's what is a warning."""
    formatter = JsonFormatter(process) if settings.format == "json" else TextFormatter(process)
    # Not sys.stderr: in a replica that may be Serve's own log file.
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.level.upper())


def fields(**values: object) -> dict[str, Any]:
    """What a logger takes as ``extra``: values to be found in the line under their names; None is left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


class TextFormatter(logging.Formatter):
    """``time LEVEL process logger: message name=value ...``; stack traces follow on lines of their own."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process.replace('%', '%%')} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 logging's name
        values = "".join(f" {name}={as_word(value)}" for name, value in _fields_of(record).items())
        return super().formatMessage(record) + values


class JsonFormatter(logging.Formatter):
    """One JSON object to a line: time, level, process, pid, logger, message, the line's fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def as_word(value: object) -> str:
    """In quotes where it would not be one word, so that no value can pass for several."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    found: Mapping[str, object] = getattr(record, "fields", {})
    return found
