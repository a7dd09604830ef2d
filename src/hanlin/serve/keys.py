"""API keys: read from a file or the environment, compared in constant time, each with its own rate."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hanlin.errors import ConfigError, problems

__all__ = ["ANONYMOUS", "Key", "KeyRing", "Rates"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Key:
    """Who asks. Only the SHA-256 of the secret is kept.

    Attributes:
        requests_per_minute, tokens_per_minute: None is unlimited; tokens count prompt and reply.
    """

    name: str
    digest: bytes = field(default=b"", repr=False)
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    @property
    def salt(self) -> bytes:
        """What keeps this key's cached prefixes apart from others'."""
        return self.digest


ANONYMOUS = Key(name="anonymous")


@dataclass(frozen=True)
class KeyRing:
    """The keys that are let in. Empty: nobody is asked for one."""

    keys: tuple[Key, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys)

    @classmethod
    def read(
        cls, *, given: Iterable[str] = (), file: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> KeyRing:
        """Keys given by hand, in a file, and in HANLIN_API_KEY, HANLIN_API_KEYS or VLLM_API_KEY.

        A key is `secret` or `name:secret`; several in the environment stand between commas or spaces. A line of the
        file is `[name:]secret [requests per minute [tokens per minute]]`, `-` for no limit; `#` starts a comment.

        Raises:
            ConfigError: naming every line that cannot be read, without its secret.
        """
        found: list[str] = []
        keys: list[Key] = []

        def add(where: str, text: str, rates: list[str]) -> None:
            name, colon, secret = text.partition(":")
            if not colon:
                name, secret = f"key-{len(keys) + 1}", text
            limits = [_rate(rate) for rate in rates]
            if not _NAME.fullmatch(name):
                found.append(f"{where}: a name is letters, digits, '.', '_' and '-', 64 at most")
            elif not _KEY.fullmatch(secret):
                found.append(f"{where}: a key is 1..512 printable ASCII characters without spaces")
            elif len(limits) > 2 or any(limit is not None and not limit > 0 for limit in limits):
                found.append(f"{where}: after the key come at most two positive numbers, or '-'")
            else:
                requests, tokens = (*limits, None, None)[:2]
                keys.append(
                    Key(name=name, digest=_digest(secret), requests_per_minute=requests, tokens_per_minute=tokens)
                )

        for number, text in enumerate(given, 1):
            add(f"key {number}", text, [])
        for variable in ("HANLIN_API_KEY", "HANLIN_API_KEYS", "VLLM_API_KEY"):
            for text in re.split(r"[,\s]+", (environment or {}).get(variable, "")):
                if text:
                    add(variable, text, [])
        if file is not None:
            for number, line in enumerate(_lines(file), 1):
                words = line.split("#")[0].split()
                if words:
                    add(f"{file}, line {number}", words[0], words[1:])
        for what, values in (("name", [k.name for k in keys]), ("key", [k.digest for k in keys])):
            if len(set(values)) < len(values):
                found.append(f"the same {what} is given twice")
        if found:
            raise ConfigError(problems("API keys", found))
        return cls(tuple(keys))

    def find(self, secret: str) -> Key | None:
        """The key of this secret. Takes the same time whatever is wrong with it: all are compared, by their hashes."""
        digest, found = _digest(secret), None
        for key in self.keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


@dataclass
class _Bucket:
    level: float
    at: float


class Rates:
    """Token buckets that hold one minute's worth: of requests, and of tokens, for each key."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def take_request(self, key: Key) -> float:
        """Count a request; returns 0, or the seconds after which one would be let in."""
        wait = max(
            self._wait(key.name, "requests", key.requests_per_minute, 1.0),
            self._wait(key.name, "tokens", key.tokens_per_minute, 1.0),
        )
        if not wait and key.requests_per_minute:
            self._buckets[key.name, "requests"].level -= 1
        return wait

    def spend(self, key: Key, tokens: int) -> None:
        """Count tokens that were used. The bucket may become negative: what is running is not cut."""
        if key.tokens_per_minute:
            self._wait(key.name, "tokens", key.tokens_per_minute, 1.0)
            self._buckets[key.name, "tokens"].level -= tokens

    def _wait(self, name: str, what: str, rate: float | None, need: float) -> float:
        if not rate:
            return 0.0
        now = time.monotonic()
        full = max(rate, 1.0)
        bucket = self._buckets.setdefault((name, what), _Bucket(full, now))
        bucket.level = min(full, bucket.level + (now - bucket.at) * rate / 60)
        bucket.at = now
        return max(0.0, (need - bucket.level) * 60 / rate)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _rate(text: str) -> float | None:
    if text == "-":
        return None
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MOST_FILE_BYTES + 1)
        if len(data) > _MOST_FILE_BYTES:
            raise ConfigError(f"{file}: larger than {_MOST_FILE_BYTES >> 20} MiB, no file of keys")
        return data.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the API keys cannot be read: {error}") from error
