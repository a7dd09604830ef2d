"""Names of models as `hanlin.load` takes them, for Transformers: short, of another hub, of an earlier organisation."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from hanlin.hub import Places, names, resolve
from hanlin.hub.huggingface import snapshots
from hanlin.hub.places import look

__all__ = ["finding", "located"]


def located(name: Any, options: dict[str, Any]) -> Any:
    """What Transformers finds under a model's name: an id of the Hugging Face Hub that is cached or today's, or the
    directory of a model of another hub, fetched if need be.

    What is a path, and what is no released model's name and has no hub's prefix, is left as it is. A revision in the
    name goes to `options`.

    Raises:
        ModelNotFoundError, DownloadError: another hub was asked for, and has no such model or cannot be reached.
    """
    if not isinstance(name, str) or look(Path(name)):
        return name
    wanted = names.parse(name) or names.short(name)
    if wanted is None or wanted.tag or not (wanted.hub or names.of_a_family(wanted.repo)):
        return name
    places = Places.default()
    if (wanted.hub or places.hub) != "hf":
        revision = wanted.revision or str(options.get("revision") or "")
        found = resolve(str(replace(names.at(wanted, wanted.hub or places.hub), revision=revision)), places=places)
        return str(found.path) if found.kind == "directory" else name
    if wanted.revision:
        options["revision"] = wanted.revision
    ids = dict.fromkeys((wanted.typed, *names.equivalents(wanted.repo)))
    return next((repo for repo in ids if snapshots(repo, places)), wanted.repo)


def finding(*classes: type) -> None:
    """Let `from_pretrained` of these classes take such names; doing so again changes nothing."""
    for kind in classes:
        original = kind.from_pretrained.__func__  # type: ignore[attr-defined]
        if not hasattr(original, "hanlin_finds"):
            kind.from_pretrained = classmethod(_with_names(original))  # type: ignore[attr-defined]


def _with_names(original: Any) -> Any:
    @wraps(original)
    def from_pretrained(cls: type, *inputs: Any, **options: Any) -> Any:
        if inputs:
            inputs = (located(inputs[0], options), *inputs[1:])
        elif "pretrained_model_name_or_path" in options:
            name = options["pretrained_model_name_or_path"]
            options["pretrained_model_name_or_path"] = located(name, options)
        return original(cls, *inputs, **options)

    from_pretrained.hanlin_finds = True  # type: ignore[attr-defined]
    return from_pretrained
