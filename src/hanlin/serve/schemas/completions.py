"""What /v1/completions takes."""

from __future__ import annotations

from typing import Any

from hanlin.serve.errors import ApiError
from hanlin.serve.schemas.sampling import SamplingBody

__all__ = ["CompletionBody"]

_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionBody(SamplingBody):
    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.n is not None and self.n < 1:
            raise ApiError(400, f"n must be >= 1, not {self.n}", param="n")
        if self.prompt == []:
            raise ApiError(400, "prompt is an empty list", param="prompt")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ApiError(400, f"max_tokens must be >= 0, not {self.max_tokens}", param="max_tokens")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ApiError(400, f"best_of {self.best_of} is less than n {self.n or 1}", param="best_of")
        if self.suffix and self.echo:
            raise ApiError(400, "echo with a suffix has no meaning: the reply stands between two texts", param="echo")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise ApiError(400, "best_of cannot be streamed: the best is known at the end only", param="best_of")

    @property
    def replies(self) -> int:
        """Drawn for each prompt; the best n of them are shown."""
        return self.best_of or self.n or 1

    def overrides(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the request gives. A reply of no tokens is not drawn: see `max_tokens`."""
        values = {"max_tokens": _DEFAULT_TOKENS, **self.sampling(), "n": self.replies}
        if values["max_tokens"] == 0:
            values["max_tokens"] = 1
        if self.logprobs is not None or self.replies > (self.n or 1):
            values["logprobs"] = self.logprobs or 0
        return values
