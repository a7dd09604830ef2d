"""VisualGLM-6B: ChatGLM-6B that reads the embeddings of an image in the place of 32 tokens, as released.

Source: the released model files, and SwissArmyTransformer, whose modules hold the image encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hanlin.errors import ConfigError, problems
from hanlin.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, layout
from hanlin.models.chatglm import read_config as read_chatglm
from hanlin.models.config import Reader
from hanlin.models.eva import BLIP2, EncoderConfig

__all__ = ["ChatGLMForConditionalGenerationWithImage", "VisualGLMConfig", "layout", "read_config"]

# Notes of the training library beside its transformers' sizes.
_NOTES = """
    model_class model_parallel_size skip_init use_gpu_initialization tokenizer_type hidden_dropout attention_dropout
    drop_path checkpoint_activations checkpoint_num_layers max_sequence_length num_classes post_len fp16 mode
""".split()


@dataclass(frozen=True, kw_only=True)
class VisualGLMConfig(ChatGLMConfig):
    """
    Attributes:
        vision, queries: the image encoder's two transformers.
    """

    vision: EncoderConfig
    queries: EncoderConfig

    @property
    def image_length(self) -> int:
        """Tokens whose place an image takes."""
        return self.queries.rows


def read_config(values: Mapping[str, Any]) -> VisualGLMConfig:
    """Read a released VisualGLM-6B `config.json`.

    Raises:
        ConfigError: all that is wrong with the language model's, the vision transformer's and the Q-Former's part.
    """
    own = ("image_length", "eva_config", "qformer_config")
    found: list[str] = []
    vision, queries = _vision(values.get("eva_config"), found), _queries(values.get("qformer_config"), found)
    length = values.get("image_length", queries.rows)
    if length != queries.rows:
        found.append(f"'image_length' is {length!r}, the Q-Former has {queries.rows} queries")
    try:
        language = read_chatglm({key: value for key, value in values.items() if key not in own})
    except ConfigError as error:
        raise ConfigError(problems(str(error), found) if found else str(error)) from error
    if found:
        raise ConfigError(problems("visualglm configuration", found))
    given = {each.name: getattr(language, each.name) for each in fields(language)}
    return VisualGLMConfig(**{**given, "model_type": "visualglm"}, vision=vision, queries=queries)


def _vision(values: Any, found: list[str]) -> EncoderConfig:
    read = _reader(values, "eva_config", found)
    read.fixed("layernorm_order", "pre")
    read.fixed("use_final_layernorm", False)
    read.fixed("in_channels", 3)
    read.fixed("pre_len", 1)
    size = read.raw("image_size")
    sides = size if isinstance(size, list) else [224, 224]
    if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int or sides[0] < 1:
        read.found.append(f"'image_size' must be two equal numbers of pixels, not {size!r}")
        sides = [224, 224]
    patch = read.whole("patch_size", 14)
    if not patch or sides[0] % patch:
        read.found.append(f"images of {sides[0]} pixels do not divide into patches of {patch}")
        patch = sides[0]
    read.fixed("vocab_size", 1)
    return _encoder(read, found, 1e-5, rows=1, image_size=sides[0], patch=patch)


def _queries(values: Any, found: list[str]) -> EncoderConfig:
    read = _reader(values, "qformer_config", found)
    read.fixed("layernorm_order", "post")
    read.fixed("use_final_layernorm", True)
    read.used.add("cross_attn_hidden_size")  # the vision transformer's width; the files tell
    layers = read.whole("num_layers", 12)
    crossed = read.raw("is_decoder")
    if not (isinstance(crossed, list) and len(crossed) == layers and all(type(each) is bool for each in crossed)):
        read.found.append(f"'is_decoder' must say true or false of each of {layers} layers, not {crossed!r}")
        crossed = [True]
    return _encoder(read, found, 1e-5, rows=read.whole("vocab_size", 32), crossed=tuple(crossed))


def _reader(values: Any, name: str, found: list[str]) -> Reader:
    if not isinstance(values, Mapping):
        found.append(f"'{name}' must be an object, not {values!r}")
    read = Reader(values if isinstance(values, Mapping) else {}, name)
    read.used.update(_NOTES)
    read.fixed("use_bias", True)
    read.fixed("num_multi_query_heads", 0)
    read.fixed("hidden_size_per_attention_head", None)
    return read


def _encoder(read: Reader, found: list[str], eps: float, **rest: Any) -> EncoderConfig:
    width = read.whole("hidden_size")
    config = EncoderConfig(
        layers=read.whole("num_layers"),
        width=width,
        heads=read.whole("num_attention_heads"),
        inner=read.whole("inner_hidden_size", 4 * width),
        eps=read.number("layernorm_epsilon", eps),
        **rest,
    )
    for name in ("layers", "width", "heads", "inner", "rows"):
        if getattr(config, name) < 1:
            read.found.append(f"the number of {name} must be >= 1, not {getattr(config, name)}")
    if config.heads and config.width % config.heads:
        read.found.append(f"a width of {config.width} does not divide into {config.heads} heads")
    try:
        read.finish()
    except ConfigError as error:
        found.append(str(error).replace("\n", "\n  "))
    return config


class ChatGLMForConditionalGenerationWithImage(ChatGLMForConditionalGeneration):
    """ChatGLM-6B with `image_encoder`: pixels (N, 3, S, S) -> embeddings (N, tokens, D), in the place of tokens."""

    config: VisualGLMConfig

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__(config)
        self.image_encoder = BLIP2(config.vision, config.queries, config.hidden_size)
