"""What is on this disk: the models that were fetched, and how to be rid of one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from hanlin.errors import ConfigError, DownloadError, ModelNotFoundError
from hanlin.hub import default, huggingface, names
from hanlin.hub.places import Places, expand, look

__all__ = ["Entry", "cached", "lookup", "remove"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model in a cache.

    Attributes:
        id: what `resolve` and `remove` take.
        path: its directory.
        size: bytes on disk, all revisions together.
        kind: "gguf", "safetensors", "bin", or "" when there are no weights (yet).
        last_used: when a file of it was last read, as far as the file system keeps that.
        complete: False for an interrupted fetch.
    """

    id: str
    path: Path
    size: int
    kind: str
    last_used: datetime
    complete: bool


def cached(*, places: Places | None = None) -> list[Entry]:
    """Every model in Hanlin's cache and in the one of `huggingface_hub`: the default first, then by name."""
    places = places or Places.default()
    own = _entry(default.SMOLLM2.id, default.location(default.SMOLLM2, places).parent, complete=True)
    return [entry for entry in (own, *_hub_entries(places)) if entry is not None]


def _hub_entries(places: Places) -> Iterator[Entry | None]:
    for folder in sorted(places.hub_cache.glob("models--*"), key=lambda path: path.name.lower()):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        whole = any(huggingface.complete(snapshot) for snapshot in huggingface.snapshots(repo, places))
        yield _entry(repo, folder, complete=whole)


def _entry(model_id: str, folder: Path, *, complete: bool) -> Entry | None:
    size, used, suffixes = 0, 0.0, set()
    for inner, _, files in os.walk(folder):
        for name in files:
            path = Path(inner) / name
            with suppress(OSError):
                # A snapshot's files are links to blobs: count the blob once, and read its times through the link.
                status = path.stat()
                used = max(used, status.st_atime, status.st_mtime)
                size += 0 if path.is_symlink() and "snapshots" in path.parts else status.st_size
                suffixes.add(path.suffix)
    if not size:
        return None
    kind = next((suffix[1:] for suffix in (".safetensors", ".bin", ".gguf") if suffix in suffixes), "")
    moment = datetime.fromtimestamp(used, tz=timezone.utc)
    return Entry(id=model_id, path=folder, size=size, kind=kind, last_used=moment, complete=complete)


def remove(model: str, *, places: Places | None = None) -> Entry:
    """Delete a cached model, all revisions of it, and say what it was.

    Raises:
        ModelNotFoundError: it is not in a cache.
        ConfigError: it is a path, or a link that leads out of the cache: Hanlin deletes only what it fetched.
        DownloadError: the system refuses to delete it.
    """
    places = places or Places.default()
    entry = lookup(model, places=places)
    roots = (places.models(), places.hub_cache)
    outside = entry.path.is_symlink() or entry.path.resolve().parent not in [root.resolve() for root in roots]
    if outside:
        raise ConfigError(f"{entry.path} leads out of the cache; delete it yourself if you want it gone.")
    try:
        _delete(entry, places)
    except OSError as error:
        raise DownloadError(f"cannot delete {entry.path}: {error.strerror or error}") from error
    return entry


def lookup(model: str, *, places: Places | None = None) -> Entry:
    """The cache entry that `model` names: the default, a hub id under any of its organisation's names, or a short name.

    Raises:
        ModelNotFoundError: it is not in a cache; names those that are.
        ConfigError: it is a path, not the name of a cached model.
    """
    entries = {entry.id.lower(): entry for entry in cached(places=places or Places.default())}
    wanted = names.parse(model) or names.short(model)
    repos = names.equivalents(wanted.repo) if wanted else (names.DEFAULT,) if names.is_default(model) else (model,)
    for repo in repos:
        if repo.lower() in entries:
            return entries[repo.lower()]
    if look(expand(model)):
        raise ConfigError(f"{model} is a path, not a model in the cache; delete it yourself if you want it gone.")
    have = ", ".join(entry.id for entry in entries.values()) or "nothing"
    raise ModelNotFoundError(f"no model {model!r} in the cache. It holds: {have}.")


def _delete(entry: Entry, places: Places) -> None:
    if entry.path.parent == places.hub_cache:
        _release_shared_blobs(entry, places)
    if entry.path.exists():
        # Renamed first: whoever looks for the model meanwhile finds all of it or nothing.
        doomed = entry.path.with_name(f".removed-{uuid.uuid4().hex}")
        entry.path.rename(doomed)
        shutil.rmtree(doomed)


def _release_shared_blobs(entry: Entry, places: Places) -> None:
    """Let `huggingface_hub` delete what it may be sharing between repositories; it alone knows its layout."""
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(places.hub_cache)
    for repo in info.repos:
        if repo.repo_path.resolve() == entry.path.resolve():
            # Revisions are deleted by commit, and copies of a repository share commits: show it this one alone.
            alone = replace(info, repos=frozenset({repo}))
            alone.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
