"""Where log lines go: standard error, as text or as JSON, one a line."""

from __future__ import annotations

import json
import logging
import sys
import time

from hanlin.errors import ConfigError
from hanlin.serve.settings import ServeConfig

__all__ = ["set_up"]

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


def set_up(config: ServeConfig, level: str) -> None:
    """Send what `hanlin` and `uvicorn` log to standard error.

    Raises:
        ConfigError: for a level that is none.
    """
    if level not in _LEVELS:
        raise ConfigError(f"log level must be one of {', '.join(_LEVELS).lower()}, not {level.lower()!r}")
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_Json() if config.log_format == "json" else text)
    for name, least in (("hanlin", level), ("uvicorn", max(level, "WARNING", key=_LEVELS.index))):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
