"""Public models of OpenXLab, out of the git server that its pages clone from (`code.openxlab.org.cn`).

It is a Gitea, whose interface is public: `GET /api/v1/repos/ID` (what there is), `.../git/trees/REF?recursive=true`
(names, sizes, git's SHA-1), `.../raw/PATH?ref=` (a file as git holds it: for a large one, a pointer with length and
SHA-256), `.../media/PATH?ref=` (the content behind the pointer). What is fetched is kept in Hanlin's own cache:
OpenXLab's client has none that knows revisions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hanlin.errors import ConfigError, DownloadError, ModelNotFoundError
from hanlin.hub.files import File, complete, listed, select
from hanlin.hub.names import HubId, candidates, equivalents
from hanlin.hub.places import Places
from hanlin.hub.report import Report
from hanlin.hub.snapshot import Listing, Wish, bring, refuse_offline
from hanlin.hub.web import Limits, Site, StatusError

__all__ = ["fetch", "find", "repositories"]

_PAGES = 20
_PAGE = 1000
_POINTER_SIZE = 1024
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?oid sha256:([0-9a-f]{64})\nsize (\d{1,15})\n"
)
_LINK = "120000"


def _kept(repo: str, places: Places) -> Path:
    return places.of_openxlab() / repo.replace("/", "--")


def find(wanted: HubId, places: Places) -> Path | None:
    """A complete model that is on disk already. No network."""
    for repo in dict.fromkeys((*candidates(wanted), *equivalents(wanted.repo))):
        for snapshot in _revisions(_kept(repo, places)):
            if wanted.revision in ("", snapshot.name) and complete(snapshot, wanted.tag):
                return snapshot
    return None


def _revisions(folder: Path) -> list[Path]:
    """The directories of a repository's revisions, newest first."""
    found = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def repositories(places: Places) -> Iterator[tuple[str, Path, list[Path]]]:
    """What is kept: id, directory, and the directories of its revisions."""
    for folder in sorted(places.of_openxlab().glob("*--*"), key=lambda path: path.name.lower()):
        if folder.is_dir() and not folder.is_symlink():
            yield folder.name.replace("--", "/", 1), folder, _revisions(folder)


def fetch(
    wanted: HubId, *, places: Places, report: Report, wish: Wish | None = None, limits: Limits | None = None
) -> Path:
    """Fetch the data files of a repository, or what is missing of them, and check every hash. Returns their directory.

    Raises:
        ModelNotFoundError: OpenXLab shows no such model to everybody.
        DownloadError: as `modelscope.fetch`.
        ConfigError: a revision that cannot be a directory's name.
    """
    refuse_offline(wanted, places)
    if "/" in wanted.revision:
        raise ConfigError(f"a revision of OpenXLab is a branch, a tag or a commit, not {wanted.revision!r}.")
    wish = wish or Wish()
    try:
        with Site(places.openxlab, limits=limits) as site:
            repo, info = _info(site, wanted)
            revision = wanted.revision or _text(info, "default_branch", "main")
            wanted = HubId(repo, wanted.tag, "ox", wanted.revision, wanted.typed)
            listing = _listing(site, wanted, revision, wish)
            return bring(
                wanted,
                _kept(repo, places) / "snapshots" / revision,
                listing,
                wish,
                root=places.of_openxlab(),
                site=site,
                places=places,
                report=report,
            )
    except (ModelNotFoundError, ConfigError):
        raise
    except DownloadError as error:
        other = HubId(wanted.repo, wanted.tag, "ox")
        raise DownloadError(
            f"cannot fetch {wanted} from OpenXLab: {error}\n"
            f"The same models are on ModelScope and the Hugging Face Hub: ms:{other.repo.partition('/')[2]}, "
            f"hf:{other.repo.partition('/')[2]}. Run it again to go on from here."
        ) from error


def _info(site: Site, wanted: HubId) -> tuple[str, dict[str, Any]]:
    asked = candidates(wanted)
    for repo in asked:
        try:
            return repo, _object(site.json(f"/api/v1/repos/{repo}"), site)
        except StatusError as error:
            if error.status not in (401, 403, 404):
                raise
            status = error.status
    raise ModelNotFoundError(
        f"OpenXLab shows no model {' or '.join(asked)} to everybody (HTTP {status}); private ones are not fetched.\n"
        "The released models are also on ModelScope (ms:NAME) and the Hugging Face Hub (hf:NAME)."
    )


def _listing(site: Site, wanted: HubId, revision: str, wish: Wish) -> Listing:
    """The files of a revision, those to be fetched with their true lengths and hashes."""
    base = f"/api/v1/repos/{wanted.repo}"
    entries = _tree(site, f"{base}/git/trees/{quote(revision, safe='')}")
    links = {str(entry.get("path")) for entry in entries if entry.get("mode") == _LINK}
    files = listed(str(wanted), [_file(entry, site) for entry in entries if entry.get("type") == "blob"])
    large = set()
    for name in select(files, wanted.tag, wish.include, wish.exclude):
        if name in links:
            raise DownloadError(f"{name} is a link in the repository; links are not followed.")
        if files[name].size <= _POINTER_SIZE:
            content = site.small(f"{base}/raw/{quote(name)}", {"ref": revision}, most=_POINTER_SIZE)
            if pointer := _POINTER.fullmatch(content):
                files[name] = File(name, int(pointer[2]), pointer[1].decode())
                large.add(name)

    def where(name: str) -> tuple[str, Mapping[str, str]]:
        return f"{base}/{'media' if name in large else 'raw'}/{quote(name)}", {"ref": revision}

    return Listing(files=list(files.values()), licence="", where=where)


def _tree(site: Site, path: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for page in range(1, _PAGES + 1):
        params = {"recursive": "true", "per_page": str(_PAGE), "page": str(page)}
        try:
            answer = _object(site.json(path, params), site)
        except StatusError as error:
            if error.status == 404:
                raise DownloadError("it has no such revision (HTTP 404)") from error
            raise
        found = answer.get("tree")
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise DownloadError(f"{site.name} lists the files in a way that Hanlin does not know.")
        entries += found
        if not answer.get("truncated") or not found:
            return entries
    raise DownloadError(f"{site.name} lists more than {_PAGES} pages of files: that is no model.")


def _object(answer: Any, site: Site) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise DownloadError(f"{site.name} answers in a way that Hanlin does not know.")
    return answer


def _text(values: dict[str, Any], key: str, otherwise: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", value) else otherwise


def _file(entry: dict[str, Any], site: Site) -> File:
    name, size, digest = entry.get("path"), entry.get("size"), entry.get("sha")
    if not isinstance(name, str) or type(size) is not int or not isinstance(digest, str):
        raise DownloadError(f"{site.name} lists a file in a way that Hanlin does not know: {str(entry)[:200]}")
    return File(name, size, digest)
