"""Ollama's times: a number of seconds, or Go's "5m", "1h30m", "-1"."""

from __future__ import annotations

import math
import re

from hanlin.errors import RequestError

__all__ = ["seconds"]

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(value: float | str | None) -> float | None:
    """Seconds; negative is for ever, None is not given.

    Raises:
        RequestError
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        parts = re.findall(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", text)
        if re.fullmatch(r"[-+]?\d+(\.\d*)?", text):
            value = float(text)
        elif parts and "".join(number + unit for number, unit in parts) == text.lstrip("+-"):
            value = sum(float(number) * _UNITS[unit] for number, unit in parts) * (-1 if text[0] == "-" else 1)
        else:
            raise RequestError(f"keep_alive {text[:40]!r} is no time: write like 5m, 90s or -1")
    if not math.isfinite(value):
        raise RequestError("keep_alive must be finite")
    return float(value)
