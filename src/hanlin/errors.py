"""Every error that Hanlin raises on purpose, in one tree.

    HanlinError
    ├── ConfigError            (ValueError)         an option or a model configuration that cannot be honoured
    ├── CheckpointError        (ValueError)         a model file that is broken, incomplete or does not fit
    │   └── UnsafeCheckpointError                   a model file that wants to run code
    ├── TokenizerError         (ValueError)         a tokenizer file that is broken or of an unknown kind
    ├── ModelNotFoundError     (FileNotFoundError)  no such model here or on the hub
    ├── DownloadError          (OSError)            fetching failed; nothing was kept
    ├── RequestError           (ValueError)         a request that cannot be served as asked
    │   ├── ContextLengthError                      the prompt does not fit the context or the cache
    │   └── ChatFormatError                         messages that the chat format cannot render
    ├── CapacityError          (MemoryError)        not enough memory; says how much is needed
    ├── EngineError            (RuntimeError)       the engine stopped while the request was running
    └── MissingExtraError      (ImportError)        an optional dependency is not installed

Each is also the standard-library error that a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "CapacityError",
    "ChatFormatError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DownloadError",
    "EngineError",
    "HanlinError",
    "MissingExtraError",
    "ModelNotFoundError",
    "RequestError",
    "TokenizerError",
    "UnsafeCheckpointError",
    "need",
    "problems",
]


class HanlinError(Exception):
    """The root of the tree."""


class ConfigError(HanlinError, ValueError):
    """An option or a model configuration that cannot be honoured."""


class CheckpointError(HanlinError, ValueError):
    """A model file that is broken, incomplete or does not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """A model file that wants to run code."""


class TokenizerError(HanlinError, ValueError):
    """A tokenizer file that is broken or of an unknown kind."""


class ModelNotFoundError(HanlinError, FileNotFoundError):
    """No such model on this machine or on the hub."""


class DownloadError(HanlinError, OSError):
    """Fetching failed; nothing half-written was kept."""


class RequestError(HanlinError, ValueError):
    """A request that cannot be served as asked."""


class ContextLengthError(RequestError):
    """The prompt does not fit the model's context or the cache."""


class ChatFormatError(RequestError):
    """Messages that the chat format cannot render."""


class CapacityError(HanlinError, MemoryError):
    """Not enough memory; the message says how much is needed."""


class EngineError(HanlinError, RuntimeError):
    """The engine stopped while the request was running."""


class MissingExtraError(HanlinError, ImportError):
    """An optional dependency is not installed."""


def problems(subject: str, found: Iterable[str], remedy: str = "") -> str:
    """One message that lists everything wrong with `subject` at once, and the remedy."""
    items = list(found)
    text = f"{subject}: {items[0]}" if len(items) == 1 else f"{subject}:\n" + "\n".join(f"  - {item}" for item in items)
    return f"{text}\n{remedy}" if remedy else text


def need(module: str, *, extra: str, feature: str) -> ModuleType:
    """Import `module`, or say which extra of Hanlin brings it.

    Raises:
        MissingExtraError: with the feature, the package and the exact pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{feature} needs the package '{package}', which is not installed. Run: pip install 'hanlin[{extra}]'"
        ) from error
