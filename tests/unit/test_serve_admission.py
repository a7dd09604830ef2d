"""The waiting room: bounded, fair between keys, and never holding a place for somebody who has left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanlin.serve.admission import Admission, Ticket
from hanlin.serve.errors import ApiError
from hanlin.serve.keys import Key

A, B = Key(name="a"), Key(name="b")


def room(places: int = 2, requests: int = 3, tokens: int = 100) -> Admission:
    return Admission(places=places, queued_requests=requests, queued_tokens=tokens)


async def soon(admission: Admission, key: Key, sequences: int = 1, tokens: int = 1) -> asyncio.Task[Ticket]:
    task = asyncio.ensure_future(admission.enter(key, sequences=sequences, tokens=tokens))
    await asyncio.sleep(0)
    return task


def test_who_has_just_given_up_is_passed_over() -> None:
    """Cancelled, but not run since: a place must not go to such a one, nor the error to who makes room."""

    async def scenario() -> None:
        admission = room(places=1)
        first, second, third = [await soon(admission, key) for key in (A, A, B)]
        second.cancel()
        admission.leave(first.result())
        admission.leave(await third)
        await asyncio.gather(second, return_exceptions=True)
        assert (admission.running, admission.waiting) == (0, 0)
        await admission.enter(A, sequences=1, tokens=100)

    asyncio.run(scenario())


def test_the_room_is_bounded_by_requests_and_by_tokens() -> None:
    async def scenario() -> None:
        admission = room()
        running = [await soon(admission, A) for _ in range(2)]
        waiting = [await soon(admission, A, tokens=30) for _ in range(3)]
        assert all(task.done() for task in running) and not any(task.done() for task in waiting)
        with pytest.raises(ApiError) as caught:
            await admission.enter(A, sequences=1, tokens=1)
        assert caught.value.status == 429 and int(caught.value.headers["Retry-After"]) >= 1
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        with pytest.raises(ApiError):
            await admission.enter(A, sequences=1, tokens=41)
        fits = await soon(admission, A, tokens=40)
        for task in (*running, *waiting[1:], fits):
            admission.leave(await task)
        assert admission.running == admission.waiting == 0

    asyncio.run(scenario())


def test_a_free_place_goes_to_the_key_with_the_fewest() -> None:
    async def scenario() -> None:
        admission = room(places=2, requests=100)
        first = [await soon(admission, A) for _ in range(2)]
        crowd = [await soon(admission, A) for _ in range(10)]
        late = await soon(admission, B)
        admission.leave(first[0].result())
        await asyncio.sleep(0)
        assert late.done() and not any(task.done() for task in crowd)
        admission.leave(late.result())
        await asyncio.sleep(0)
        assert [task.done() for task in crowd] == [True] + [False] * 9  # in the order of their coming

    asyncio.run(scenario())


def test_one_request_may_bring_more_than_there_are_places() -> None:
    async def scenario() -> None:
        admission = room(places=2)
        ticket = await admission.enter(A, sequences=50, tokens=1)
        assert admission.running == 50
        behind = await soon(admission, A)
        assert not behind.done()
        admission.leave(ticket)
        admission.leave(await behind)

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.sampled_from("enter now leave cancel".split()), st.integers(0, 3)), max_size=60))
def test_nothing_is_lost_and_nobody_waits_beside_a_free_place(moves: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        admission = room(places=3, requests=5, tokens=10**6)
        tasks: list[Any] = []
        for move, which in moves:
            if move == "enter":
                tasks.append(await soon(admission, Key(name=str(which)), sequences=1 + which % 2))
            elif move == "now":
                free = admission.running < 3 and not admission.waiting
                ticket = admission.enter_now(Key(name=str(which)), sequences=1 + which % 2, tokens=1)
                assert (ticket is not None) == free
                if ticket is not None:
                    tasks.append(asyncio.get_running_loop().create_future())
                    tasks[-1].set_result(ticket)
            elif tasks:
                task = tasks.pop(which % len(tasks))
                if not task.done():
                    task.cancel()
                elif task.exception() is None:
                    admission.leave(task.result())
                await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0)
            held = sum(t.result().sequences for t in tasks if t.done() and not t.cancelled() and not t.exception())
            waits = sum(not t.done() for t in tasks)
            assert (admission.running, admission.waiting) == (held, waits)
            assert not waits or admission.running >= 3
        for task in tasks:
            if not task.done():
                task.cancel()
            elif not task.exception():
                admission.leave(task.result())
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(scenario())


def test_who_leaves_while_being_let_in_gives_the_place_back() -> None:
    async def scenario() -> None:
        admission = room(places=1)
        ticket = await admission.enter(A, sequences=1, tokens=1)
        next_one = await soon(admission, A)
        admission.leave(ticket)  # lets the next one in ...
        next_one.cancel()  # ... who is cancelled before he can notice
        await asyncio.gather(next_one, return_exceptions=True)
        assert admission.running == 0

    asyncio.run(scenario())
