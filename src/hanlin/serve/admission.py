"""Who may enter the engine next: a bounded waiting room, fair between keys."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field

from hanlin.serve.errors import busy
from hanlin.serve.keys import Key

__all__ = ["Admission", "Ticket"]


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request's place.

    Attributes:
        sequences, tokens: that it brings: replies, and tokens of prompts and replies at most.
    """

    key: Key
    sequences: int
    tokens: int
    let_in: asyncio.Future[None] = field(repr=False)
    entered: float = 0.0


class Admission:
    """For one model. All in one event loop.

    A free place goes to the key with the fewest sequences running; among those, to the request that waits longest. So a
    key that sends a thousand requests slows itself down, and others by one place at most.

    Attributes:
        running, waiting: sequences and requests.
    """

    def __init__(self, *, places: int, queued_requests: int, queued_tokens: int) -> None:
        self.places = places
        self.queued_requests = queued_requests
        self.queued_tokens = queued_tokens
        self.running = 0
        self._by_key: Counter[str] = Counter()
        self._waiting: dict[str, deque[Ticket]] = {}
        self._tokens_waiting = 0
        self._seconds = 1.0  # that a request takes, on average

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def enter_now(self, key: Key, *, sequences: int, tokens: int) -> Ticket | None:
        """A place, if one is free and nobody waits."""
        if self._waiting or self.running >= self.places:
            return None
        ticket = Ticket(key=key, sequences=sequences, tokens=tokens, let_in=asyncio.get_running_loop().create_future())
        self._seat(ticket)
        return ticket

    async def enter(self, key: Key, *, sequences: int, tokens: int) -> Ticket:
        """Wait for a place.

        Raises:
            ApiError: 429 when the waiting room is full, at once.
        """
        loop = asyncio.get_running_loop()
        ticket = Ticket(key=key, sequences=sequences, tokens=tokens, let_in=loop.create_future())
        waiting = self.waiting
        crowded = waiting >= self.queued_requests or (waiting and self._tokens_waiting + tokens > self.queued_tokens)
        if self.running >= self.places and crowded:
            seconds = self._seconds * (waiting + 1) / max(1, self.places)
            raise busy("the server is busy: too many requests are waiting. Come again later.", min(seconds, 60))
        self._waiting.setdefault(key.name, deque()).append(ticket)
        self._tokens_waiting += tokens
        self._let_in()
        try:
            await ticket.let_in
        except BaseException:
            self._give_up(ticket)
            raise
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The request is over."""
        self.running -= ticket.sequences
        self._by_key[ticket.key.name] -= ticket.sequences
        if not self._by_key[ticket.key.name]:
            del self._by_key[ticket.key.name]
        spent = asyncio.get_running_loop().time() - ticket.entered
        self._seconds += 0.1 * (spent - self._seconds)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.running < self.places:
            name = min(self._waiting, key=lambda n: self._by_key[n])  # of equals, who has been listed longest
            line = self._waiting.pop(name)
            ticket = line.popleft()
            if line:
                self._waiting[name] = line  # at the end
            self._tokens_waiting -= ticket.tokens
            if ticket.let_in.cancelled():  # it has given up, and has not run since
                continue
            self._seat(ticket)

    def _seat(self, ticket: Ticket) -> None:
        self.running += ticket.sequences
        self._by_key[ticket.key.name] += ticket.sequences
        ticket.entered = asyncio.get_running_loop().time()
        ticket.let_in.set_result(None)

    def _give_up(self, ticket: Ticket) -> None:
        line = self._waiting.get(ticket.key.name)
        if line is not None and ticket in line:
            line.remove(ticket)
            self._tokens_waiting -= ticket.tokens
            if not line:
                del self._waiting[ticket.key.name]
        elif ticket.let_in.done() and not ticket.let_in.cancelled():
            self.leave(ticket)
