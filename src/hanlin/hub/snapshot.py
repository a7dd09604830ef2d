"""The files of one revision of a repository, brought into a directory of ours: several at once, whole or not at all.

While files are coming, the directory holds a mark, so that nobody takes a mixture of two revisions for a model. What
has come whole stays, as does the beginning of what has not: the next run goes on from there.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hanlin.errors import DownloadError, ModelNotFoundError
from hanlin.hub import transfer
from hanlin.hub.files import UNDER_WAY, File, listed, nothing, select
from hanlin.hub.index import disk_full
from hanlin.hub.locks import lock
from hanlin.hub.names import HubId
from hanlin.hub.places import Places
from hanlin.hub.report import Report, megabytes
from hanlin.hub.web import Site, StoppedError

__all__ = ["Listing", "Wish", "announce", "bring", "chosen", "refuse_offline"]

_AT_ONCE = 4
_PATIENCE = 1.0  # seconds for a thread to notice that it is over; after that it writes nothing anyway
_OPEN = ("apache-2.0", "mit", "bsd-3-clause", "apache license 2.0", "mit license")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to fetch of a repository: the patterns of --include and --exclude, none for what is needed to run it."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a hub says about one revision of a repository; `where` gives path and parameters of a file's address."""

    files: Sequence[File]
    licence: str
    where: Callable[[str], tuple[str, Mapping[str, str]]]


def refuse_offline(wanted: HubId, places: Places) -> None:
    if places.offline:
        raise DownloadError(
            f"{wanted} is not in the cache, and HF_HUB_OFFLINE forbids fetching it. Unset it, or pull elsewhere."
        )


def chosen(wanted: HubId, files: Sequence[File], wish: Wish) -> list[File]:
    """The files to fetch.

    Raises:
        DownloadError: there is none, or the listing cannot be trusted.
    """
    table = listed(str(wanted), files)
    names = select(table, wanted.tag, wish.include, wish.exclude)
    if not names:
        raise DownloadError(nothing(wanted.repo, table, wanted.tag, wish.include, wish.exclude))
    return [table[name] for name in names]


def announce(wanted: HubId, files: Sequence[File], licence: str, report: Report) -> None:
    """Say what will come, how much, and under which licence."""
    said = f", licence {licence}" if licence else ""
    report.say(f"{wanted}: {len(files)} files, {megabytes(sum(file.size for file in files))}{said}.")
    unknown = [file.name for file in files if not file.digest]
    if unknown:
        report.say(f"The hub gives no checksum for {', '.join(unknown[:5])}: only the length is checked.")


def terms(folder: Path, files: Sequence[File], licence: str) -> str:
    """Where the terms are, for a licence that is none of the usual ones; else nothing."""
    texts = [str(folder / file.name) for file in files if "LICENSE" in file.name]
    return f"Its terms: {', '.join(texts)}" if texts and licence.lower() not in _OPEN else ""


def bring(
    wanted: HubId, folder: Path, listing: Listing, wish: Wish, *, root: Path, site: Site, places: Places, report: Report
) -> Path:
    """Bring the chosen files of `listing` to `folder`, inside `root`, and check every hash.

    Raises:
        DownloadError: nothing to fetch, a hub that cannot be trusted or reached, no room, or a link in the way.
    """
    files, name = chosen(wanted, listing.files, wish), wanted.repo.partition("/")[2]
    announce(wanted, files, listing.licence, report)
    try:
        with lock(places.home / "locks", f"{wanted.hub}--{wanted.repo.replace('/', '--')}", str(wanted), report):
            targets = _targets(folder, files, root)
            missing = _missing(files, targets, f"Checking {name}", report)
            if missing:
                _room(folder, missing, targets, wanted)
                (folder / UNDER_WAY).touch()
                with _progress(report, f"Fetching {name}", sum(file.size for file in missing)) as tick:
                    _all(site, listing, missing, targets, tick)
                _tidy(files, targets)
            (folder / UNDER_WAY).unlink(missing_ok=True)
    except (DownloadError, ModelNotFoundError):
        raise
    except OSError as error:
        raise DownloadError(_explain(error, wanted, folder)) from error
    if missing and (said := terms(folder, files, listing.licence)):
        report.say(said)
    return folder


def _targets(folder: Path, files: Sequence[File], root: Path) -> dict[str, Path]:
    """Where each file goes, its directory made; none of them through a link."""
    root.mkdir(parents=True, exist_ok=True)
    out = {file.name: folder / file.name for file in files}
    for directory in sorted({folder, *(path.parent for path in out.values())}, key=lambda path: len(path.parts)):
        for step in (directory, *directory.parents):
            if step == root:
                break
            if step.is_symlink():
                raise DownloadError(f"{step} is a link; nothing is written through it. Remove it and try again.")
        directory.mkdir(parents=True, exist_ok=True)
    return out


def _missing(files: Sequence[File], targets: Mapping[str, Path], title: str, report: Report) -> list[File]:
    """The files that are not in place with the right length and hash."""
    there = [file for file in files if _may_be(targets[file.name], file)]
    if not there:
        return list(files)
    with _progress(report, title, sum(file.size for file in there)) as tick:
        right = {file.name for file in there if transfer.right(targets[file.name], file, tick)}
    return [file for file in files if file.name not in right]


def _may_be(target: Path, file: File) -> bool:
    return not target.is_symlink() and target.is_file() and target.stat().st_size == file.size


def _room(folder: Path, missing: Sequence[File], targets: Mapping[str, Path], wanted: HubId) -> None:
    need = sum(file.size - transfer.arrived(targets[file.name], file) for file in missing)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DownloadError(
            f"fetching {wanted} needs {megabytes(need)} more in {folder}, and {megabytes(free)} are free.\n"
            f"{_elsewhere(wanted)}"
        )


def _elsewhere(wanted: HubId) -> str:
    variable = "MODELSCOPE_CACHE" if wanted.hub == "ms" else "HANLIN_HOME"
    return f"Free some space, or set {variable} to a directory on another disk."


def _all(
    site: Site, listing: Listing, missing: Sequence[File], targets: Mapping[str, Path], tick: Callable[[int], None]
) -> None:
    """Fetch the files, some at a time. The first that fails, or Ctrl-C, ends the others where they are."""
    waiting = deque(missing)
    failed: list[BaseException] = []

    def work() -> None:
        while not site.stop.is_set():
            try:
                file = waiting.popleft()
            except IndexError:
                return
            try:
                path, params = listing.where(file.name)
                transfer.fetch(site, path, params, targets[file.name], file, tick)
            except StoppedError:
                return
            except BaseException as error:  # told by the thread that waits
                failed.append(error)
                site.stop.set()

    # Not a pool: its threads would keep an interrupted program waiting until their sockets time out.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(missing)))]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            threads[-1].join(0.05)
            threads[0].join(0.05)
    finally:
        site.stop.set()
        for thread in threads:
            thread.join(_PATIENCE)
    for error in failed:
        if not isinstance(error, DownloadError):
            raise error
    if failed:
        raise DownloadError("\n".join(str(error) for error in failed))


def _tidy(files: Sequence[File], targets: Mapping[str, Path]) -> None:
    """Drop beginnings of other revisions of the files."""
    for file in files:
        target = targets[file.name]
        for stale in target.parent.iterdir():
            if stale.name.startswith(f"{target.name}.") and stale.name.endswith(".incomplete"):
                stale.unlink(missing_ok=True)


@contextmanager
def _progress(report: Report, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that any thread may move by the bytes it did."""
    guard, done = threading.Lock(), 0
    with report.progress(title, total) as tick:

        def move(size: int) -> None:
            nonlocal done
            with guard:
                done += size
                tick(done)

        yield move


def _explain(error: OSError, wanted: HubId, folder: Path) -> str:
    if disk_full(error):
        return f"the disk is full while fetching {wanted}.\n{_elsewhere(wanted)} Run it again to go on from here."
    return f"cannot keep {wanted} in {folder}: {error.strerror or error}."
