"""`hanlin ps` and `hanlin stop`: which models a server has in memory, and giving that memory back."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime
from typing import Annotated, Any

import typer

from hanlin.errors import ConfigError

__all__ = ["ps", "stop"]

_SECONDS = 30.0

Where = Annotated[
    str | None,
    typer.Option(
        "--url", help="Of the server; else HANLIN_URL, else OLLAMA_HOST.", show_default="http://127.0.0.1:8000"
    ),
]


def ps(url: Where = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False) -> None:
    """List the models that a server has in memory. Its key, if it asks for one, is taken from HANLIN_API_KEY."""
    models = _ask(url, "/api/ps")["models"]
    if as_json:
        print(json.dumps(models, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("MODEL", "SIZE", "UNLOADED"):
        table.add_column(title, justify="right" if title == "SIZE" else "left", overflow="fold")
    for model in models:
        table.add_row(str(model["name"]), f"{model['size'] / 1e9:.2f} GB", _until(str(model["expires_at"])))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def stop(
    model: Annotated[str, typer.Argument(help="As `hanlin ps` names it.")],
    url: Where = None,
) -> None:
    """Unload a model that no request is using; the next one loads it again."""
    loaded = _loaded(url)
    if model not in loaded:
        raise ConfigError(f"{model!r} is not in memory; there are: {', '.join(loaded) or 'none'}")
    _ask(url, "/api/generate", {"model": model, "keep_alive": 0, "stream": False})
    if model in _loaded(url):
        raise ConfigError(f"{model!r} is in use and stays in memory; try again when its requests have ended")


def _loaded(url: str | None) -> list[str]:
    return [each["name"] for each in _ask(url, "/api/ps")["models"]]


def _ask(url: str | None, path: str, body: dict[str, Any] | None = None) -> Any:
    """A server's answer to a request.

    Raises:
        ConfigError: no server there, or one that refuses.
    """
    where = url or os.environ.get("HANLIN_URL") or os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:8000"
    where = (where if "://" in where else f"http://{where}").rstrip("/")
    if not where.startswith(("http://", "https://")):
        raise ConfigError(f"{where} is no address of a server: write like http://127.0.0.1:8000")
    key = os.environ.get("HANLIN_API_KEY", "").rpartition(":")[2]
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(where + path, data, headers), timeout=_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        hint = ": set HANLIN_API_KEY" if error.code == 401 else f" ({error.read(300).decode('utf-8', 'replace')})"
        raise ConfigError(f"the server at {where} answered {error.code}{hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no server answers at {where}: {error}. Start one with hanlin serve, or give --url"
        ) from error


def _until(stamp: str) -> str:
    left = datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp() - time.time()
    if left > 365 * 86400:
        return "never"
    return f"in {left / 60:.0f} minutes" if left > 90 else f"in {max(0, left):.0f} s"
