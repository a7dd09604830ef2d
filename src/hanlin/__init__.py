"""Hanlin: the maintained home of the InternLM and ChatGLM chat models.

import hanlin

with hanlin.load() as llm:                       # the default model; or a directory, a .gguf file, a hub id
    print(llm.chat("Why is the sky blue?").text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hanlin.aio import AsyncLLM
    from hanlin.errors import HanlinError
    from hanlin.llm import LLM, load
    from hanlin.lmdeploy import (
        GenerationConfig,
        Pipeline,
        PytorchEngineConfig,
        Response,
        TurbomindEngineConfig,
        pipeline,
    )
    from hanlin.options import EngineConfig
    from hanlin.types import BestOf, Completion, Delta, Message, SamplingParams, Score, Tool, ToolCall

__version__ = "0.1.0"

# name -> module, imported at first use: `import hanlin` and the command line's help need no torch
_HOME = {
    "AsyncLLM": "hanlin.aio",
    "BestOf": "hanlin.types",
    "Completion": "hanlin.types",
    "Delta": "hanlin.types",
    "EngineConfig": "hanlin.options",
    "GenerationConfig": "hanlin.lmdeploy",
    "HanlinError": "hanlin.errors",
    "LLM": "hanlin.llm",
    "Message": "hanlin.types",
    "Pipeline": "hanlin.lmdeploy",
    "PytorchEngineConfig": "hanlin.lmdeploy",
    "Response": "hanlin.lmdeploy",
    "SamplingParams": "hanlin.types",
    "Score": "hanlin.types",
    "Tool": "hanlin.types",
    "ToolCall": "hanlin.types",
    "TurbomindEngineConfig": "hanlin.lmdeploy",
    "load": "hanlin.llm",
    "pipeline": "hanlin.lmdeploy",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BestOf",
    "Completion",
    "Delta",
    "EngineConfig",
    "GenerationConfig",
    "HanlinError",
    "Message",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "SamplingParams",
    "Score",
    "Tool",
    "ToolCall",
    "TurbomindEngineConfig",
    "load",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hanlin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
