"""Which files of a repository are fetched, and whether what is on disk is all of them.

Only data files are asked for: weights, configuration, tokenizer, licence. A repository's Python never reaches the disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hanlin.errors import DownloadError, problems

__all__ = ["UNDER_WAY", "File", "choose", "complete", "gguf_parts", "listed", "nothing", "select"]

# A directory that holds this file is being fetched, or was left half fetched: its files may be of two revisions.
UNDER_WAY = ".hanlin-fetching"

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
# What a pattern of the user's can name beside these.
_DATA = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt", ".tiktoken", ".jinja", ".md")
_GGUF_DEFAULT = "Q4_K_M"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_INDEX_LIMIT = 64 << 20
_MOST_FILES = 20_000
_LONGEST_NAME = 512


@dataclass(frozen=True)
class File:
    """A file that a hub lists: size in bytes, and the hash its content must have (SHA-256, git's SHA-1, or unknown)."""

    name: str
    size: int
    digest: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self.digest.lower())


def listed(subject: str, files: Iterable[File]) -> dict[str, File]:
    """What a hub lists, by name.

    Raises:
        DownloadError: a name that would leave the directory on some system, two that are one file on some system,
            an impossible size or hash, or more files than a model can have.
    """
    table: dict[str, File] = {}
    seen: dict[str, str] = {}
    found = []
    for number, file in enumerate(files):
        if number >= _MOST_FILES:
            raise DownloadError(f"{subject} lists more than {_MOST_FILES} files: that is no model.")
        if not _inside(file.name):
            found.append(f"{file.name[:_LONGEST_NAME]!r} lies outside the repository")
        elif seen.setdefault(file.name.casefold(), file.name) != file.name or file.name in table:
            found.append(f"{file.name!r} is listed twice")
        if file.size < 0:
            found.append(f"{file.name!r} has {file.size} bytes")
        if file.digest and not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.digest):
            found.append(f"{file.name!r} has the hash {file.digest[:80]!r}")
        table[file.name] = file
    if found:
        raise DownloadError(problems(subject, found[:20], "The hub, or who answers in its place, cannot be trusted."))
    return table


def _inside(name: str) -> bool:
    if len(name) > _LONGEST_NAME or re.search(r'[\\:<>|"?*\x00-\x1f]', name):
        return False
    parts = name.split("/")
    return UNDER_WAY not in parts and all(part and not part.endswith((".", " ")) for part in parts)


def select(names: Iterable[str], tag: str = "", include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The data files to fetch: what `choose` says or, of all data files, those that match `include`; none of `exclude`.

    Patterns are those of `fnmatch`; one that ends with "/" is a folder.
    """
    every = list(names)
    chosen = sorted(name for name in every if _is_data(name) and _any(name, include)) if include else choose(every, tag)
    return [name for name in chosen if not _any(name, exclude)]


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)


def _is_data(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.endswith(_DATA) or any(fnmatchcase(last, pattern) for pattern in _ALWAYS if "LICENSE" in pattern)


def nothing(
    repo: str, names: Iterable[str], tag: str = "", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> str:
    """Why `select` found no file."""
    every = sorted(names)
    if include or exclude:
        code = [name for name in every if _any(name, include) and not _is_data(name)]
        if code:
            return f"only data files are fetched, and these are none: {', '.join(code[:20])}"
        return f"no data file of {repo} is left by --include and --exclude; it has: {', '.join(every[:20])}"
    if tag:
        ggufs = [name for name in every if name.endswith(".gguf")]
        have = ", ".join(ggufs[:20]) or "no GGUF file at all"
        return f"{repo} has no GGUF file with the tag {tag!r}; it has: {have}"
    return f"{repo} has no weights that Hanlin reads: no safetensors, no pytorch_model*.bin, no GGUF"


def choose(names: Iterable[str], tag: str = "") -> list[str]:
    """The data files to fetch of a repository's `names`.

    Sharded safetensors, else one file of them, else PyTorch's .bin, else one GGUF; `tag` asks for the GGUF of that
    quantisation. Empty when the repository has no weights that Hanlin reads.
    """
    every = sorted(names)
    top = [name for name in every if "/" not in name]
    rest = [name for name in top if any(fnmatchcase(name, pattern) for pattern in _ALWAYS) and not _partial(name)]
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
    weights = _choose_gguf(every, tag)
    if not weights and "adapter_model.safetensors" in rest:
        return rest
    return sorted([*rest, *weights]) if weights else []


def _partial(name: str) -> bool:
    return name.endswith(".incomplete")


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
    if (directory / UNDER_WAY).exists():
        return False
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
