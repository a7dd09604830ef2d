"""ChatGLM-6B as Transformers classes, with the names, defaults and signatures of the released files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizer, PreTrainedTokenizerBase

from hanlin.chat.chatglm import ChatGLMFormat
from hanlin.errors import ConfigError, RequestError, TokenizerError
from hanlin.hf.base import HanlinCausalLM, HanlinConfig, HanlinModel, HanlinPreTrainedModel
from hanlin.hf.chat import History, encode_prompt, reply_text, stream
from hanlin.hf.register import WHERE, HFFamily
from hanlin.hf.row_quantised import RowQuantisedEmbedding, RowQuantisedLinear, quantise_rows
from hanlin.hf.tokenizer import to_hanlin
from hanlin.layers.linear import Linear
from hanlin.models import chatglm
from hanlin.models.registry import family_name
from hanlin.tokenizers import loading
from hanlin.tokenizers.chatglm import ChatGLMTokenizer as PlainTokenizer
from hanlin.tokenizers.spm_model import SpmModel
from hanlin.types import Message

__all__ = [
    "CHATGLM",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "GLMCausalLM",
    "InvalidScoreLogitsProcessor",
]

# Where a cache remembers the layout of its prompts, for steps that come without it.
_LAYOUT = "hanlin_chatglm_layout"


class ChatGLMConfig(HanlinConfig):
    """The keys of a released `config.json`, and what the released code takes a missing one to mean."""

    model_type = "chatglm"
    attribute_map = {"num_hidden_layers": "num_layers"}  # noqa: RUF012 - as Transformers has it

    def __init__(
        self,
        vocab_size: int = 150528,
        hidden_size: int = 4096,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        layernorm_epsilon: float = 1e-5,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        mask_token_id: int | None = None,
        gmask_token_id: int | None = None,
        pad_token_id: int | None = 0,
        max_sequence_length: int = 2048,
        inner_hidden_size: int = 16384,
        position_encoding_2d: bool = True,
        quantization_bit: int = 0,
        quantization_embeddings: bool = False,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.layernorm_epsilon = layernorm_epsilon
        self.use_cache = use_cache
        self.max_sequence_length = max_sequence_length
        self.inner_hidden_size = inner_hidden_size
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit
        self.quantization_embeddings = quantization_embeddings
        self.pre_seq_len = pre_seq_len
        self.prefix_projection = prefix_projection
        offset = max(0, vocab_size - 130528)
        self.mask_token_id = 130000 + offset if mask_token_id is None else mask_token_id
        self.gmask_token_id = 130001 + offset if gmask_token_id is None else gmask_token_id
        kwargs.pop("tie_word_embeddings", None)
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=130004 + offset if bos_token_id is None else bos_token_id,
            eos_token_id=130005 + offset if eos_token_id is None else eos_token_id,
            tie_word_embeddings=False,
            **kwargs,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Transformers' own; ChatGLM2 and all later ones share the `model_type` and get their class of this name."""
        found = family_name({"model_type": cls.model_type, **config_dict})
        if found == "visualglm" and cls is ChatGLMConfig:
            from hanlin.hf.visualglm import VisualGLMConfig

            return VisualGLMConfig.from_dict(config_dict, **kwargs)
        if found not in (cls.model_type, "visualglm"):
            from hanlin.hf.chatglm2 import ChatGLMConfig as Later

            return Later.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def read(self, values: Mapping[str, Any]) -> chatglm.ChatGLMConfig:
        return chatglm.read_config(values)


class ChatGLMPreTrainedModel(HanlinPreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"


class ChatGLMModel(ChatGLMPreTrainedModel, HanlinModel):
    """The body, under its released tensor names.

    `attention_mask` is (N, S) with zeros for padding on the left; or, as the released tokenizer makes it, (N, 1, S, S)
    of booleans that are true where a token must not look. `position_ids` are (N, 2, S). Both are worked out from the
    ids where they are missing.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        body = chatglm.ChatGLMModel(config.to_hanlin())  # type: ignore[arg-type]
        self.word_embeddings, self.layers, self.rope = body.word_embeddings, body.layers, body.rope
        self.final_layernorm = body.final_layernorm
        if config.pre_seq_len:
            self.prefix_encoder = body.prefix_encoder
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def final_norm(self) -> nn.Module:
        return self.final_layernorm

    def soft_prefix(self) -> list[tuple[Tensor, Tensor]]:
        return self.prefix_encoder() if self.config.pre_seq_len else []

    def arrange(
        self,
        ids: Tensor | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
        shape: tuple[int, int, int],
        cache: Cache | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, length, past = shape
        given = mask is not None and mask.dim() == 4
        if position_ids is not None:
            position_ids = position_ids.to(device).reshape(-1, 2, length).expand(rows, -1, -1)
        layout = getattr(cache, _LAYOUT, None)
        if layout is None and ids is not None and not past and (position_ids is None or not given):
            layout = Layout.of(self.config, ids, None if given else mask)
            if cache is not None:
                setattr(cache, _LAYOUT, layout)
        if position_ids is None:
            if layout is None:
                raise RequestError("give input_ids from the start of the sequence, or position_ids (N, 2, S)")
            position_ids = layout.positions(past, past + length).to(device)
        if given:
            assert mask is not None
            seen = ~mask.bool() if not mask.is_floating_point() else mask > 0.5
            mask = seen[..., -length:, :]
        elif layout is not None and not past:
            mask = layout.seen(length).to(device)
        return position_ids.transpose(0, 1), mask, None


class Layout:
    """Where a batch's contexts end, where their masks stand, and how many tokens of padding are on the left.

    Attributes:
        context, place, pad: (N,), counted from the left end of the padded rows.
    """

    def __init__(self, context: Tensor, place: Tensor, pad: Tensor) -> None:
        self.context, self.place, self.pad = (x[:, None] for x in (context, place, pad))

    @classmethod
    def of(cls, config: ChatGLMConfig, ids: Tensor, mask: Tensor | None) -> Layout:
        """Raises:
        RequestError: rows without `<sop>`, or without `[gMASK]` or `[MASK]` before it.
        """
        index = torch.arange(ids.shape[1], device=ids.device)
        sop = ids == config.bos_token_id
        context = sop.int().argmax(1)
        before = index < context[:, None]
        gmask, blank = ((ids == i) & before for i in (config.gmask_token_id, config.mask_token_id))
        found = torch.where(gmask.any(1, keepdim=True), gmask, blank)
        wrong = [row for row, fine in enumerate((sop.any(1) & found.any(1)).tolist()) if not fine]
        if wrong:
            raise RequestError(
                f"rows {wrong} of the ids hold no [gMASK] <sop>; encode text with the model's tokenizer, it adds both"
            )
        pad = torch.zeros_like(context) if mask is None else (mask[:, : ids.shape[1]].cumsum(1) == 0).sum(1)
        return cls(context, found.int().argmax(1), pad.to(ids.device))

    def positions(self, start: int, stop: int) -> Tensor:
        """Of tokens start..stop of the padded rows: (N, 2, stop - start)."""
        index = torch.arange(start, stop, device=self.context.device)[None]
        first = torch.where(index < self.context, index, self.place) - self.pad
        return torch.stack((first.clamp(min=0), (index - self.context + 1).clamp(min=0)), 1)

    def seen(self, length: int) -> Tensor:
        """Which of the first `length` tokens see which, and every one itself: (N, 1, length, length)."""
        index = torch.arange(length, device=self.context.device)
        row, column = index[:, None], index[None]
        context, pad = self.context[:, :, None], self.pad[:, :, None]
        seen = ((column <= row) | (column < context)) & (column >= pad) & (row >= pad)
        return (seen | (row == column))[:, None]


class InvalidScoreLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Scores that are no numbers all become 0, but for one harmless token's: as the released code does."""

    def __init__(self, token: int = 5) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(torch.isfinite(scores).all()):
            return scores
        scores = torch.zeros_like(scores)
        scores[..., self.token] = 5e4
        return scores


class GLMCausalLM(HanlinCausalLM):
    """What the language models of all ChatGLMs share: soft prefixes that alone learn, `quantize`, options of `chat`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().from_pretrained(*args, **kwargs)
        (made[0] if isinstance(made, tuple) else made).freeze()  # loading makes parameters anew
        return made

    def freeze(self) -> None:
        """Where there is a soft prefix, it alone learns."""
        if self.config.pre_seq_len:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".prefix_encoder." in name)

    @property
    def model(self) -> HanlinModel:
        return cast(HanlinModel, self.transformer)

    @property
    def harmless(self) -> int:
        """The token that is chosen where the scores are no numbers."""
        return 5

    def quantize(self, bits: int, *args: Any, **kwargs: Any) -> Self:
        """Keep the linear layers of all blocks in 4 or 8 bits, one scale a row, as the released code does. In place.

        Further arguments of the released code, which choose its CUDA and C kernels, change nothing here.

        Raises:
            ConfigError: another number of bits, or a model that has fewer already.
        """
        if bits not in (4, 8):
            raise ConfigError(f"quantize takes 4 or 8 bits, not {bits!r}")
        if self.config.quantization_bit == bits:
            return self
        if self.config.quantization_bit:
            raise ConfigError(f"this model has {self.config.quantization_bit} bits already; load the original instead")
        quantise_rows(self.model.blocks, bits)
        self.config.quantization_bit = bits
        return self

    def options(
        self,
        max_length: int,
        do_sample: bool,
        top_p: float,
        temperature: float,
        processors: Sequence[LogitsProcessor] | None,
        others: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What `generate` gets; greedy search takes no temperature, and Transformers warns about one."""
        guard = InvalidScoreLogitsProcessor(self.harmless)
        sampling = {"top_p": top_p, "temperature": temperature} if do_sample else {}
        length = {} if "max_new_tokens" in others else {"max_length": max_length}
        found = LogitsProcessorList([*(processors or ()), guard])
        return {"do_sample": do_sample, "logits_processor": found, **length, **sampling, **others}


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GLMCausalLM):
    """The language model, with the `chat`, `stream_chat` and `quantize` of the model card."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size, cut="out")
        if config.quantization_bit:
            quantise_rows(self.transformer.layers, config.quantization_bit, empty=True)
            if config.quantization_embeddings:
                self._quantise_ends(config.quantization_bit, empty=True)
        self.post_init()
        self.freeze()

    def quantize(self, bits: int, *args: Any, quantize_embeddings: bool = False, **kwargs: Any) -> Self:
        """As for all ChatGLMs; `quantize_embeddings` keeps the table of embeddings and the head in few bits too."""
        if self.config.quantization_bit and quantize_embeddings != self.config.quantization_embeddings:
            raise ConfigError("this model is quantised already; load the original instead")
        super().quantize(bits, *args, **kwargs)
        if quantize_embeddings and not self.config.quantization_embeddings:
            self._quantise_ends(bits)
            self.config.quantization_embeddings = True
        return self

    def _quantise_ends(self, bits: int, *, empty: bool = False) -> None:
        table = self.transformer.word_embeddings
        self.transformer.word_embeddings = RowQuantisedEmbedding.of(table, bits, empty=empty)
        self.lm_head = RowQuantisedLinear.of(cast(Linear, self.lm_head), bits, empty=empty)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' own; the files of ChatGLM2 and all later ones give their class of this name."""
        name = pretrained_model_name_or_path
        if kwargs.get("config") is None:
            config = ChatGLMConfig.from_pretrained(name, **{key: kwargs[key] for key in WHERE if key in kwargs})
            if hasattr(config, "eva_config") and cls is ChatGLMForConditionalGeneration:
                from hanlin.hf.visualglm import ChatGLMForConditionalGenerationWithImage

                return ChatGLMForConditionalGenerationWithImage.from_pretrained(name, *args, **kwargs)
            if not isinstance(config, ChatGLMConfig):
                from hanlin.hf.chatglm2 import ChatGLMForConditionalGeneration as Later

                return Later.from_pretrained(name, *args, **kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    @property
    def harmless(self) -> int:
        return 5 + max(0, int(self.config.vocab_size) - 130528)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = cast(dict[str, Any], super().prepare_inputs_for_generation(input_ids, *args, **kwargs))
        if inputs.get("input_ids") is not None:  # Transformers counts one row of positions
            mask = kwargs.get("attention_mask")
            layout = Layout.of(self.config, input_ids, mask)
            length = inputs["input_ids"].shape[1]
            inputs["position_ids"] = layout.positions(input_ids.shape[1] - length, input_ids.shape[1])
        return inputs

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As Transformers' `generate`; a released four-dimensional `attention_mask` is taken too."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            kwargs["attention_mask"] = (~mask[:, 0, -1].bool()).long()
        kwargs.pop("position_ids", None)
        return super().generate(inputs, generation_config, **kwargs)

    @torch.no_grad()
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer a query: (response, history with this turn). `kwargs` go to `generate`."""
        chat_format, inputs = self._prompt(tokenizer, query, history)
        options = self.options(max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        ids = self.generate(**inputs, num_beams=num_beams, **options)[0, inputs["input_ids"].shape[1] :]
        response = reply_text(chat_format, ids.tolist())
        return response, [*(history or ()), (query, response)]

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """Answer a query piece by piece: (response so far, history with it)."""
        chat_format, inputs = self._prompt(tokenizer, query, history)
        options = self.options(max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        return stream(self, chat_format, inputs, query, list(history or ()), **options)

    def _prompt(
        self, tokenizer: PreTrainedTokenizerBase, query: str, history: Sequence[tuple[str, str]] | None
    ) -> tuple[ChatGLMFormat, Any]:
        chat_format, turns = ChatGLMFormat(to_hanlin(tokenizer)), []
        for asked, answered in history or ():
            turns += [Message(role="user", content=asked), Message(role="assistant", content=answered)]
        ids = chat_format.render([*turns, Message(role="user", content=query)]).ids
        return chat_format, encode_prompt(ids, self.get_input_embeddings().weight.device)


class ChatGLMTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """The released tokenizer: `[gMASK] <sop>` behind a text, padding on the left.

    `attention_mask` is (N, S), from which the model works out the rest; the released one is (N, 1, S, S). Special
    tokens are never part of decoded text.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012 - as Transformers has it
    model_input_names = ("input_ids", "attention_mask")
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise TokenizerError("ChatGLMTokenizer needs ice_text.model, which the directory does not have")
        path = Path(vocab_file)
        model = SpmModel.parse(loading.Directory(path.parent).read(path.name, limit=32 << 20), vocab_file)
        self.vocab_file, self.end_token, self.gmask_token = vocab_file, end_token, gmask_token
        self.num_image_tokens = num_image_tokens if num_image_tokens is not None else loading.image_tokens(model)
        self._plain = PlainTokenizer(model, images=self.num_image_tokens, name=vocab_file)
        self._pieces = self._plain.pieces
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        kwargs.pop("extra_special_tokens", None)
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            bos_token=bos_token,
            eos_token=eos_token,
            end_token=end_token,
            mask_token=mask_token,
            gmask_token=gmask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            num_image_tokens=self.num_image_tokens,
            **{"clean_up_tokenization_spaces": False, **kwargs},
        )

    def make_hanlin(self) -> PlainTokenizer:
        """The same tokenizer for the chat format."""
        return self._plain

    @property
    def gmask_token_id(self) -> int:
        return self._ids[self.gmask_token]

    @property
    def end_token_id(self) -> int:
        return self._ids[self.end_token]

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._pieces[i] for i in self._plain.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if 0 <= index < len(self._pieces) else ""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self._plain.decode([self._ids[token] for token in tokens if token in self._ids])

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self._plain.decode([i for i in ids if i < len(self._pieces)])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`A [gMASK] <sop>`, or `A [gMASK] <sop> B <eop>` of a pair."""
        suffix = list(self._plain.specials.suffix)
        pair = [] if token_ids_1 is None else [*token_ids_1, cast(int, self._plain.specials.eos)]
        return [*token_ids_0, *suffix, *pair]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "ice_text.model")
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


CHATGLM = HFFamily(
    config=ChatGLMConfig,
    # What the cards load with AutoModel can chat; the released `architectures` name the body all the same.
    model=ChatGLMForConditionalGeneration,
    causal_lm=ChatGLMForConditionalGeneration,
    seq2seq=ChatGLMForConditionalGeneration,
    slow_tokenizer=ChatGLMTokenizer,
)
