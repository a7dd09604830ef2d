"""A model's parameters one at a time, from whatever files it is in, and its data that go with every result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from hanlin.checkpoints.description import describe_directory, describe_gguf, read_json
from hanlin.checkpoints.load import check, place
from hanlin.checkpoints.names import recipes
from hanlin.checkpoints.row_quantised import is_row_quantised
from hanlin.checkpoints.source import open_source
from hanlin.errors import ConfigError
from hanlin.layers.rope import Rope
from hanlin.models.parts import HasParts, ModelParts
from hanlin.models.registry import build, family_name, read_config

__all__ = ["Original"]

_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "internlm2": "InternLM2ForCausalLM",
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "internlm": "InternLMForCausalLM",
        "internlm3": "InternLM3ForCausalLM",
        "chatglm": "ChatGLMModel",
        "chatglm2": "ChatGLMModel",
        "glm": "GlmForCausalLM",
    }
)
# Data and, unread, the code that other programs want beside these families' weights.
_KEPT = (
    *("tokenizer*", "*.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "LICENSE*", "*.py"),
)
_MOST = 64 << 20


class Original(AbstractContextManager["Original"]):
    """An open model, on the meta device; parameters come as float32.

    Raises:
        ConfigError: a family that is not quantised here, or weights that are quantised already.
        CheckpointError: broken files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        gguf = not path.is_dir()
        self._opened = ExitStack()
        try:
            self.source = self._opened.enter_context(open_source(path))
            description = describe_gguf(self.source) if gguf else describe_directory(path)
            family = family_name(description.values)
            if family not in _CLASSES:
                raise ConfigError(f"{path}: can't quantise {family!r}; known: {', '.join(_CLASSES)}.")
            if description.quantisation is not None or is_row_quantised(self.source):
                method = description.quantisation.method if description.quantisation else "ChatGLM's own"
                raise ConfigError(f"{path}: the weights are quantised already ({method}). Use the original ones.")
            self.config = read_config(description.values)
            if self.config.reward_id is not None:
                raise ConfigError(f"{path}: a reward model can't be quantised yet")
            self.model: nn.Module = build(self.config, dtype=torch.float32)
            self._recipes = recipes(
                dict(self.model.named_parameters()), self.config, gguf=gguf, permuted=description.permuted
            )
            check(self.model, self._recipes, self.source)
        except BaseException:
            self._opened.close()
            raise
        self.description, self._gguf = description, gguf
        body: Any = next(module for name, module in self.model.named_children() if name in ("model", "transformer"))
        self.rope: Rope = body.rope
        self.layers: nn.ModuleList = body.encoder.layers if family == "chatglm2" else body.layers
        self.parts: ModelParts = cast(HasParts, self.model).parts()
        self.names = {id(module): name for name, module in self.model.named_modules()}

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def load(self, name: str) -> Tensor:
        """A parameter, float32."""
        recipe = self._recipes[name]
        value = recipe.join([self.source.load(part) for part in recipe.sources])
        self.source.forget()
        return value.float()

    def fill(self, prefix: str, module: nn.Module) -> None:
        """Give a part of the model its parameters."""
        for name, _ in list(module.named_parameters()):
            place(self.model, f"{prefix}.{name}", self.load(f"{prefix}.{name}"), torch.float32, torch.device("cpu"))

    def configuration(self) -> dict[str, Any]:
        """The result's `config.json`, but for what is said about its quantisation."""
        values = self.description.values if self._gguf else read_json(self.path / "config.json")
        kept = {key: value for key, value in values.items() if value is not None or not self._gguf}
        kept.setdefault("architectures", [_CLASSES[self.config.model_type]])
        if self._gguf:
            kept |= {"hidden_act": "silu", "use_cache": True}
        kept.pop("dtype", None)
        return kept | {"torch_dtype": "float16"}

    def write_others(self, target: Path, files: Mapping[str, bytes]) -> None:
        """What belongs beside the weights: the directory's own, or `files` for what came out of a GGUF file."""
        for name, content in files.items():
            (target / name).write_bytes(content)
        if self._gguf:
            return
        for pattern in _KEPT:
            for found in sorted(self.path.glob(pattern)):
                if found.is_file() and found.stat().st_size <= _MOST:
                    shutil.copyfile(found, target / found.name)

    def fingerprint(self) -> str:
        """Changes with the files."""
        return json.dumps(sorted((path, list(state)) for path, state in self.source.state().items()))
