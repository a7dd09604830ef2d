"""What can be set when serving."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanlin.errors import ConfigError, problems
from hanlin.serve.keys import KeyRing

__all__ = ["Limits", "ModelSpec", "ServeConfig", "is_loopback"]


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be reached from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model to serve.

    Attributes:
        source: as for `hanlin.load`; None is the default model.
        name: under which it is asked for; "" is the model's own.
        aliases: further names.
        options: of `hanlin.load`.
        adapters: LoRA adapters, name to directory; each is asked for like a model.
    """

    source: str | None = None
    name: str = ""
    aliases: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, one key and all of them together may take.

    Attributes:
        body_bytes: of a request's body.
        prompt_tokens: of one prompt; None is what the model's context holds.
        max_tokens: of one reply; None is what the model's context holds.
        completions: replies to one request at most: prompts times n.
        inputs: texts of one request for embeddings or scores at most.
        top_logprobs: alternatives beside each token at most.
        stops: stop texts of one request at most, and `stop_chars` the length of each.
        queued_requests: waiting for the engine at most; more are answered 429.
        queued_tokens: of the prompts that wait and of the replies they may get, at most.
        running: sequences of one model in the engine at once; None is the engine's own `max_batch_size`.
        request_seconds: for a whole request; 0 is no limit.
        read_seconds: for a client to send its headers, or its body.
        write_seconds: for a client to take the next piece of a stream.
        drain_seconds: for running requests at shutdown.
    """

    body_bytes: int = 8 << 20
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    completions: int = 128
    inputs: int = 2048
    top_logprobs: int = 20
    stops: int = 16
    stop_chars: int = 1024
    queued_requests: int = 512
    queued_tokens: int = 4 << 20
    running: int | None = None
    request_seconds: float = 3600.0
    read_seconds: float = 30.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        found = []
        for name, value in vars(self).items():
            if name.endswith("_seconds"):
                good = type(value) in (int, float) and math.isfinite(value) and value >= 0
                wanted = "a number >= 0"
            else:
                good = value is None or (type(value) is int and value >= 1)
                wanted = "a whole number >= 1"
            if not good:
                found.append(f"{name} must be {wanted}, not {value!r}")
        if found:
            raise ConfigError(problems("limits of the server", found))


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How to serve.

    Attributes:
        models: what is served; the first is loaded at start, the others when they are asked for.
        host, port: where to listen; port 0 takes a free one.
        keys: who may come; needed on any address but loopback.
        allowed_hosts: names by which this server may be called, beside loopback, addresses and its own name.
        cors_origins: pages of other origins that may call; none by default.
        certificate, private_key: files for TLS.
        memory_budget: bytes that all loaded models may take; None is what the machine has free.
        keep_alive: seconds that a model stays loaded without being asked for; None is for ever.
        any_model_name: requests for unknown models go to the first.
        adapter_directory: whose folders requests may load as LoRA adapters; None lets them load none.
        legacy_chatglm: ChatGLM-6B's own routes, `POST /` and `/chat` with `/get_response`; VisualGLM's `POST /`.
        page: the chat page at `/`.
        log_format: text or json. log_prompts: write prompts and replies to the log.
        trace_endpoint: where OpenTelemetry spans go.

    Raises:
        ConfigError: naming everything that cannot be.
    """

    models: tuple[ModelSpec, ...] = (ModelSpec(),)
    host: str = "127.0.0.1"
    port: int = 8000
    keys: KeyRing = field(default_factory=KeyRing)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    certificate: Path | None = None
    private_key: Path | None = None
    memory_budget: int | None = None
    keep_alive: float | None = None
    any_model_name: bool = False
    adapter_directory: Path | None = None
    legacy_chatglm: bool = False
    page: bool = True
    log_format: str = "text"
    log_prompts: bool = False
    trace_endpoint: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        found = []
        if not self.models:
            found.append("no model is given")
        names = [name for spec in self.models for name in (spec.name, *spec.aliases, *spec.adapters) if name]
        found += [f"the name {name!r} is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            found.append(f"port must be in 0..65535, not {self.port!r}")
        if not is_loopback(self.host) and not self.keys:
            found.append(
                f"host {self.host!r} can be reached from other machines, and there is no API key: "
                "set HANLIN_API_KEY, or give --api-key-file, or keep to 127.0.0.1"
            )
        found += [
            f"{name} {value!r} must be like https://example.org"
            for name, values in (("cors_origins", self.cors_origins),)
            for value in values
            if not re.fullmatch(r"https?://[^/*\s]+", value)
        ]
        if (self.certificate is None) != (self.private_key is None):
            found.append("TLS needs both a certificate and a private key")
        found += [
            f"no such file: {p}" for p in (self.certificate, self.private_key) if p is not None and not p.is_file()
        ]
        if self.adapter_directory is not None and not self.adapter_directory.is_dir():
            found.append(f"no such directory: {self.adapter_directory}")
        if self.log_format not in ("text", "json"):
            found.append(f"log_format must be text or json, not {self.log_format!r}")
        if found:
            raise ConfigError(problems("server", found))
