"""Log lines, for people or as JSON objects; both processes write theirs to standard error.

Fields of a line are given as ``extra=fields(...)``. Prompts, outputs, bodies and keys never are.
"""

import logging
from datetime import UTC, datetime

import msgspec

FORMATS = ("text", "json")

_KEY = "fields"
_QUIET = ("alembic", "watchfiles")
"""Libraries that tell of things that are no news here."""


def configure(form: str) -> None:
    """Send what is logged to standard error.

    Args:
        form: One of ``FORMATS``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def fields(**values: object) -> dict[str, object]:
    """``extra`` of a log line with these fields; those that are None are left out."""
    return {_KEY: {name: value for name, value in values.items() if value is not None}}


class TextLines(logging.Formatter):
    """``LEVEL logger: message name=value ...``."""

    def __init__(self) -> None:
        """Set the format."""
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without an exception's lines."""
        line = super().formatMessage(record)
        return " ".join([line, *(f"{name}={value}" for name, value in _fields(record).items())])


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _fields(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = getattr(record, _KEY, {})
    return found
