"""Where fetched models are kept, and which hub is asked."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["Places", "expand", "look"]

# Ours first; then those of the programs that people come from.
_MODELSCOPE_SWITCHES = (
    "HANLIN_USE_MODELSCOPE",
    "LMDEPLOY_USE_MODELSCOPE",
    "VLLM_USE_MODELSCOPE",
    "SGLANG_USE_MODELSCOPE",
)
_MODELSCOPE = "https://modelscope.cn"
_MODELSCOPE_ABROAD = "https://www.modelscope.ai"
_OPENXLAB = "https://code.openxlab.org.cn"


@dataclass(frozen=True, kw_only=True)
class Places:
    """The directories and the hubs that every function of this room works with.

    Attributes:
        home: Hanlin's own cache: the default model, models of OpenXLab, locks, files on their way.
        hub_cache: the cache of `huggingface_hub`, shared with every other program that uses it.
        endpoint: the Hugging Face Hub's address; None leaves the choice to `huggingface_hub` (HF_ENDPOINT).
        hub: the hub that a name without a prefix is fetched from: "hf" or "ms".
        modelscope_cache: ModelScope's cache, shared with its own client; None for one in `home`.
        modelscope: ModelScope's address.
        modelscope_token: sent to that address alone.
        openxlab: the address of OpenXLab's repositories.
        offline: nothing is fetched from any hub.
    """

    home: Path
    hub_cache: Path
    endpoint: str | None = None
    hub: str = "hf"
    modelscope_cache: Path | None = None
    modelscope: str = _MODELSCOPE
    modelscope_token: str = field(default="", repr=False)
    openxlab: str = _OPENXLAB
    offline: bool = False

    @classmethod
    def default(cls) -> Places:
        """What the environment says: HANLIN_HOME, and the switches of each hub's own client."""
        from huggingface_hub import constants

        named = os.environ.get("HANLIN_HOME", "").strip()
        if named:
            home = expand(named).absolute()
        else:
            from platformdirs import user_cache_path

            home = user_cache_path("hanlin", appauthor=False)
        switches = [os.environ[name] for name in _MODELSCOPE_SWITCHES if os.environ.get(name, "").strip()]
        cache = os.environ.get("MODELSCOPE_CACHE", "").strip() or Path.home() / ".cache" / "modelscope"
        return cls(
            home=home,
            hub_cache=Path(constants.HF_HUB_CACHE),
            hub="ms" if switches and _true(switches[0]) else "hf",
            modelscope_cache=expand(cache).absolute(),
            modelscope=_modelscope(),
            modelscope_token=os.environ.get("MODELSCOPE_API_TOKEN", "").strip(),
            offline=bool(constants.HF_HUB_OFFLINE),
        )

    def models(self) -> Path:
        """The directory of Hanlin's own models, one directory each."""
        return self.home / "models"

    def of_modelscope(self) -> Path:
        return self.modelscope_cache or self.home / "modelscope"

    def of_openxlab(self) -> Path:
        return self.home / "openxlab"


def _true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _modelscope() -> str:
    """The address of ModelScope, as its own client finds it."""
    named = (os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "").strip().rstrip("/")
    if named:
        return named if "://" in named else f"https://{named}"
    return _MODELSCOPE_ABROAD if _true(os.environ.get("MODELSCOPE_PREFER_AI_SITE", "")) else _MODELSCOPE


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
