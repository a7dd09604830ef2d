"""InternLM2 and InternLM2.5 as Transformers classes, with the names, defaults and signatures of the released files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GenericForSequenceClassification

from hanlin.chat.internlm2 import META_INSTRUCTION, InternLM2Format
from hanlin.hf.base import HanlinCausalLM, HanlinConfig, HanlinModel, HanlinPreTrainedModel
from hanlin.hf.chat import History, encode_prompt, reply_text, stream
from hanlin.hf.register import HFFamily
from hanlin.hf.tokenizer import FastSentencePiece, SlowSentencePiece, to_hanlin
from hanlin.layers.linear import Linear
from hanlin.models import internlm2
from hanlin.models.config import DecoderConfig
from hanlin.types import Message

__all__ = [
    "FAMILY",
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "InternLM2ForSequenceClassification",
    "InternLM2Model",
    "InternLM2Tokenizer",
    "InternLM2TokenizerFast",
]


class InternLM2Config(HanlinConfig):
    """The keys of a released `config.json`, and what the released code takes a missing one to mean."""

    model_type = "internlm2"
    rope_scaling: dict[str, Any] | None = None  # a plain attribute here, not Transformers' alias of rope_parameters

    def __init__(
        self,
        vocab_size: int = 103168,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        bias: bool = True,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        parameters = kwargs.pop("rope_parameters", None)  # how Transformers 5 writes the two
        if isinstance(parameters, Mapping):
            rope_theta = parameters.get("rope_theta", rope_theta)
            scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
            if rope_scaling is None and scaling.get("rope_type", "default") != "default":
                rope_scaling = scaling
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bias = bias
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def read(self, values: Mapping[str, Any]) -> DecoderConfig:
        return internlm2.read_config(values)


class InternLM2PreTrainedModel(HanlinPreTrainedModel):
    config_class = InternLM2Config
    _input_embed_layer = "tok_embeddings"


class InternLM2Model(InternLM2PreTrainedModel, HanlinModel):
    """The body, under its released tensor names."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        body = internlm2.InternLM2Model(config.to_hanlin())
        self.tok_embeddings, self.layers, self.norm, self.rope = body.tok_embeddings, body.layers, body.norm, body.rope
        self.gradient_checkpointing = False
        self.post_init()


class InternLM2ForCausalLM(InternLM2PreTrainedModel, HanlinCausalLM):
    """The language model, with the `chat` and `stream_chat` of the model card."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}  # noqa: RUF012 - Transformers wants a dict

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output: nn.Module = Linear(config.hidden_size, config.vocab_size, cut="out")
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    def build_inputs(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = (),
        meta_instruction: str = "",
    ) -> BatchEncoding:
        """A conversation, ready for the assistant to go on, as ids and mask (1, S).

        Special tokens stand as ids; what the query, the history and the instruction say stays text.
        """
        turns = [Message(role="system", content=meta_instruction)] if meta_instruction else []
        for asked, answered in history or ():
            turns += (Message(role="user", content=asked), Message(role="assistant", content=answered))
        turns.append(Message(role="user", content=query))
        ids = InternLM2Format(to_hanlin(tokenizer)).render(turns).ids
        return encode_prompt(ids, self.get_input_embeddings().weight.device)

    @torch.no_grad()
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = (),
        streamer: BaseStreamer | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str = META_INSTRUCTION,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer a query: (response, history with this turn). `kwargs` go to `generate`."""
        chat_format = InternLM2Format(to_hanlin(tokenizer))
        inputs = self.build_inputs(tokenizer, query, history, meta_instruction)
        options = _options(chat_format, max_new_tokens, do_sample, temperature, top_p, kwargs)
        ids = self.generate(**inputs, streamer=streamer, **options)[0, inputs["input_ids"].shape[1] :]
        response = reply_text(chat_format, ids.tolist())
        return response, [*(history or ()), (query, response)]

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = (),
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str = META_INSTRUCTION,
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """Answer a query piece by piece: ("", history), then (response so far, history with it)."""
        chat_format = InternLM2Format(to_hanlin(tokenizer))
        inputs = self.build_inputs(tokenizer, query, history, meta_instruction)
        options = _options(chat_format, max_new_tokens, do_sample, temperature, top_p, kwargs)
        return stream(self, chat_format, inputs, query, list(history or ()), **options)


def _options(
    chat_format: InternLM2Format,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_p: float,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """What `generate` gets; greedy search takes no temperature, and Transformers warns about one."""
    sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
    stops = list(chat_format.stop_ids)
    return {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "eos_token_id": stops, **sampling, **others}


class InternLM2ForSequenceClassification(GenericForSequenceClassification, InternLM2PreTrainedModel):  # type: ignore[misc]
    """The body and `score`, a linear head on each row's last token that is not padding."""


class InternLM2Tokenizer(SlowSentencePiece):
    """The slow tokenizer, over SentencePiece; pads on the right."""


class InternLM2TokenizerFast(FastSentencePiece):
    """The fast tokenizer, converted from `tokenizer.model`; pads on the left."""

    slow_tokenizer_class = InternLM2Tokenizer


FAMILY = HFFamily(
    config=InternLM2Config,
    model=InternLM2Model,
    causal_lm=InternLM2ForCausalLM,
    classifier=InternLM2ForSequenceClassification,
    slow_tokenizer=InternLM2Tokenizer,
    fast_tokenizer=InternLM2TokenizerFast,
)
