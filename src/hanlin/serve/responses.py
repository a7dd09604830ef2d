"""Answers of /v1/responses that are kept, for the next turn and for whoever asks again."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from hanlin.serve.errors import ApiError
from hanlin.types import Message

__all__ = ["Kept", "Responses"]

# Of one key; whoever keeps more loses the oldest.
_MOST = 512
_MOST_BYTES = 32 << 20


@dataclass(eq=False, kw_only=True)
class Kept:
    """
    Attributes:
        answer: the response object.
        messages: the conversation up to its end, without instructions.
        items: what the request's input was, as items.
        nbytes: about what it takes.
        task: what still works on it.
    """

    answer: dict[str, Any]
    messages: tuple[Message, ...]
    items: list[dict[str, Any]]
    nbytes: int
    task: asyncio.Task[None] | None = None


class Responses:
    """By key and id, in memory, the oldest forgotten first."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[str, Kept]] = {}

    def keep(self, key: str, kept: Kept) -> None:
        """Keep an answer, or its newer state."""
        mine = self._kept.setdefault(key, OrderedDict())
        mine[kept.answer["id"]] = kept
        while len(mine) > 1 and (len(mine) > _MOST or sum(each.nbytes for each in mine.values()) > _MOST_BYTES):
            self._end(mine.popitem(last=False)[1])

    def find(self, key: str, response_id: str, *, param: str = "response_id") -> Kept:
        """Raises:
        ApiError: 404; 400 for a field of a request.
        """
        mine = self._kept.get(key)
        kept = mine.get(response_id) if mine else None
        if kept is None:
            asked = param == "response_id"
            status, code = (404, "response_not_found") if asked else (400, "previous_response_not_found")
            raise ApiError(status, f"no response {response_id[:80]!r} is kept here", code=code, param=param)
        return kept

    def forget(self, key: str, response_id: str) -> None:
        """Raises:
        ApiError: 404.
        """
        self._end(self.find(key, response_id))
        del self._kept[key][response_id]

    def close(self) -> None:
        """End what still runs."""
        for mine in self._kept.values():
            for kept in mine.values():
                self._end(kept)

    def _end(self, kept: Kept) -> None:
        if kept.task is not None:
            kept.task.cancel()
