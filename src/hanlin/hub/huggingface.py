"""Models of the Hugging Face Hub, in the cache that `huggingface_hub` shares with every other program."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hanlin.errors import DownloadError, ModelNotFoundError, problems
from hanlin.hub.files import File, complete
from hanlin.hub.index import disk_full
from hanlin.hub.locks import lock
from hanlin.hub.names import HubId, equivalents, near
from hanlin.hub.places import Places
from hanlin.hub.report import Report
from hanlin.hub.snapshot import Wish, announce, chosen, refuse_offline, terms
from hanlin.hub.transfer import right

__all__ = ["fetch", "find", "repositories"]

T = TypeVar("T")


def snapshots(repo: str, places: Places, revision: str = "") -> list[Path]:
    """The snapshots of a repository that are on disk, the one of branch `main` first, then newest first.

    Those of one `revision` alone where it is given.
    """
    folder = places.hub_cache / f"models--{repo.replace('/', '--')}"
    found = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    try:
        named = (folder / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        named = revision
    if revision:
        return [path for path in found if path.name == named]
    return sorted(found, key=lambda path: (path.name == named, path.stat().st_mtime), reverse=True)


def repositories(places: Places) -> Iterator[tuple[str, Path, list[Path]]]:
    """What the cache holds: id, directory, and the directories of its revisions."""
    for folder in sorted(places.hub_cache.glob("models--*"), key=lambda path: path.name.lower()):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        yield repo, folder, snapshots(repo, places)


def find(wanted: HubId, places: Places) -> Path | None:
    """A complete snapshot that is on disk already, under today's id or an earlier one. No network."""
    for repo in equivalents(wanted.repo):
        for snapshot in snapshots(repo, places, wanted.revision):
            if complete(snapshot, wanted.tag):
                return snapshot
    return None


def fetch(wanted: HubId, *, places: Places, report: Report, wish: Wish | None = None) -> Path:
    """Fetch the data files of a repository, or what is missing of them, and check every hash. Returns the snapshot.

    Raises:
        ModelNotFoundError: the hub knows no such model, or will not show it without a token.
        DownloadError: it holds nothing that Hanlin reads, names a file outside itself, serves content of a wrong hash,
            cannot be reached, or the disk is full. What arrived whole is kept: the next try goes on from there.
    """
    from huggingface_hub import HfApi

    refuse_offline(wanted, places)
    api = HfApi(endpoint=places.endpoint)
    revision = wanted.revision or None
    info = _attempt(
        wanted,
        report,
        lambda: api.model_info(wanted.repo, revision=revision, files_metadata=True, timeout=30),
        attempts=3,
    )
    files = chosen(wanted, [_file(sibling) for sibling in info.siblings or ()], wish or Wish())
    licence = _licence(info)
    announce(wanted, files, licence, report)
    try:
        with lock(places.home / "locks", f"hf--{wanted.repo.replace('/', '--')}", str(wanted), report):
            snapshot = _download(wanted, files, places, report)
            with report.progress(f"Checking {wanted}", sum(file.size for file in files)) as tick:
                _check(wanted, snapshot, files, tick)
    except (DownloadError, ModelNotFoundError):
        raise
    except OSError as error:
        raise _translated(wanted, error) from error
    if said := terms(snapshot, files, licence):
        report.say(said)
    return snapshot


def _download(wanted: HubId, files: list[File], places: Places, report: Report) -> Path:
    from huggingface_hub import snapshot_download

    arguments: dict[str, Any] = {} if report.terminal else {"tqdm_class": _silent()}
    patterns = [glob.escape(file.name) for file in files]
    snapshot = Path(
        _attempt(
            wanted,
            report,
            lambda: snapshot_download(
                wanted.repo,
                revision=wanted.revision or None,
                allow_patterns=patterns,
                cache_dir=places.hub_cache,
                endpoint=places.endpoint,
                **arguments,
            ),
            attempts=2,  # within each, huggingface_hub goes on several times from where a connection broke
        )
    )
    missing = [file.name for file in files if not (snapshot / file.name).is_file()]
    if missing:
        raise DownloadError(problems(str(wanted), [f"{name} did not arrive" for name in missing], "Run it again."))
    return snapshot


def _file(sibling: Any) -> File:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return File(str(sibling.rfilename), int(sibling.size or 0), str(digest or ""))


def _licence(info: Any) -> str:
    return next((tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), "")


def _check(wanted: HubId, snapshot: Path, files: Iterable[File], tick: Callable[[int], None]) -> None:
    done, found = 0, []

    def move(size: int) -> None:
        nonlocal done
        done += size
        tick(done)

    for file in files:
        path = snapshot / file.name
        if not right(path, file, move):
            found.append(f"{file.name} has another length or hash than the hub says ({file.size}, {file.digest})")
            blob = path.resolve()
            path.unlink()
            blob.unlink(missing_ok=True)
    if found:
        raise DownloadError(problems(str(wanted), found, "The broken files were deleted. Run it again."))


def _attempt(wanted: HubId, report: Report, call: Callable[[], T], *, attempts: int) -> T:
    """`call`, again after a failure that may pass."""
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:  # the exceptions of huggingface_hub's HTTP library change with its version
            if attempt == attempts or not _may_pass(error):
                raise _translated(wanted, error) from error
            report.say(f"{wanted}: {_first_line(error)}; trying again.")
            time.sleep(0.5 * attempt)
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, OfflineModeIsEnabled | ValueError):
        return False
    return not (isinstance(error, OSError) and (disk_full(error) or isinstance(error, PermissionError)))


def _translated(wanted: HubId, error: Exception) -> DownloadError | ModelNotFoundError:
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    status = _status(error)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        others = [name for name in near(wanted.repo) if name != wanted.repo]
        meant = f"\nDid you mean: {', '.join(others)}?" if others else ""
        return ModelNotFoundError(
            f"the hub shows no model {wanted.repo!r} (HTTP {status}).{meant}\n"
            "A private or gated model needs access granted on its page, and HF_TOKEN or `hf auth login`."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return DownloadError(
            f"{wanted} is not in the cache, and HF_HUB_OFFLINE forbids fetching it. Unset it, or pull elsewhere."
        )
    if isinstance(error, OSError) and disk_full(error):
        return DownloadError(
            f"the disk is full while fetching {wanted}.\nFree some space, or set HF_HOME to another disk."
        )
    return DownloadError(
        f"cannot fetch {wanted}: {_first_line(error)}\n"
        "Check the network, the proxy and HF_ENDPOINT (a mirror, for instance); run it again to go on from here."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _silent() -> type[Any]:
    """A progress bar class that shows nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
