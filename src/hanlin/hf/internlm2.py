"""InternLM2 and InternLM2.5 as Transformers classes, with the names, defaults and signatures of the released files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from hanlin.chat.internlm2 import InternLM2Format
from hanlin.errors import ConfigError, RequestError
from hanlin.hf.base import HanlinCausalLM, HanlinConfig, HanlinModel, HanlinPreTrainedModel, plain_rope
from hanlin.hf.caches import CACHE, only_cache
from hanlin.hf.chat import CardChat
from hanlin.hf.register import HFFamily
from hanlin.hf.tokenizer import FastSentencePiece, SlowSentencePiece, to_hanlin
from hanlin.layers.linear import Linear
from hanlin.models import internlm2
from hanlin.models.config import DecoderConfig
from hanlin.types import ChatFormat, Message, ranks

__all__ = [
    "FAMILY",
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "InternLM2ForRewardModel",
    "InternLM2ForSequenceClassification",
    "InternLM2Model",
    "InternLM2Tokenizer",
    "InternLM2TokenizerFast",
]

Conversation = Sequence[Message | Mapping[str, Any]]

_REWARD_TOKEN = 92527  # "[UNUSED_TOKEN_130]", in all released reward models


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
        rope_theta, rope_scaling = plain_rope(kwargs, rope_theta, rope_scaling)
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


class InternLM2ForCausalLM(CardChat, InternLM2PreTrainedModel, HanlinCausalLM):
    """The language model, with the `chat` and `stream_chat` of the model card."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}  # noqa: RUF012 - Transformers wants a dict

    def __init__(self, config: InternLM2Config) -> None:
        if "InternLM2ForRewardModel" in (config.architectures or ()):
            raise ConfigError("this is a reward model, it writes nothing; load it with AutoModel.from_pretrained")
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output: nn.Module = Linear(config.hidden_size, config.vocab_size, cut="out")
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    def chat_format(self, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        return InternLM2Format(to_hanlin(tokenizer))


class InternLM2ForSequenceClassification(GenericForSequenceClassification, InternLM2PreTrainedModel):  # type: ignore[misc]
    """The body and `score`, a linear head on each row's last token that is not padding."""

    def __init__(self, config: InternLM2Config) -> None:
        super(GenericForSequenceClassification, self).__init__(config)  # its own asks AutoModel, which may give more
        self.num_labels = config.num_labels
        self.model = InternLM2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """The body and `v_head`, one value at the token that ends a conversation, with the methods of the model card."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head = Linear(config.hidden_size, 1)
        self.reward_token_id: int = getattr(config, "reward_token_id", _REWARD_TOKEN)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """ids (N, S) -> the value (N, 1) at each row's last token that `attention_mask` keeps.

        Raises:
            RequestError: that token is not the reward token.
        """
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=only_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        states = body.last_hidden_state
        last = torch.full((len(states),), states.shape[1] - 1, device=states.device)
        if attention_mask is not None:
            last -= attention_mask.to(states.device).bool().flip(1).long().argmax(1)
        row = torch.arange(len(states), device=states.device)
        if input_ids is not None and bool((input_ids.to(row.device)[row, last] != self.reward_token_id).any()):
            raise RequestError("the last token of input_ids must be the reward token; get_score puts it there")
        output = SequenceClassifierOutputWithPast(
            logits=self.v_head(states[row, last]).float(),
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            **{CACHE: body.get(CACHE)},
        )
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def get_score(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, **kwargs: Any) -> float:
        """How good a conversation's replies are. `kwargs` go to the model."""
        return self.get_scores(tokenizer, [conversation], **kwargs)[0]

    @torch.no_grad()
    def get_scores(
        self, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], **kwargs: Any
    ) -> list[float]:
        """A score for each conversation, computed as one padded batch.

        A conversation is written as the chat template writes it, with one begin token and without a default system
        turn, and is closed by the reward token.
        """
        chat_format = InternLM2Format(to_hanlin(tokenizer))
        rows = []
        for conversation in conversations:
            turns = [Message.parse(turn) for turn in conversation]
            rendered = chat_format.render(turns, generation_prompt=False)
            rows.append(torch.tensor([*rendered.ids, self.reward_token_id]))
        side = tokenizer.padding_side
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_side=side, padding_value=tokenizer.pad_token_id or 0)
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        device = self.get_input_embeddings().weight.device
        output = self(input_ids=ids.to(device), attention_mask=mask.to(device), return_dict=True, **kwargs)
        return [float(score) for score in output.logits[:, 0]]

    def compare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversation1: Conversation,
        conversation2: Conversation,
        return_logits: bool = False,
        **kwargs: Any,
    ) -> bool | tuple[float, float]:
        """Whether the first conversation scores higher; or both scores."""
        first = self.get_score(tokenizer, conversation1, **kwargs)
        second = self.get_score(tokenizer, conversation2, **kwargs)
        return (first, second) if return_logits else first > second

    def rank(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: Sequence[Conversation],
        return_logits: bool = False,
        **kwargs: Any,
    ) -> list[int] | list[float]:
        """Each conversation's place, 0 for the highest score, as the model card says and uses it; or the scores.

        (The released code returns the conversations' numbers in order of their scores, which is something else for
        three conversations and more.)
        """
        scores = self.get_scores(tokenizer, conversations, **kwargs)
        return scores if return_logits else ranks(scores)


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
    others=(InternLM2ForRewardModel,),
    slow_tokenizer=InternLM2Tokenizer,
    fast_tokenizer=InternLM2TokenizerFast,
)
