"""From what a person types to a file or directory on this disk."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from hanlin.errors import ConfigError, DownloadError, ModelNotFoundError
from hanlin.hub import default, huggingface, modelscope, names, openxlab
from hanlin.hub.files import choose, gguf_parts
from hanlin.hub.names import HubId
from hanlin.hub.places import Places, expand, look
from hanlin.hub.report import Report
from hanlin.hub.snapshot import Wish
from hanlin.hub.store import cached

__all__ = ["Location", "pull", "resolve"]

_WEIGHTS = (".safetensors", ".bin", ".pt")
_HUBS = MappingProxyType({"hf": huggingface, "ms": modelscope, "ox": openxlab})


@dataclass(frozen=True, kw_only=True)
class Location:
    """A model on this disk: a directory of files, or one GGUF file (the first part of a split one)."""

    path: Path
    kind: Literal["directory", "gguf"]
    id: str


def resolve(
    model: str | os.PathLike[str] | None = None,
    *,
    fetch: bool = True,
    report: Report | None = None,
    places: Places | None = None,
) -> Location:
    """Find a model, and fetch it if it is a known name that is not on this disk yet.

    `model` is None (the default model), a directory, a GGUF file, a hub id (`org/name`, with `:Q4_K_M` for one GGUF
    file of it, with `@v1.0` for a revision) or a short name (`internlm2_5-7b-chat`). `hf:`, `ms:` and `ox:` before a
    name choose the hub: Hugging Face, ModelScope, OpenXLab. A path that exists wins over a name. What is cached is
    found without network, under any name that its organisation has had; without a prefix, from whatever hub it came.

    Raises:
        ModelNotFoundError: nothing of that name, or not on this disk and `fetch` is False.
        DownloadError: fetching failed.
    """
    places, report = places or Places.default(), report or Report.stderr()
    if model is None:
        return _default(fetch, report, places)
    if isinstance(model, str):
        found = _local(model, must=_looks_like_path(model)) or _named(model, fetch, report, places)
        if found is None:
            raise ModelNotFoundError(_unknown(model, places))
        return found
    local = _local(model, must=True)
    assert local is not None
    return local


def pull(
    model: str | None = None,
    *,
    revision: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    report: Report | None = None,
    places: Places | None = None,
) -> Location:
    """Fetch the default model (None) or one of a hub, or what has changed or is missing of it, and check its hashes.

    `include` and `exclude` are patterns of file names, for more or less than is needed to run it; never for code.

    Raises:
        ModelNotFoundError: no such name.
        DownloadError: fetching failed.
        ConfigError: the default model with a revision or patterns; two revisions.
    """
    places, report = places or Places.default(), report or Report.stderr()
    if model is None or names.is_default(model):
        if revision or include or exclude:
            raise ConfigError("the default model is one file: it has no revisions, and nothing to include or exclude.")
        path = default.location(default.SMOLLM2, places)
        if default.present(path, default.SMOLLM2) and not default.matches(path, default.SMOLLM2.sha256):
            report.say(f"{path} is not the published file any more; fetching it again.")
            path.unlink(missing_ok=True)
        return _default(True, report, places)
    wanted = _hub_id(model)
    if wanted is None:
        raise ModelNotFoundError(_unknown(model, places))
    if revision and names.parse(f"org/name@{revision}") is None:
        raise ConfigError(f"--revision {revision!r} is no branch, tag or commit.")
    if revision and wanted.revision not in ("", revision):
        raise ConfigError(f"{model} names the revision {wanted.revision}, and --revision says {revision}.")
    wanted = replace(_on_a_hub(wanted, places), revision=revision or wanted.revision)
    wish = Wish(include=tuple(include), exclude=tuple(exclude))
    return _inside(_HUBS[wanted.hub or "hf"].fetch(wanted, places=places, report=report, wish=wish), wanted)


def _default(fetch: bool, report: Report, places: Places) -> Location:
    path = default.location(default.SMOLLM2, places)
    if fetch:
        path = default.fetch(default.SMOLLM2, places=places, report=report)
    elif not default.present(path, default.SMOLLM2):
        raise ModelNotFoundError("the default model is not on this disk. Run: hanlin pull")
    return Location(path=path, kind="gguf", id=default.SMOLLM2.id)


def _hub_id(model: str) -> HubId | None:
    return names.parse(model) or names.short(model)


def _on_a_hub(wanted: HubId, places: Places) -> HubId:
    """The name on the hub that it is to be fetched from: its own, or the one that the environment chooses."""
    return wanted if wanted.hub or places.hub == "hf" else names.at(wanted, places.hub)


def _named(model: str, fetch: bool, report: Report, places: Places) -> Location | None:
    if names.is_default(model):
        return _default(fetch, report, places)
    wanted = _hub_id(model)
    if wanted is None:
        return None
    first = _on_a_hub(wanted, places)
    others = [] if wanted.hub else [names.at(wanted, hub) for hub in _HUBS if hub != (first.hub or "hf")]
    for asked in (first, *others):
        snapshot = _HUBS[asked.hub or "hf"].find(asked, places)
        if snapshot is not None:
            return _inside(snapshot, asked)
    if not fetch:
        raise ModelNotFoundError(f"{first} is not on this disk. Run: hanlin pull {first}")
    try:
        return _inside(_HUBS[first.hub or "hf"].fetch(first, places=places, report=report), first)
    except (ModelNotFoundError, DownloadError) as error:
        if "/" in model and not wanted.hub:
            raise type(error)(f"{error}\n(There is no directory {model!r} here either.)") from error
        raise


def _inside(snapshot: Path, wanted: HubId) -> Location:
    """The part of a snapshot that was asked for: all of it, or the GGUF file."""
    listed = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    ggufs = [name for name in choose(listed, wanted.tag) if name.endswith(".gguf")]
    if ggufs:
        return Location(path=snapshot / ggufs[0], kind="gguf", id=str(wanted))
    return Location(path=snapshot, kind="directory", id=str(wanted))


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", "/", "\\")) or model.endswith((".gguf", ".safetensors", ".bin")) or "\\" in model


def _local(model: str | os.PathLike[str], *, must: bool) -> Location | None:
    """The model at a path.

    Raises:
        ModelNotFoundError: there is none, and `model` can only be meant as a path.
    """
    path = expand(model)
    there = look(path)
    if there == "file":
        if path.suffix in (".safetensors", ".bin", ".json"):
            raise ModelNotFoundError(f"{path} is one file of a model. Name its directory: {path.parent}")
        return Location(path=path, kind="gguf", id=path.stem)
    if there == "directory":
        found = _directory(path, must=must)
        if found is not None:
            return found
    if must:
        close = difflib.get_close_matches(path.name, [other.name for other in _siblings(path)], n=3)
        meant = f"\nDid you mean: {', '.join(str(path.parent / name) for name in close)}?" if close else ""
        raise ModelNotFoundError(f"no model at {path}: there is no such file or directory.{meant}")
    return None


def _siblings(path: Path) -> list[Path]:
    try:
        return list(path.parent.iterdir())
    except (OSError, ValueError):
        return []


def _directory(path: Path, *, must: bool) -> Location | None:
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be listed: {error.strerror or error}") from error
    if (path / "config.json").is_file() or any(file.name.endswith(_WEIGHTS) for file in inside):
        return Location(path=path, kind="directory", id=path.resolve().name)
    files = [file.name for file in inside if file.suffix == ".gguf"]
    firsts = sorted({gguf_parts(name, files)[0] for name in files})
    if len(firsts) == 1:
        return Location(path=path / firsts[0], kind="gguf", id=Path(firsts[0]).stem)
    if len(firsts) > 1:
        raise ModelNotFoundError(f"{path} holds several models; name one of them: {', '.join(firsts)}")
    if must:
        raise ModelNotFoundError(f"{path} holds no model: neither config.json, nor safetensors, .bin or .gguf files.")
    return None


def _unknown(model: str, places: Places) -> str:
    close = names.near(model, more=[entry.id for entry in cached(places=places)])
    meant = f"\nDid you mean: {', '.join(close)}?" if close else ""
    return (
        f"no model {model!r}: it is no directory or GGUF file here, no hub id (org/name) and no short name.{meant}\n"
        "`hanlin list` shows what is on this disk."
    )
