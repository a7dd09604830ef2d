"""Models of the Hugging Face Hub, in the cache that `huggingface_hub` shares with every other program.

Only data files are asked for: weights, configuration, tokenizer, licence. A repository's Python never reaches the disk.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from hanlin.errors import DownloadError, ModelNotFoundError, problems
from hanlin.hub.index import disk_full
from hanlin.hub.names import HubId, equivalents, near
from hanlin.hub.places import Places
from hanlin.hub.report import Report, megabytes

__all__ = ["choose", "complete", "fetch", "find", "gguf_parts", "snapshots"]

T = TypeVar("T")

_ALWAYS = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "LICENSE*",
    "MODEL_LICENSE*",
    "README.md",
)
_GGUF_DEFAULT = "Q4_K_M"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_INDEX_LIMIT = 64 << 20


@dataclass(frozen=True)
class _File:
    """A file that the hub lists: size in bytes, and the hash that its content must have (SHA-256, or git's SHA-1)."""

    name: str
    size: int
    digest: str


def choose(names: Iterable[str], tag: str = "") -> list[str]:
    """The data files to fetch of a repository's `names`.

    Sharded safetensors, else one file of them, else PyTorch's .bin, else one GGUF; `tag` asks for the GGUF of that
    quantisation. Empty when the repository has no weights that Hanlin reads.
    """
    listed = sorted(names)
    top = [name for name in listed if "/" not in name]
    rest = [name for name in top if any(fnmatchcase(name, pattern) for pattern in _ALWAYS)]
    if not tag:
        for family in ("model*.safetensors", "pytorch_model*.bin"):
            found = [name for name in top if fnmatchcase(name, family)]
            stem, _, suffix = family.partition("*")
            own_index, single = f"{stem}{suffix}.index.json", f"{stem}{suffix}"
            if own_index in top:
                shard = re.compile(re.escape(stem) + r"-\d+-of-\d+" + re.escape(suffix))
                return sorted([*rest, own_index, *(name for name in found if shard.fullmatch(name))])
            if found:
                return sorted([*rest, *([single] if single in found else found)])
        others = [name for name in top if name.endswith(".safetensors") and name != "adapter_model.safetensors"]
        if others:
            return sorted([*rest, *others])
    weights = _choose_gguf(listed, tag)
    if not weights and "adapter_model.safetensors" in rest:
        return rest
    return sorted([*rest, *weights]) if weights else []


def _choose_gguf(names: Iterable[str], tag: str) -> list[str]:
    files = [name for name in names if name.endswith(".gguf") and "mmproj" not in name.lower()]
    # The name ends with the quantisation; a split file has its part number after it.
    wanted = re.compile(rf"(^|[-._/]){re.escape(tag or _GGUF_DEFAULT)}(-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE)
    found = [name for name in files if wanted.search(name)]
    if not found and not tag:
        found = files
    return gguf_parts(found[0], files) if found else []


def gguf_parts(first: str, names: Iterable[str]) -> list[str]:
    """All parts of the split file that `first` belongs to; only itself if it is not split."""
    split = _PART.search(first)
    if split is None:
        return [first]
    stem = first[: split.start()]
    return sorted(name for name in names if name.startswith(stem) and _PART.fullmatch(name[len(stem) :]))


def complete(directory: Path, tag: str = "") -> bool:
    """Whether a snapshot holds everything that `choose` needs to run: an interrupted fetch leaves one that does not."""
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    chosen = choose(names, tag)
    weights = [name for name in chosen if name.endswith((".safetensors", ".bin", ".gguf"))]
    for name in weights:
        split = _PART.search(name)
        if split is not None and len(weights) < int(split[2]):
            return False
    if any(name.endswith(".gguf") for name in weights):
        return True
    indices = [name for name in chosen if name.endswith(".index.json")]
    if any(not set(_shards(directory / name)) <= set(names) for name in indices):
        return False
    return bool(weights) and ("config.json" in chosen or "adapter_config.json" in chosen)


def _shards(path: Path) -> list[str]:
    try:
        if path.stat().st_size > _INDEX_LIMIT:
            return ["an index that is too large"]
        table = json.loads(path.read_bytes())["weight_map"]
        return [str(name) for name in set(table.values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ["an index that can be read"]


def snapshots(repo: str, places: Places) -> list[Path]:
    """The snapshots of a repository that are on disk, the one of branch `main` first, then newest first."""
    folder = places.hub_cache / f"models--{repo.replace('/', '--')}"
    found = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    try:
        main = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    return sorted(found, key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True)


def find(wanted: HubId, places: Places) -> Path | None:
    """A complete snapshot that is on disk already, under today's id or an earlier one. No network."""
    for repo in equivalents(wanted.repo):
        for snapshot in snapshots(repo, places):
            if complete(snapshot, wanted.tag):
                return snapshot
    return None


def fetch(wanted: HubId, *, places: Places, report: Report) -> Path:
    """Fetch the data files of a repository, or what is missing of them, and check every hash. Returns the snapshot.

    Raises:
        ModelNotFoundError: the hub knows no such model, or will not show it without a token.
        DownloadError: it holds nothing that Hanlin reads, names a file outside itself, serves content of a wrong hash,
            cannot be reached, or the disk is full. What arrived whole is kept: the next try goes on from there.
    """
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(endpoint=places.endpoint)
    info = _attempt(wanted, report, lambda: api.model_info(wanted.repo, files_metadata=True, timeout=30), attempts=3)
    files = _listed(wanted, info.siblings or ())
    chosen = choose(files, wanted.tag)
    if not chosen:
        raise DownloadError(_nothing(wanted, files))
    size = sum(files[name].size for name in chosen)
    report.say(f"{wanted}: {len(chosen)} files, {megabytes(size)}{_licence(info)}.")
    arguments: dict[str, Any] = {} if report.terminal else {"tqdm_class": _silent()}
    patterns = [glob.escape(name) for name in chosen]
    snapshot = Path(
        _attempt(
            wanted,
            report,
            lambda: snapshot_download(
                wanted.repo,
                allow_patterns=patterns,
                cache_dir=places.hub_cache,
                endpoint=places.endpoint,
                **arguments,
            ),
            attempts=2,  # within each, huggingface_hub goes on several times from where a connection broke
        )
    )
    missing = [name for name in chosen if not (snapshot / name).is_file()]
    if missing:
        raise DownloadError(problems(str(wanted), [f"{name} did not arrive" for name in missing], "Run it again."))
    with report.progress(f"Checking {wanted}", size) as tick:
        _check(wanted, snapshot, [files[name] for name in chosen], tick)
    return snapshot


def _listed(wanted: HubId, siblings: Iterable[Any]) -> dict[str, _File]:
    """What the hub lists, by name.

    Raises:
        DownloadError: a name that would leave the directory on some system.
    """
    files: dict[str, _File] = {}
    outside = []
    for sibling in siblings:
        name = str(sibling.rfilename)
        if not _inside(name):
            outside.append(f"{name!r} lies outside the repository")
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files[name] = _File(name, int(sibling.size or 0), str(digest or ""))
    if outside:
        raise DownloadError(problems(str(wanted), outside, "The hub, or who answers in its place, cannot be trusted."))
    return files


def _inside(name: str) -> bool:
    odd = re.search(r'[\\:<>|"?*\x00-\x1f]', name)
    return odd is None and all(part not in ("", ".", "..") for part in name.split("/"))


def _nothing(wanted: HubId, files: Iterable[str]) -> str:
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    if wanted.tag:
        have = ", ".join(ggufs[:20]) or "no GGUF file at all"
        return f"{wanted.repo} has no GGUF file with the tag {wanted.tag!r}; it has: {have}"
    return f"{wanted.repo} has no weights that Hanlin reads: no safetensors, no pytorch_model*.bin, no GGUF"


def _licence(info: Any) -> str:
    names = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return f", licence {names[0]}" if names else ""


def _check(wanted: HubId, snapshot: Path, files: Iterable[_File], tick: Callable[[int], None]) -> None:
    done, found = 0, []
    for file in files:
        path = snapshot / file.name
        size = path.stat().st_size
        # The hub names large files by their SHA-256, small ones by git's SHA-1 of a header and the content.
        digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(usedforsecurity=False)
        if len(file.digest) == 40:
            digest.update(b"blob %d\0" % size)
        with path.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
                done += len(chunk)
                tick(done)
        if len(file.digest) in (40, 64) and digest.hexdigest() != file.digest.lower():
            found.append(f"{file.name} has the hash {digest.hexdigest()}, the hub says {file.digest}")
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
