"""One line a family: which file reads its configuration and builds its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from hanlin.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from hanlin.layers.attend import Attend
    from hanlin.layers.rope import Positions
    from hanlin.models.config import DecoderConfig

__all__ = [
    "FAMILIES",
    "Decoder",
    "Family",
    "Layout",
    "build",
    "family_name",
    "family_of",
    "layout_of",
    "read_config",
]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the table of supported models.

    Attributes:
        module, cls: where the model stands, beside `read_config`.
        released: the checkpoints of this kind, for people.
        gguf: the architecture names under which GGUF files hold it.
        chat: how it converses, for people.
        transformers: where its Transformers classes come from.
        layout: the function beside the model that says of a prompt's ids how many see each other both ways and where
            all stand; "" for ordinary causal models.
    """

    module: str
    cls: str
    released: str
    gguf: tuple[str, ...] = ()
    chat: str = "its own template, sandboxed"
    transformers: str = "Transformers' own"
    layout: str = ""


FAMILIES: Mapping[str, Family] = {
    "internlm2": Family(
        module="hanlin.models.internlm2",
        cls="InternLM2ForCausalLM",
        released="InternLM2 and InternLM2.5: 1.8B, 7B, 20B; base, chat, chat-1M, math",
        gguf=("internlm2",),
        chat="ChatML with tools and interpreter",
        transformers="`hanlin.hf`",
    ),
    "chatglm": Family(
        module="hanlin.models.chatglm",
        cls="ChatGLMForConditionalGeneration",
        released="ChatGLM-6B, -int8, -int4; P-Tuning v2 prefixes",
        chat="`[Round i]` turns",
        transformers="`hanlin.hf`",
        layout="layout",
    ),
    "visualglm": Family(
        module="hanlin.models.visualglm",
        cls="ChatGLMForConditionalGenerationWithImage",
        released="VisualGLM-6B: questions about an image",
        chat="`问：` and `答：`, or `Q:` and `A:`, with an image",
        transformers="`hanlin.hf`",
        layout="layout",
    ),
    "chatglm2": Family(
        module="hanlin.models.chatglm2",
        cls="ChatGLM2ForConditionalGeneration",
        released="ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2-6B, GLM-4-9B and their long variants, as first released",
        gguf=("chatglm",),
        chat="`[Round i]` turns; ChatGLM3's and GLM-4's roles with tools and interpreter",
        transformers="`hanlin.hf`",
    ),
    "glm": Family(
        module="hanlin.models.glm",
        cls="GlmForCausalLM",
        released="GLM-4-9B in Transformers' format",
        chat="GLM-4's roles with tools and interpreter",
    ),
    "internlm2-reward": Family(
        module="hanlin.models.internlm2_reward",
        cls="InternLM2ForRewardModel",
        released="InternLM2-Reward: 1.8B, 7B, 20B",
        chat="none: it judges conversations",
        transformers="`hanlin.hf`",
    ),
    "internlm": Family(
        module="hanlin.models.llama",
        cls="LlamaForCausalLM",
        released="InternLM 7B, 20B; base, chat, chat-8k",
        chat="InternLM turns",
        transformers="`hanlin.hf`",
    ),
    "internlm3": Family(
        module="hanlin.models.llama", cls="LlamaForCausalLM", released="InternLM3 8B", transformers="`hanlin.hf`"
    ),
    "llama": Family(
        module="hanlin.models.llama", cls="LlamaForCausalLM", released="Llama 1 to 3, SmolLM2", gguf=("llama",)
    ),
    "qwen2": Family(module="hanlin.models.llama", cls="LlamaForCausalLM", released="Qwen2, Qwen2.5", gguf=("qwen2",)),
}


# How many first tokens see each other both ways, and the positions (rows, stop - start) of tokens start..stop.
Layout = tuple[int, "Callable[[int, int], NDArray[np.int64]]"]


class Decoder(Protocol):
    """What every family's model is: `model(ids, positions, attend)` and `model.head(rows)`."""

    config: DecoderConfig

    def __call__(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor: ...

    def head(self, rows: Tensor) -> Tensor: ...


def family_name(values: Mapping[str, Any]) -> object:
    """The name in `FAMILIES` of a `config.json`: its `model_type`, which ChatGLM-6B and all later ones share."""
    name = values.get("model_type")
    if name == "chatglm" and values.get("eva_config") is not None:
        return "visualglm"
    later = "padded_vocab_size" in values or "multi_query_attention" in values
    return "chatglm2" if name == "chatglm" and later else name


def family_of(model_type: object) -> Family:
    """The row of `model_type`.

    Raises:
        ConfigError: for a family that is not here, with the list of those that are.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported. Supported: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Read a `config.json` by its `model_type`; `auto_map` is ignored, always."""
    family = family_of(family_name(values))
    return cast("DecoderConfig", import_module(family.module).read_config(values))


def layout_of(config: DecoderConfig) -> Callable[[Sequence[int]], Layout] | None:
    """What `Family.layout` names, for this model; None for ordinary causal models. It raises RequestError."""
    family = family_of(config.model_type)
    if not family.layout:
        return None
    rule = getattr(import_module(family.module), family.layout)
    return lambda ids: rule(config, ids)


def build(config: DecoderConfig, *, dtype: torch.dtype, encoder: torch.dtype | None = None) -> nn.Module:
    """The family's model on the meta device: shapes and dtypes, no memory.

    `encoder` is the dtype of the large weights of an image encoder, if there is one; the rest of it is float32 then.
    """
    import torch

    family = family_of(config.model_type)
    with torch.device("meta"):
        model = getattr(import_module(family.module), family.cls)(config).to(dtype)
    if encoder is not None and hasattr(model, "image_encoder"):
        model.image_encoder.keep(encoder)
    return cast("nn.Module", model.eval().requires_grad_(False))
