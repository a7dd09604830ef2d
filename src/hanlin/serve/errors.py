"""Errors as HTTP answers, in OpenAI's shape unless a route speaks another API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hanlin.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    DownloadError,
    EngineError,
    HanlinError,
    MissingExtraError,
    ModelNotFoundError,
    RequestError,
)

__all__ = ["ApiError", "DisconnectedError", "busy", "describe", "error_body", "model_not_found", "openai_body"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        code: a word for programs. param: the field that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


class DisconnectedError(Exception):
    """The client has gone; nobody hears the answer."""


def busy(message: str, seconds: float, *, code: str = "overloaded") -> ApiError:
    """429 with the time after which to come again."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(seconds)))})


def model_not_found(name: str, known: list[str]) -> ApiError:
    listed = ", ".join(known[:20])
    return ApiError(404, f"model {name!r} is not served here. Served: {listed}.", code="model_not_found", param="model")


def describe(error: BaseException) -> ApiError:
    """Any error as an answer. What is not meant for clients keeps its text in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, CapacityError):
        return ApiError(503, str(error), code="insufficient_memory", headers={"Retry-After": "30"})
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, MissingExtraError):
        return ApiError(501, str(error), code="missing_extra")
    if isinstance(error, (ConfigError, ModelNotFoundError, DownloadError, HanlinError)):
        return ApiError(500, "the model cannot be loaded; the server's log says why", code="model_load_failed")
    return ApiError(500, "internal error; the server's log says more", code="internal_error")


_ANTHROPIC_TYPES = {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """As the API writes it to which the path belongs."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else error.type)
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    if path.startswith("/api/"):
        return {"error": error.message}
    return openai_body(error)


def openai_body(error: ApiError) -> dict[str, Any]:
    """As OpenAI writes it."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
