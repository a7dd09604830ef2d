"""What Transformers calls a cache: `cache` since 5.24, `past_key_values` before. Either name is taken, always."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hanlin.errors import RequestError

__all__ = ["CACHE", "NAMES", "only_cache", "renamed"]

NAMES = ("cache", "past_key_values")
# The name of this version, for outputs and for what `generate` hands from step to step.
CACHE = NAMES[0] if NAMES[0] in {field.name for field in fields(BaseModelOutputWithPast)} else NAMES[1]


def only_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The one that was given, under whichever name.

    Raises:
        RequestError: both were, or something that is no Cache.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise RequestError("give cache or past_key_values, which is its older name, not both")
    given = past_key_values if cache is None else cache
    if isinstance(given, (tuple, list)):
        raise RequestError("past_key_values must be a Cache, such as DynamicCache(); tuples are no longer taken")
    return given


def renamed(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `generate`, with a cache under the name that this version takes without a warning."""
    if not any(name in options for name in NAMES):
        return options
    rest = {key: value for key, value in options.items() if key not in NAMES}
    return {**rest, CACHE: only_cache(options.get(NAMES[0]), options.get(NAMES[1]))}
