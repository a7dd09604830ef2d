"""Where fetched models are kept, and which hub is asked."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Places", "expand", "look"]


@dataclass(frozen=True, kw_only=True)
class Places:
    """The directories and the hub that every function of this room works with.

    Attributes:
        home: Hanlin's own cache: the default model, locks, files on their way.
        hub_cache: the cache of `huggingface_hub`, shared with every other program that uses it.
        endpoint: the hub's address; None leaves the choice to `huggingface_hub` (HF_ENDPOINT).
    """

    home: Path
    hub_cache: Path
    endpoint: str | None = None

    @classmethod
    def default(cls) -> Places:
        """HANLIN_HOME, else the platform's cache directory; HF_HOME and its relatives for the hub's cache."""
        from huggingface_hub import constants

        named = os.environ.get("HANLIN_HOME", "").strip()
        if named:
            home = expand(named).absolute()
        else:
            from platformdirs import user_cache_path

            home = user_cache_path("hanlin", appauthor=False)
        return cls(home=home, hub_cache=Path(constants.HF_HUB_CACHE))

    def models(self) -> Path:
        """The directory of Hanlin's own models, one directory each."""
        return self.home / "models"


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with `~` replaced; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def look(path: Path) -> Literal["file", "directory", ""]:
    """What is at a path; nothing where the path itself is impossible (too long, with a NUL) or out of reach."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return "directory" if stat.S_ISDIR(mode) else "file"
