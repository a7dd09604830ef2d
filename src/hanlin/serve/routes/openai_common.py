"""What OpenAI's routes share: how answers are named, counted and signed."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hanlin import __version__
from hanlin.errors import EngineError
from hanlin.requests import Job
from hanlin.serve.call import Call
from hanlin.types import Completion, TokenLogprob, ToolCall, Usage

__all__ = [
    "Head",
    "call_json",
    "ending",
    "finished",
    "logprob_json",
    "logprobs_json",
    "salted",
    "total_usage",
    "usage_json",
]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all parts of one answer repeat.

    Attributes:
        created: seconds since 1970.
        fingerprint: the same for the same version, model and kind of weights: answers to a seed are comparable then.
    """

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, call: Call, prefix: str) -> Head:
        runner = call.llm.engine.runner
        parts = (__version__, call.lease.served.name, call.lease.adapter, type(runner).__name__, runner.weight_bytes)
        digest = hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()
        return cls(id=prefix + secrets.token_hex(12), model=call.model, fingerprint="fp_" + digest[:12])

    def call_name(self, choice: int, number: int) -> str:
        """What tells a call from all others."""
        return f"{self.id.rpartition('-')[2]}_{choice}_{number}"

    def json(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def salted(jobs: list[Job], salt: str | None) -> list[Job]:
    """The jobs, their cached prefixes kept apart from those of other salts."""
    if not salt:
        return jobs
    digest = hashlib.sha256(salt.encode()).digest()
    return [replace(job, salt=job.salt + digest) for job in jobs]


def finished(done: Completion) -> Completion:
    """Raises:
    EngineError: when the reply was cut off by the server, and is no answer.
    """
    if done.finish_reason == "abort":
        raise EngineError("the reply was cut off")
    return done


def ending(done: Completion) -> dict[str, Any]:
    """What ended a reply (a stop text or id; None for a call, or the model's own end of a turn) and its seed."""
    return {"stop_reason": done.stop or None, "seed": done.seed}


def call_json(call: ToolCall, name: str) -> dict[str, Any]:
    """A call as a function's; an interpreter is a function of `code`. `name` is to be unique over conversations."""
    code = call.kind == "interpreter"
    arguments = json.dumps({"code": call.arguments}, ensure_ascii=False) if code else call.arguments
    return {
        "id": f"call_{name}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def usage_json(prompt: int, generated: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def total_usage(usages: Iterable[tuple[int, Usage]]) -> dict[str, Any]:
    """Of all replies, given with their index: a prompt counts once, not once for each of its n replies."""
    pairs = list(usages)
    first = [usage for index, usage in pairs if index == 0]
    return usage_json(
        sum(usage.prompt_tokens for usage in first),
        sum(usage.generated_tokens for _, usage in pairs),
        sum(usage.cached_tokens for usage in first),
    )


def logprob_json(token: TokenLogprob) -> dict[str, Any]:
    """A token of a chat reply. `bytes` is None for a part of a character, which has no text of its own."""
    return {**_token_json(token), "top_logprobs": [_token_json(other) for other in token.top]}


def logprobs_json(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": [logprob_json(token) for token in tokens], "refusal": None}


def _token_json(token: TokenLogprob) -> dict[str, Any]:
    whole = "\ufffd" not in token.text
    data = list(token.text.encode("utf-8", "replace")) if whole else None
    return {"token": token.text, "bytes": data, "logprob": max(token.logprob, -9999.0)}
