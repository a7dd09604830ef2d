"""The chat page: files that lie beside this package, nothing else."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from hanlin.serve.errors import ApiError

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent.parent / "page"
_TYPES = MappingProxyType(
    {
        ".html": "text/html",
        ".js": "text/javascript",
        ".css": "text/css",
        ".svg": "image/svg+xml",
        ".json": "application/json",
    }
)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """One of its files."""
    return _file(name)


def _file(name: str) -> Response:
    files = {file.name: file for file in _FOLDER.iterdir() if file.suffix in _TYPES}  # no path is made of a request
    if name not in files:
        raise ApiError(404, "Not Found")
    kind = _TYPES[files[name].suffix]
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return FileResponse(files[name], media_type=f"{kind}; charset=utf-8", headers=headers)
