"""`/set name value`: the sampling parameters that a person may change, and how their values are typed."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from hanlin.errors import RequestError, problems
from hanlin.types import SamplingParams

__all__ = ["NAMES", "changed", "shown"]

# A chat shows one reply and no probabilities.
NAMES: tuple[str, ...] = tuple(f.name for f in fields(SamplingParams) if f.name not in ("n", "logprobs"))
_TEXTS = ("stop", "bad_words")


def changed(sampling: SamplingParams, name: str, typed: str, default: SamplingParams) -> SamplingParams:
    """A copy in which `name` has the value that was typed; the word `default` brings back the model's own.

    Raises:
        RequestError: an unknown name, or a value that the parameter cannot take.
    """
    name = known(name)
    if typed == "default":
        return sampling.override(**{name: getattr(default, name)})
    return sampling.override(**{name: _value(name, typed)})


def shown(sampling: SamplingParams, name: str) -> str:
    """The value as it can be typed again."""
    value = getattr(sampling, known(name))
    if value is None:
        return "none"
    return json.dumps(value if isinstance(value, (bool, int, float, str, tuple)) else dict(value), ensure_ascii=False)


def known(name: str) -> str:
    """The parameter's own name; `max-tokens` is read as `max_tokens`.

    Raises:
        RequestError: no such parameter.
    """
    plain = name.replace("-", "_")
    if plain not in NAMES:
        raise RequestError(problems("/set", [f"unknown parameter {name!r}"], f"Known: {', '.join(NAMES)}."))
    return plain


def _value(name: str, typed: str) -> Any:
    if typed.lower() in ("none", "null"):
        return () if name in (*_TEXTS, "stop_token_ids") else {} if name == "logit_bias" else None
    try:
        value = json.loads(typed)
    except (ValueError, RecursionError):
        value = {"on": True, "true": True, "off": False, "false": False}.get(typed.lower(), typed)
    if name in _TEXTS:
        return tuple(value) if isinstance(value, list) else value if isinstance(value, str) else typed
    if name == "stop_token_ids":
        return tuple(value) if isinstance(value, list) else (value,)
    if name == "logit_bias" and isinstance(value, dict):
        return {int(key) if key.isdecimal() else key: bias for key, bias in value.items()}
    return value
