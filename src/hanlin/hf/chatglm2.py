"""ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4 as Transformers classes, with the names, defaults and signatures of the
released files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, PreTrainedTokenizerBase

from hanlin.chat.chatglm import SHOWN, TIME
from hanlin.chat.chatglm2 import ChatGLM2Format
from hanlin.chat.chatglm3 import ChatGLM3Format
from hanlin.chat.glm4 import GLM4Format
from hanlin.chat.literals import read_call
from hanlin.chat.reply import TextParser, arguments_object
from hanlin.chat.roles import Part, fenced
from hanlin.hf.base import HanlinConfig, HanlinModel, HanlinPreTrainedModel
from hanlin.hf.chat import encode_prompt, stream
from hanlin.hf.chatglm import GLMCausalLM
from hanlin.hf.chatglm2_tokenizer import ChatGLM4Tokenizer, ChatGLMTokenizer, chat_format, parts_of
from hanlin.hf.register import HFFamily
from hanlin.hf.row_quantised import quantise_rows
from hanlin.hf.tokenizer import to_hanlin
from hanlin.layers.linear import Linear
from hanlin.models import chatglm2
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.types import Message, ReplyParser, Tool

__all__ = ["CHATGLM2", "ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel"]

History = list[Any]
_ASSISTANT = "<|assistant|>"
_IDS = "hanlin_ids"  # where a cache remembers the tokens that it holds


class ChatGLMConfig(HanlinConfig):
    """The keys of a released `config.json`, and what the released code takes a missing one to mean."""

    model_type = "chatglm"
    attribute_map = {  # noqa: RUF012 - as Transformers has it
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "max_position_embeddings": "seq_length",
    }

    def __init__(
        self,
        num_layers: int = 28,
        padded_vocab_size: int = 65024,
        hidden_size: int = 4096,
        ffn_hidden_size: int = 13696,
        kv_channels: int = 128,
        num_attention_heads: int = 32,
        seq_length: int = 2048,
        hidden_dropout: float = 0.0,
        classifier_dropout: float | None = None,
        attention_dropout: float = 0.0,
        layernorm_epsilon: float = 1e-5,
        rmsnorm: bool = True,
        apply_residual_connection_post_layernorm: bool = False,
        post_layer_norm: bool = True,
        add_bias_linear: bool = False,
        add_qkv_bias: bool = False,
        bias_dropout_fusion: bool = True,
        multi_query_attention: bool = False,
        multi_query_group_num: int = 1,
        rope_ratio: float = 1,
        apply_query_key_layer_scaling: bool = True,
        attention_softmax_in_fp32: bool = True,
        fp32_residual_connection: bool = False,
        quantization_bit: int = 0,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        **kwargs: Any,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        for key, value in given.items():
            setattr(self, key, value)
        for key in (*self.attribute_map, "tie_word_embeddings"):  # other names of what was given
            kwargs.pop(key, None)
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(tie_word_embeddings=False, **kwargs)

    def read(self, values: Mapping[str, Any]) -> chatglm2.ChatGLM2Config:
        return chatglm2.read_config(values)


class ChatGLMPreTrainedModel(HanlinPreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq$",)  # type: ignore[assignment]


class ChatGLMModel(ChatGLMPreTrainedModel, HanlinModel):
    """The body and, under its released name in it, the head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        body = chatglm2.ChatGLM2Model(cast(chatglm2.ChatGLM2Config, config.to_hanlin()))
        self.embedding, self.encoder, self.output_layer = body.embedding, body.encoder, body.output_layer
        self.rope = body.rope
        if config.pre_seq_len:
            self.prefix_encoder = body.prefix_encoder
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.encoder.final_layernorm

    def soft_prefix(self) -> list[tuple[Tensor, Tensor]]:
        return self.prefix_encoder() if self.config.pre_seq_len else []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding["word_embeddings"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding["word_embeddings"] = value


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GLMCausalLM):
    """The language model, with the `chat`, `stream_chat` and `quantize` of the model cards.

    The tokenizer says which model it is. With ChatGLM2's, `history` holds (question, answer); with ChatGLM3's and
    GLM-4's it holds {"role", "content", "metadata"}, a first system entry may have "tools", and `role` is that of the
    query ("observation" for a tool's result). Replies that call a tool are {"name", "parameters"}, or {"name",
    "content"} without tools; calls in Python's syntax are read as literals and never run.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        if config.quantization_bit:
            quantise_rows(self.transformer.blocks, config.quantization_bit, empty=True)
        self.post_init()
        self.freeze()

    @property
    def harmless(self) -> int:
        return 198 if self.config.padded_vocab_size > 100_000 else 5  # GLM-4's line end

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.transformer.output_layer = cast(Linear, new_embeddings)

    @torch.no_grad()
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Any] | None = None,
        role: str | int = "user",
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, History]:
        """Answer a query: (response, history with this turn). `kwargs` go to `generate`.

        ChatGLM2's code has `max_length` in the place of `role`; a number there is taken for it.
        """
        who, max_length = ("user", role) if isinstance(role, int) else (role, max_length)
        turn = _Turn(to_hanlin(tokenizer), query, history, who)
        inputs = encode_prompt(turn.ids, self.transformer.output_layer.weight.device)
        options = self.options(max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        options.setdefault("eos_token_id", list(turn.form.stop_ids))
        ids = self.generate(**inputs, num_beams=num_beams, **options)[0, len(turn.ids) :].tolist()
        parser = turn.parser()
        text = "".join(event.text for event in (*parser.push(ids), *parser.finish()))
        return turn.told(text)

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        past_key_values: Any = None,
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Answer a query piece by piece: (response so far, history with it), and the cache if it is to be returned.

        `past_key_values` from the turn before is used as far as this conversation begins with what it holds.
        """
        turn = _Turn(to_hanlin(tokenizer), query, history, role)
        inputs = encode_prompt(turn.ids, self.transformer.output_layer.weight.device)
        options = self.options(max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        options.setdefault("eos_token_id", list(turn.form.stop_ids))
        held = getattr(past_key_values, _IDS, None)
        known = held is not None and len(held) < len(turn.ids) and turn.ids[: len(held)] == held
        cache = past_key_values if known else DynamicCache(config=self.config)
        pieces = stream(self, turn, inputs, query, [], past_key_values=cache, **options)  # type: ignore[arg-type]
        next(pieces)  # the empty beginning
        for text, _ in pieces:
            response, told = turn.told(text)
            setattr(cache, _IDS, [*turn.ids, *turn.written][: cache.get_seq_length()])
            yield (response, told, cache) if return_past_key_values else (response, told)
        setattr(cache, _IDS, [*turn.ids, *turn.written][: cache.get_seq_length()])

    def process_response(self, output: str, history: Sequence[Any]) -> tuple[Any, History]:
        """A reply with its role tokens, and the history with its parts: what the reply's last part says."""
        return _processed(output, list(deepcopy(history)))


class _Turn:
    """A query in its conversation, as one kind of model or the other takes it; a chat format as far as `stream` knows.

    Attributes:
        written: the ids of the reply so far.
    """

    def __init__(self, plain: BaseTokenizer, query: str, history: Sequence[Any] | None, role: str) -> None:
        self.form: ChatGLM2Format | ChatGLM3Format | GLM4Format = chat_format(plain)
        self._plain, self._query, self._role = plain, query, role
        self._history: History = list(deepcopy(history or ()))
        self.written: list[int] = []
        if isinstance(self.form, ChatGLM2Format):
            turns = [
                Message(role=who, content=text)
                for pair in self._history
                for who, text in zip(("user", "assistant"), pair, strict=True)
            ]
            self.ids = list(self.form.render([*turns, Message(role="user", content=query)]).ids)
            return
        parts = parts_of(self.form, self._history)
        parts += [Part("tool" if role == "observation" else role, query)]
        self.ids = list(self.form.write(parts, generation_prompt=True).rendered().ids)

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        return _Recorder(self)

    def told(self, text: str) -> tuple[Any, History]:
        """(response, history) of a reply, or of its beginning."""
        if isinstance(self.form, ChatGLM2Format):
            response = text.strip().replace(TIME, SHOWN)
            return response, [*self._history, (self._query, response)]
        before = [*deepcopy(self._history), {"role": self._role, "content": self._query}]
        return _processed(text, before)


class _Recorder(TextParser):
    """A reply's raw text, with the tokens that part it, and its ids."""

    def __init__(self, turn: _Turn) -> None:
        super().__init__(turn._plain, turn.form.stop_ids)
        self._turn, self._between = turn, turn._plain.token_id(_ASSISTANT)

    def push(self, ids: Sequence[int]) -> list[Any]:
        self._turn.written += ids
        return super().push(ids)

    def _take(self, token: int) -> None:
        if token != self._between:
            super()._take(token)
            return
        self._emit(self._detokenizer.finish() + _ASSISTANT)
        self._detokenizer = self._tokenizer.detokenizer(skip_special=self._skip_special)


def _processed(output: str, history: History) -> tuple[Any, History]:
    """The reply's last part, and the history with all of them."""
    response: Any = ""
    tools = bool(history) and isinstance(history[0], Mapping) and "tools" in history[0]
    for part in output.split(_ASSISTANT):
        metadata, line, content = part.partition("\n")
        if not line:
            metadata, content = "", part
        name = metadata.strip()
        if not name:
            content = content.strip()
            history.append({"role": "assistant", "metadata": metadata, "content": content})
            response = content.replace(TIME, SHOWN)
            continue
        history.append({"role": "assistant", "metadata": name, "content": content})
        parameters = _parameters(content) if tools else None
        known = parameters is not None
        response = {"name": name, "parameters": parameters} if known else {"name": name, "content": content}
    return response, history


def _parameters(content: str) -> dict[str, Any] | None:
    """What a call passes, as GLM-4 writes it or as ChatGLM3 does; None where it cannot be read (yet)."""
    given = arguments_object(content) if content.strip() else None
    if given is not None:
        return given
    call = read_call(fenced(content)[0])
    return call[1] if call else None


CHATGLM2 = HFFamily(
    name="chatglm2",
    config=ChatGLMConfig,
    model=ChatGLMForConditionalGeneration,
    causal_lm=ChatGLMForConditionalGeneration,
    seq2seq=ChatGLMForConditionalGeneration,
    slow_tokenizer=ChatGLMTokenizer,
    other_tokenizers=(ChatGLM4Tokenizer,),
)
