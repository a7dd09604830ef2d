"""Bodies of requests: JSON as its standard has it, and nothing that only Python's reader takes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["JsonRoute", "parse_json"]


def parse_json(data: bytes | str) -> Any:
    """The value. Strings hold whole characters, numbers are finite, and 200 levels are the most.

    Raises:
        HTTPException: 400, with what is wrong and where.
    """
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


class JsonRoute(APIRoute):
    """A route whose body is read by `parse_json`: nesting, `NaN`, and half characters end there, as 400."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly
