"""The OpenAPI description, made true: errors as they are answered, and keys where they are asked for."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from hanlin.serve.errors import ApiError, error_body
from hanlin.serve.settings import ServeConfig

__all__ = ["description"]

_ERRORS = {
    "400": "The request cannot be served as asked; the message names all that is wrong.",
    "403": "This Host or Origin may not call.",
    "404": "No such model, or nothing of this name.",
    "408": "The request took too long.",
    "413": "The body is too large.",
    "429": "Too much is waiting, or the key's rate is used up; `Retry-After` says when to come again.",
    "431": "Too many headers, or too long.",
    "500": "The server is at fault; its log says more.",
    "503": "No room in memory, shutting down, or an engine has died.",
}
_KEYLESS = {"401": "An API key is needed, or this one is unknown."}
_OPEN = ("/health",)
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "password": {"type": "http", "scheme": "basic", "description": "Any name; the key is the password."},
}
_TEXT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "null"}]}


def description(app: FastAPI, config: ServeConfig) -> dict[str, Any]:
    """What `/openapi.json` answers."""
    out: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = out.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which are never answered here
        schemas.pop(name, None)
    errors = {**_ERRORS, **(_KEYLESS if config.keys else {})}
    for path, methods in out["paths"].items():
        schema = _shape(error_body(path, ApiError(400, "")))
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if path in _OPEN:
                continue
            for status, text in errors.items():
                content = {"application/json": {"schema": schema}}
                operation["responses"].setdefault(status, {"description": text, "content": content})
            if config.keys:
                operation["security"] = [{name: []} for name in _KEYS]
    if config.keys:
        out["components"]["securitySchemes"] = _KEYS
    return out


def _shape(example: Any) -> dict[str, Any]:
    """A schema of an error like this one."""
    if isinstance(example, dict):
        properties = {name: _shape(value) for name, value in example.items()}
        return {"type": "object", "properties": properties, "required": list(example)}
    return _TEXT if example is None else {"type": "string"}
