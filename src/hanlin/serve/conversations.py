"""Replies that are polled for: bounded in number, forgotten when nobody asks."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from hanlin.serve.errors import ApiError, busy

__all__ = ["Conversation", "Conversations"]

_MOST = 1024  # conversations kept
_UNREAD_SECONDS = 60.0  # after which nobody is thought to ask any more
_READ_SECONDS = 300.0  # that a finished reply is kept


@dataclass(eq=False, kw_only=True)
class Conversation:
    text: str = ""
    handled: bool = False
    finished: bool = False
    error: ApiError | None = None
    asked: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None

    @property
    def stale(self) -> bool:
        return time.monotonic() - self.asked > (_READ_SECONDS if self.finished else _UNREAD_SECONDS)


class Conversations:
    """Replies that are polled for, by key and request id."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Conversation] = {}

    def add(self, key: str, request_id: str) -> Conversation:
        """Raises:
        ApiError: 409 when the id is in use, 429 when too many are kept.
        """
        self.sweep()
        if (key, request_id) in self._kept:
            raise ApiError(409, f"request_id {request_id!r} is in use", code="id_in_use", param="request_id")
        if len(self._kept) >= _MOST:
            raise busy("too many conversations are waiting to be read", _UNREAD_SECONDS)
        self._kept[key, request_id] = found = Conversation()
        return found

    def get(self, key: str, request_id: str) -> Conversation:
        """Raises:
        ApiError: 404.
        """
        self.sweep()
        found = self._kept.get((key, request_id))
        if found is None:
            raise ApiError(
                404, f"no conversation with request_id {request_id!r}; it may have expired", code="not_found"
            )
        found.asked = time.monotonic()
        return found

    def sweep(self) -> None:
        """Forget what nobody asks for; what still runs is ended."""
        for name in [name for name, kept in self._kept.items() if kept.stale]:
            kept = self._kept.pop(name)
            if kept.task is not None:
                kept.task.cancel()
