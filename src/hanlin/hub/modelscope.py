"""Models of ModelScope, over its public HTTP interface, in the cache that its own client uses.

The interface is the one that the client of the `modelscope` and `modelscope-hub` packages speaks:
`GET /api/v1/models/ID` (what there is), `.../repo/files?Revision=&Recursive=` (names, sizes, SHA-256), and
`.../repo?Revision=&FilePath=` (content, by way of a redirect to storage).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hanlin.errors import ConfigError, DownloadError, ModelNotFoundError
from hanlin.hub.files import File, complete
from hanlin.hub.names import HubId, candidates, equivalents, near
from hanlin.hub.places import Places
from hanlin.hub.report import Report
from hanlin.hub.snapshot import Listing, Wish, bring, refuse_offline
from hanlin.hub.web import Limits, Site, StatusError

__all__ = ["fetch", "find", "repositories"]

_BRANCH = "master"
_MOST_LISTED = 3000  # the interface says nothing beyond, not even that there is more
# Directories of the cache that hold no owner's models.
_OTHERS = frozenset({"hub", "models", "datasets", "studios", "skills", "mcps", "temp", "._____temp", "_github"})


def snapshots(repo: str, places: Places, revision: str = "") -> Iterator[Path]:
    """The directories that may hold a repository: today's, and those of earlier clients, which knew no revisions."""
    base = places.of_modelscope()
    owner, _, name = repo.partition("/")
    kept = base / "models" / f"{owner}--{name}" / "snapshots"
    if revision:
        yield kept / revision
        return
    yield from (kept / _BRANCH, kept / "main")
    yield from legacy(repo, places)
    if kept.is_dir():
        rest = [path for path in kept.iterdir() if path.is_dir() and path.name not in (_BRANCH, "main")]
        yield from sorted(rest, key=lambda path: path.stat().st_mtime, reverse=True)


def legacy(repo: str, places: Places) -> Iterator[Path]:
    base = places.of_modelscope()
    owner, _, name = repo.partition("/")
    for folder in (base / "models", base / "hub" / "models", base / "hub", base):
        # Dots of a name were written as three underscores.
        for spelled in dict.fromkeys((name.replace(".", "___"), name)):
            if folder != base or owner not in _OTHERS:
                yield folder / owner / spelled


def find(wanted: HubId, places: Places) -> Path | None:
    """A complete model that is on disk already, whoever fetched it. No network."""
    for repo in dict.fromkeys((*candidates(wanted), *equivalents(wanted.repo))):
        for snapshot in snapshots(repo, places, wanted.revision):
            if snapshot.is_dir() and complete(snapshot, wanted.tag):
                return snapshot
    return None


def repositories(places: Places) -> Iterator[tuple[str, Path, list[Path]]]:
    """What the cache holds: id, directory, and the directories of its revisions."""
    base = places.of_modelscope()
    for folder in _folders(base / "models"):
        owner, separator, name = folder.name.partition("--")
        if separator:
            yield f"{owner}/{name}", folder, _folders(folder / "snapshots")
    for parent in (base / "models", base / "hub" / "models", base / "hub", base):
        for owner_folder in _folders(parent):
            if owner_folder.name in _OTHERS or "--" in owner_folder.name:
                continue
            for folder in _folders(owner_folder):
                if any(folder.glob("*.json")) or any(folder.glob("*.gguf")):
                    yield f"{owner_folder.name}/{folder.name.replace('___', '.')}", folder, [folder]


def _folders(parent: Path) -> list[Path]:
    try:
        found = [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []
    return sorted((path for path in found if not path.name.startswith(".")), key=lambda path: path.name.lower())


def fetch(
    wanted: HubId, *, places: Places, report: Report, wish: Wish | None = None, limits: Limits | None = None
) -> Path:
    """Fetch the data files of a repository, or what is missing of them, and check every hash. Returns their directory.

    Raises:
        ModelNotFoundError: ModelScope knows no such model, or will not show it without a token.
        DownloadError: it holds nothing that Hanlin reads, names a file outside itself, serves content of a wrong hash,
            cannot be reached, or the disk is full. What arrived is kept: the next try goes on from there.
        ConfigError: a revision that cannot be a directory's name.
    """
    refuse_offline(wanted, places)
    if "/" in wanted.revision:
        raise ConfigError(f"ModelScope has no revision {wanted.revision!r}: name a branch or a tag, such as master.")
    token = places.modelscope_token
    secret = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    try:
        with Site(places.modelscope, secret=secret, limits=limits) as site:
            repo, info = _info(site, wanted)
            listing = _listing(site, repo, wanted.revision or _BRANCH, info)
            wanted = HubId(repo, wanted.tag, "ms", wanted.revision, wanted.typed)
            return bring(
                wanted,
                _home(wanted, places),
                listing,
                wish or Wish(),
                root=places.of_modelscope(),
                site=site,
                places=places,
                report=report,
            )
    except (ModelNotFoundError, ConfigError):
        raise
    except DownloadError as error:
        raise DownloadError(
            f"cannot fetch {wanted} from ModelScope: {error}\n"
            "Check the network, the proxy and MODELSCOPE_ENDPOINT; run it again to go on from here."
        ) from error


def _home(wanted: HubId, places: Places) -> Path:
    """Where the files go: where an earlier client has put them, so that they are not there twice; else as today."""
    if not wanted.revision:
        for folder in legacy(wanted.repo, places):
            if folder.is_dir() and not folder.is_symlink() and any(folder.iterdir()):
                return folder
    kept = places.of_modelscope() / "models" / wanted.repo.replace("/", "--") / "snapshots"
    return kept / (wanted.revision or _BRANCH)


def _info(site: Site, wanted: HubId) -> tuple[str, dict[str, Any]]:
    """The name under which the hub knows the model, and what it says about it."""
    asked = candidates(wanted)
    for repo in asked:
        try:
            return repo, _data(site.json(f"/api/v1/models/{repo}"), site)
        except StatusError as error:
            if error.status not in (401, 403, 404):
                raise
            status = error.status
    own = wanted.repo.partition("/")[2]
    others = [name for name in near(f"ms:{own}") if "/" not in name and name.lower() != f"ms:{own}".lower()]
    meant = f"\nDid you mean: {', '.join(others)}?" if others else ""
    raise ModelNotFoundError(
        f"ModelScope shows no model {' or '.join(asked)} (HTTP {status}).{meant}\n"
        "A private one needs MODELSCOPE_API_TOKEN. On the Hugging Face Hub it may have another name: hf:ORG/NAME."
    )


def _listing(site: Site, repo: str, revision: str, info: dict[str, Any]) -> Listing:
    path = f"/api/v1/models/{repo}/repo"
    entries = _entries(site, path, {"Revision": revision, "Recursive": "True"})
    if len(entries) >= _MOST_LISTED:
        entries = _entries(site, path, {"Revision": revision, "Recursive": "False"})
    return Listing(
        files=[_file(entry, site) for entry in entries if entry.get("Type") != "tree"],
        licence=str(info.get("License") or "")[:100],
        where=lambda name: (path, {"Revision": revision, "FilePath": name}),
    )


def _entries(site: Site, path: str, params: dict[str, str]) -> list[dict[str, Any]]:
    try:
        found = _data(site.json(f"{path}/files", params), site).get("Files")
    except StatusError as error:
        if error.status == 404:
            raise DownloadError(f"it has no revision {params['Revision']!r} (HTTP 404)") from error
        raise
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DownloadError(f"{site.name} lists the files in a way that Hanlin does not know.")
    return found


def _data(answer: Any, site: Site) -> dict[str, Any]:
    """The part of an answer that is about the matter; the rest says whether there is any."""
    if not isinstance(answer, dict) or not isinstance(answer.get("Data"), dict):
        said = str(answer.get("Message") or "")[:200] if isinstance(answer, dict) else ""
        raise DownloadError(f"{site.name} answers {said!r}" if said else f"{site.name} answers without data.")
    return dict(answer["Data"])


def _file(entry: dict[str, Any], site: Site) -> File:
    name, size, digest = entry.get("Path") or entry.get("Name"), entry.get("Size"), entry.get("Sha256") or ""
    if not isinstance(name, str) or type(size) is not int or not isinstance(digest, str):
        raise DownloadError(f"{site.name} lists a file in a way that Hanlin does not know: {str(entry)[:200]}")
    return File(name, size, digest)
