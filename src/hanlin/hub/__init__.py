"""Find and fetch models: local paths, GGUF files, the Hugging Face Hub, ModelScope, OpenXLab, and the default model."""

from hanlin.hub.default import SMOLLM2 as DEFAULT
from hanlin.hub.places import Places
from hanlin.hub.report import Report
from hanlin.hub.resolve import Location, pull, resolve
from hanlin.hub.store import Entry, cached, lookup, remove

__all__ = ["DEFAULT", "Entry", "Location", "Places", "Report", "cached", "lookup", "pull", "remove", "resolve"]
