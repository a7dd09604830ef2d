"""InternLM 1 and InternLM3 as Transformers classes: Llama's modules under the names of the released files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from hanlin.chat.chatml import ChatMLFormat
from hanlin.chat.internlm import InternLMFormat
from hanlin.chat.internlm2 import SPECIALS, InternLM2Format
from hanlin.hf.base import HanlinCausalLM, HanlinConfig, HanlinModel, HanlinPreTrainedModel, plain_rope
from hanlin.hf.chat import CardChat
from hanlin.hf.register import HFFamily
from hanlin.hf.tokenizer import SlowSentencePiece, to_hanlin
from hanlin.layers.linear import Linear
from hanlin.models import llama
from hanlin.models.config import DecoderConfig
from hanlin.types import ChatFormat

__all__ = [
    "INTERNLM",
    "INTERNLM3",
    "InternLM3Config",
    "InternLM3ForCausalLM",
    "InternLM3Model",
    "InternLM3Tokenizer",
    "InternLMConfig",
    "InternLMForCausalLM",
    "InternLMModel",
    "InternLMTokenizer",
]


class _Config(HanlinConfig):
    """The keys of a released `config.json`; a missing one means what it means to the released code."""

    rope_scaling: dict[str, Any] | None = None  # a plain attribute here, not Transformers' alias of rope_parameters
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        values = {**self.defaults, **kwargs}
        theta, scaling = plain_rope(values, values.pop("rope_theta", 10000.0), values.pop("rope_scaling", None))
        self.rope_theta, self.rope_scaling = theta, scaling
        for name in self.defaults.keys() & values.keys() - _COMMON:
            setattr(self, name, values.pop(name))
        super().__init__(**values)

    def read(self, values: Mapping[str, Any]) -> DecoderConfig:
        return llama.read_config({**values, "model_type": self.model_type})


_COMMON = {"pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"}
_SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}


class InternLMConfig(_Config):
    """InternLM 7B and 20B; the defaults are the 7B's. `bias` is that of q, k, v and o."""

    model_type = "internlm"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 103168,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "bias": True,
        "pad_token_id": 0,
        **_SPECIAL_IDS,
    }

    def __init__(self, **kwargs: Any) -> None:  # Transformers 5 writes another where a class has none of its own
        super().__init__(**kwargs)


class InternLM3Config(_Config):
    """InternLM3 8B. `qkv_bias` is that of q, k and v, `bias` that of all other projections."""

    model_type = "internlm3"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 128512,
        "hidden_size": 4096,
        "intermediate_size": 10240,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "use_cache": True,
        "rope_theta": 50_000_000.0,
        "qkv_bias": False,
        "bias": False,
        "pad_token_id": 2,
        **_SPECIAL_IDS,
    }

    def __init__(self, **kwargs: Any) -> None:  # Transformers 5 writes another where a class has none of its own
        super().__init__(**kwargs)


class _Body(HanlinModel):
    """The body, under its released tensor names."""

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        body = llama.LlamaModel(config.to_hanlin())
        self.embed_tokens, self.layers, self.norm, self.rope = body.embed_tokens, body.layers, body.norm, body.rope
        self.gradient_checkpointing = False
        self.post_init()


class _CausalLM(CardChat, HanlinCausalLM):
    """A body and `lm_head`, with the `chat` and `stream_chat` of the model cards."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - Transformers wants a dict
    body: ClassVar[type[_Body]]

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size, cut="out")
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings


class InternLMPreTrainedModel(HanlinPreTrainedModel):
    config_class = InternLMConfig


class InternLMModel(InternLMPreTrainedModel, _Body):
    """InternLM's body."""


class InternLMForCausalLM(InternLMPreTrainedModel, _CausalLM):
    """InternLM's language model.

    Attributes:
        early_format: write conversations as internlm-chat-7b-v1_1 does, with `<eoh>` and without a system turn; known
            by the name that the model was loaded under, and free to set.
    """

    body = InternLMModel

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)
        self.early_format = str(config.name_or_path).rstrip("/").endswith("v1_1")

    def chat_format(self, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        return InternLMFormat(to_hanlin(tokenizer), early=self.early_format)


class InternLM3PreTrainedModel(HanlinPreTrainedModel):
    config_class = InternLM3Config


class InternLM3Model(InternLM3PreTrainedModel, _Body):
    """InternLM3's body."""


class InternLM3ForCausalLM(InternLM3PreTrainedModel, _CausalLM):
    """InternLM3's language model."""

    body = InternLM3Model

    def chat_format(self, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        made = to_hanlin(tokenizer)
        named = all(made.token_id(piece) in made.special_ids for piece in SPECIALS)
        return InternLM2Format(made) if named else ChatMLFormat(made, bos=True)


class InternLMTokenizer(SlowSentencePiece):
    """The tokenizer of InternLM 1, over SentencePiece."""


class InternLM3Tokenizer(SlowSentencePiece):
    """The tokenizer of InternLM3, over SentencePiece."""


INTERNLM = HFFamily(
    config=InternLMConfig,
    model=InternLMModel,
    causal_lm=InternLMForCausalLM,
    slow_tokenizer=InternLMTokenizer,
)
INTERNLM3 = HFFamily(
    config=InternLM3Config,
    model=InternLM3Model,
    causal_lm=InternLM3ForCausalLM,
    slow_tokenizer=InternLM3Tokenizer,
)
