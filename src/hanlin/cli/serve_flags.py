"""How the words behind `hanlin serve` are read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from hanlin.errors import ConfigError, problems

if TYPE_CHECKING:
    from hanlin.serve.settings import ModelSpec

__all__ = [
    "ListFlags",
    "adapters_of",
    "certificates_of",
    "model_of",
    "note_ignored",
    "seconds_of",
    "size_of",
    "template_of",
    "type_of",
]

_LISTS = (
    "--adapters",
    "--lora-modules",
    "--api-key",
    "--api-keys",
    "--served-model-name",
    "--allowed-hosts",
    "--cors-origins",
    "--allowed-origins",
    "--allow-origins",
)
# vLLM's other words for types.
_TYPES = {"half": "float16", "float": "float32"}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class ListFlags(TyperCommand):
    """Lets several words follow some flags: `--adapters a=x b=y` is `--adapters a=x --adapters b=y`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        flag = ""
        for place, word in enumerate(args):
            if word == "--":
                out += args[place:]
                break
            if word.startswith("-"):
                flag = word if word in _LISTS else ""
            elif flag and out[-1] != flag:
                out.append(flag)
            out.append(word)
        return super().parse_args(ctx, out)


def note_ignored(context: Any) -> None:
    """Say which flags were given that change nothing here."""
    given = {word.partition("=")[0] for word in sys.argv if word.startswith("--")}
    for parameter in context.command.params:
        if parameter.name in ("ignored", "ignored_switches"):
            for flag in sorted(given.intersection(parameter.opts)):
                print(f"note: {flag} has no effect here", file=sys.stderr)


def size_of(text: str) -> int:
    """Bytes, from "12G", "512M" or a number; powers of 1024.

    Raises:
        ConfigError
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ConfigError(f"{text!r} is no size: write like 512M or 12G")
    return int(float(match[1]) * _UNITS[match[2]])


def seconds_of(text: str) -> float:
    """Seconds, from "5m", "90s", "1h" or a number; negative means for ever.

    Raises:
        ConfigError
    """
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip().lower())
    if not match:
        raise ConfigError(f"{text!r} is no time: write like 90s or 5m")
    return float(match[1]) * _SECONDS[match[2]]


def type_of(name: str | None) -> str | None:
    """A type of numbers by its own name."""
    return _TYPES.get(name, name) if name else None


def certificates_of(
    certificate: Path | None, private_key: Path | None, environment: Mapping[str, str]
) -> tuple[Path | None, Path | None]:
    """The files for TLS: those given, else those of SSL_CERTFILE and SSL_KEYFILE, as `lmdeploy --ssl` reads them.

    Raises:
        ConfigError: none are named; to serve without TLS is not what was asked for.
    """
    names = ("SSL_CERTFILE", "SSL_KEYFILE")
    files = [
        given or (Path(environment[name]) if environment.get(name) else None)
        for given, name in zip((certificate, private_key), names, strict=True)
    ]
    if None in files:
        raise ConfigError(
            "--ssl needs SSL_CERTFILE and SSL_KEYFILE in the environment, or --ssl-certfile and --ssl-keyfile"
        )
    return files[0], files[1]


def adapters_of(text: str) -> dict[str, str]:
    """Name to directory, from "name=path" lines, or vLLM's '{"name": ..., "path": ...}'.

    Raises:
        ConfigError
    """
    out: dict[str, str] = {}
    found = []
    for item in filter(None, text.split("\n")):
        name, _, path = item.partition("=")
        if item.lstrip().startswith("{"):
            try:
                values = json.loads(item)
                name, path = str(values["name"]), str(values["path"])
            except (ValueError, KeyError, TypeError):
                name = path = ""
        if not name or not path:
            found.append(f"adapter {item[:100]!r} must be NAME=PATH")
        elif name in out:
            found.append(f"adapter {name!r} is given twice")
        else:
            out[name] = path
    if found:
        raise ConfigError(problems("adapters", found))
    return out


def template_of(text: str) -> tuple[str | None, str | None]:
    """(name of a chat format, system prompt), from a name or LMDeploy's JSON file.

    Raises:
        ConfigError: a file that says more than that.
    """
    path = Path(text)
    if path.suffix != ".json":
        return text, None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat template {text}: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"chat template {text}: not a JSON object")
    unknown = sorted(set(values) - {"model_name", "meta_instruction", "system", "capability"})
    if unknown:
        raise ConfigError(
            f"chat template {text}: {', '.join(unknown)} cannot be set; the format's own are used. "
            "Known: model_name, meta_instruction."
        )
    name, system = values.get("model_name"), values.get("meta_instruction", values.get("system"))
    return None if name is None else str(name), None if system is None else str(system)


def model_of(
    text: str, options: Mapping[str, Any], names: Iterable[str] = (), adapters: Mapping[str, str] | None = None
) -> ModelSpec:
    """A model, from "source" or "name=source"; "" is the default one."""
    from hanlin.serve.settings import ModelSpec

    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        name, source = "", text
    own, *aliases = [*names, name] if name else [*names] or [""]
    return ModelSpec(source=source or None, name=own, aliases=tuple(aliases), options=options, adapters=adapters or {})
