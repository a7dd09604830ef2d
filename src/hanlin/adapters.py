"""A model's adapters by name: loading, unloading, and which of them a request means."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from torch import nn

from hanlin.checkpoints.peft import Base, check_live, read_peft
from hanlin.engine.runner import Runner
from hanlin.engine.sequence import Adapter
from hanlin.errors import ConfigError, EngineError, RequestError

__all__ = ["Adapters"]

_LONGEST_NAME = 256


class Adapters:
    """Safe to use from any thread, while requests run."""

    def __init__(self, model: nn.Module) -> None:
        self.base = Base.of(model)
        self.runner: Runner | None = None
        self._known: dict[str, Adapter] = {}
        self._lock = threading.Lock()

    @property
    def loaded(self) -> dict[str, Adapter]:
        """Those that can be asked for."""
        with self._lock:
            return dict(self._known)

    def load(self, name: str, path: str | os.PathLike[str]) -> Adapter:
        """Read an adapter from a directory, and let requests ask for it by name.

        Raises:
            ConfigError: a name that is none, or taken.
            ModelNotFoundError, CheckpointError: see `read_peft`.
        """
        if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise ConfigError(f"an adapter's name must be 1 to {_LONGEST_NAME} printable characters, not {name!r:.300}")
        self._refuse_twice(name)
        if self.runner is None:
            raise EngineError("the model has no engine")
        found = read_peft(Path(path), self.base)
        check_live(found)
        made = self.runner.adapt(found.additions)
        made.path, made.rank = found.path, found.rank
        with self._lock:
            if name not in self._known:
                self._known[name] = made
                return made
        raise self._taken(name)

    def unload(self, name: str) -> None:
        """Forget an adapter: no request can ask for it any more.

        Requests that run with it finish with it, and its memory comes back with the last of them.

        Raises:
            RequestError: there is none of this name.
        """
        with self._lock:
            if self._known.pop(name, None) is not None:
                return
        raise self._unknown(name)

    def get(self, name: str | None) -> Adapter | None:
        """Of a request; None asks for the model as it is.

        Raises:
            RequestError: there is none of this name.
        """
        if name is None:
            return None
        with self._lock:
            found = self._known.get(name)
        if found is None:
            raise self._unknown(name)
        return found

    def _refuse_twice(self, name: str) -> None:
        with self._lock:
            if name in self._known:
                raise self._taken(name)

    @staticmethod
    def _taken(name: str) -> ConfigError:
        return ConfigError(f"an adapter {name!r} is loaded already; unload it first, or choose another name")

    def _unknown(self, name: str) -> RequestError:
        known = ", ".join(sorted(self.loaded)) or "none"
        return RequestError(f"no adapter {name!r:.300} is loaded, only: {known}. Load it with load_adapter(name, DIR).")
