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
from hanlin.hub import default, huggingface, modelscope, names, openxlab
from hanlin.hub.files import complete
from hanlin.hub.places import Places, expand, look

__all__ = ["Entry", "cached", "lookup", "remove"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model in a cache.

    Attributes:
        id: what `resolve` and `remove` take; `ms:` and `ox:` before those of other hubs than Hugging Face's.
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
    """Every model in Hanlin's own cache and in those of `huggingface_hub` and ModelScope: the default first, then by
    hub and name."""
    places = places or Places.default()
    own = _entry(default.SMOLLM2.id, default.location(default.SMOLLM2, places).parent, complete=True)
    return [entry for entry in (own, *_hub_entries(places)) if entry is not None]


def _hub_entries(places: Places) -> Iterator[Entry | None]:
    for prefix, hub in (("", huggingface), ("ms:", modelscope), ("ox:", openxlab)):
        for repo, folder, revisions in hub.repositories(places):
            yield _entry(f"{prefix}{repo}", folder, complete=any(complete(revision) for revision in revisions))


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
    if _leads_out(entry.path, places):
        raise ConfigError(f"{entry.path} leads out of the cache; delete it yourself if you want it gone.")
    try:
        _delete(entry, places)
    except OSError as error:
        raise DownloadError(f"cannot delete {entry.path}: {error.strerror or error}") from error
    return entry


def _leads_out(path: Path, places: Places) -> bool:
    """Whether a link stands between the caches and a directory of theirs."""
    for root in (places.models(), places.hub_cache, places.of_modelscope(), places.of_openxlab()):
        if path.is_relative_to(root) and path != root:
            return path.resolve() != root.resolve() / path.relative_to(root)
    return True


def lookup(model: str, *, places: Places | None = None) -> Entry:
    """The cache entry that `model` names: the default, a hub id under any of its organisation's names, or a short name.

    Raises:
        ModelNotFoundError: it is not in a cache; names those that are.
        ConfigError: it is a path, not the name of a cached model; or one revision of it.
    """
    # Where a model is there twice, in directories of an earlier client, the first is the one that is used.
    entries = {entry.id.lower(): entry for entry in reversed(cached(places=places or Places.default()))}
    for name in _ids(model):
        if name.lower() in entries:
            return entries[name.lower()]
    if look(expand(model)):
        raise ConfigError(f"{model} is a path, not a model in the cache; delete it yourself if you want it gone.")
    have = ", ".join(entry.id for entry in entries.values()) or "nothing"
    raise ModelNotFoundError(f"no model {model!r} in the cache. It holds: {have}.")


def _ids(model: str) -> list[str]:
    """The ids that a cached model of that name may have."""
    wanted = names.parse(model) or names.short(model)
    if wanted is None:
        return [names.DEFAULT if names.is_default(model) else model]
    if wanted.revision:
        raise ConfigError(f"a model's revisions belong together: name it without @{wanted.revision}.")
    repos = dict.fromkeys((*names.candidates(wanted), *names.equivalents(wanted.repo)))
    hubs = (wanted.hub,) if wanted.hub else ("hf", "ms", "ox")
    return [repo if hub == "hf" else f"{hub}:{repo}" for hub in hubs for repo in repos]


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
