"""The verbs about models on disk: list, show, pull, rm."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanlin import hub
from hanlin.errors import ConfigError, HanlinError
from hanlin.hub.report import megabytes

if TYPE_CHECKING:
    from hanlin.checkpoints.source import TensorSource

__all__ = ["list_models", "pull", "rm", "show"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def list_models(as_json: AsJson = False) -> None:
    """List the models on this disk: Hanlin's own, and those in the caches of huggingface_hub and ModelScope."""
    entries = hub.cached()
    if as_json:
        print(json.dumps([_plain(entry) for entry in entries], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("MODEL", "KIND", "SIZE", "LAST USED"):
        table.add_column(title, justify="right" if title == "SIZE" else "left", overflow="fold")
    if not any(entry.id == hub.DEFAULT.id for entry in entries):
        table.add_row(f"{hub.DEFAULT.id} (default)", "gguf", megabytes(hub.DEFAULT.size), "not fetched yet")
    for entry in entries:
        name = f"{entry.id} (default)" if entry.id == hub.DEFAULT.id else entry.id
        when = _ago(entry.last_used) if entry.complete else "fetched in part; hanlin pull goes on"
        table.add_row(name, entry.kind or "-", megabytes(entry.size), when)
    # A terminal wraps long names; a pipe gets whole lines.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _plain(entry: hub.Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "kind": entry.kind,
        "size": entry.size,
        "last_used": entry.last_used.isoformat(timespec="seconds"),
        "complete": entry.complete,
        "default": entry.id == hub.DEFAULT.id,
        "path": str(entry.path),
    }


def _ago(moment: datetime) -> str:
    seconds = max((datetime.now(timezone.utc) - moment).total_seconds(), 0)
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            help="org/name, org/name:Q4_K_M for one GGUF file, or a short name; after hf:, ms: (ModelScope) or ox: "
            "(OpenXLab), from that hub.",
            show_default="smollm2",
        ),
    ] = None,
    revision: Annotated[str, typer.Option(help="A branch, tag or commit; also as org/name@REVISION.")] = "",
    include: Annotated[
        list[str] | None, typer.Option(help="Only data files that match this pattern; may be given again.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No files that match this; may be given again.")] = None,
) -> None:
    """Fetch a model's data files and check their hashes. Run again, it fetches only what is missing or new."""
    print(hub.pull(model, revision=revision, include=include or (), exclude=exclude or ()).path)


def rm(
    model: Annotated[str, typer.Argument(help="A model of `hanlin list`.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a fetched model. Files that Hanlin did not fetch are never deleted."""
    entry = hub.lookup(model)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"refusing to delete {entry.id} unasked. Say --yes where nobody can answer.")
        if not typer.confirm(f"Delete {entry.id} ({megabytes(entry.size)}, {entry.path})?", err=True):
            raise typer.Exit(1)
    hub.remove(model)
    print(f"Deleted {entry.id}, {megabytes(entry.size)}.", file=sys.stderr)


def show(
    model: Annotated[
        str | None, typer.Argument(help="A directory, a .gguf file, or a name.", show_default="smollm2")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model on this disk is. Only headers are read, no weights."""
    location = hub.resolve(model, fetch=False)
    from hanlin.checkpoints.packed import KEY, PackedSource
    from hanlin.checkpoints.source import open_source

    with open_source(location.path) as stored:
        source = PackedSource(stored) if KEY in stored.metadata else stored
        facts = describe(location, source)
        rows = [(info.name, list(info.shape), info.dtype, info.nbytes) for info in source.infos.values()]
    if as_json:
        names = ("name", "shape", "dtype", "bytes")
        listed = {"tensors": [dict(zip(names, row, strict=True)) for row in rows]} if tensors else {}
        print(json.dumps({**facts, **listed}, indent=2, ensure_ascii=False))
        return
    shown = {**facts, "parameters": _count(facts["parameters"]), "size": megabytes(facts["size"])}
    width = max(map(len, shown))
    for name, value in shown.items():
        print(f"{name.replace('_', ' '):<{width}}  {'unknown' if value is None else value}")
    print(f"{'tensors':<{width}}  {len(rows)}")
    for tensor, shape, dtype, size in rows if tensors else ():
        print(f"{tensor}  {dtype} {shape}  {megabytes(size)}")


def describe(location: hub.Location, source: TensorSource) -> dict[str, Any]:
    """What is known about a model from its headers and JSON files; None for what nothing says."""
    from hanlin.models.registry import family_name

    values, template, runs = _configuration(location, source)
    family = family_name(values)
    kinds: Counter[str] = Counter()
    for info in source.infos.values():
        kinds[info.dtype] += info.nbytes
    if location.kind == "gguf":
        name, licence = source.metadata.get("general.name"), source.metadata.get("general.license")
    else:
        name, licence = location.path.resolve().name, _licence(location.path)
        if location.path.parent.name == "snapshots":  # a cache's directory is named after the revision
            name = location.id.partition("@")[0].rpartition("/")[2]

    def first(*keys: str) -> Any:
        return next((values[key] for key in keys if values.get(key) is not None), None)

    return {
        "model": location.id,
        "name": name,
        "family": family,
        "runs": runs,
        "parameters": sum(math.prod(info.shape) for info in source.infos.values()),
        "weights": ", ".join(kind for kind, _ in kinds.most_common()),
        "size": kinds.total(),
        "context": first("max_position_embeddings", "seq_length", "max_sequence_length"),
        "layers": first("num_hidden_layers", "num_layers"),
        "hidden_size": first("hidden_size"),
        "vocabulary": first("vocab_size", "padded_vocab_size"),
        "chat_format": _chat_format(location, source, str(family), template),
        "licence": licence,
        "path": str(location.path),
    }


def _configuration(location: hub.Location, source: TensorSource) -> tuple[Mapping[str, Any], str | None, str]:
    """The keys of `config.json`, the model's own chat template, and whether Hanlin runs it: "yes", or why not."""
    from hanlin.checkpoints.description import describe_directory, describe_gguf, read_json
    from hanlin.models.registry import read_config

    gguf = location.kind == "gguf"
    try:
        found = describe_gguf(source) if gguf else describe_directory(location.path)
    except ConfigError as error:
        if gguf:
            return {"model_type": source.metadata.get("general.architecture")}, None, f"no: {error}"
        return read_json(location.path / "config.json"), None, f"no: {error}"
    try:
        read_config(found.values)
    except ConfigError as error:
        return found.values, found.template, f"no: {error}"
    return found.values, found.template, "yes"


def _chat_format(location: hub.Location, source: TensorSource, family: str, template: str | None) -> str | None:
    from hanlin.chat import chat_format_for
    from hanlin.tokenizers import from_gguf, load_tokenizer

    path = location.path
    try:
        tokenizer = load_tokenizer(path) if path.is_dir() else from_gguf(source.metadata, name=str(path))
        return chat_format_for(tokenizer, model_type=family, template=template).name
    except HanlinError:  # the other facts are worth showing without it
        return None


def _licence(path: Path) -> str | None:
    """From the front matter of the model card, as the hub reads it."""
    try:
        with (path / "README.md").open(encoding="utf-8", errors="replace") as card:
            head = card.read(1 << 16)
    except OSError:
        return None
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    found = front and re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE)
    return found[1] if found else None


def _count(number: int) -> str:
    for unit, scale in ((" billion", 10**9), (" million", 10**6)):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return str(number)
