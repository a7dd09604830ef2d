"""VisualGLM-6B as Transformers classes, with the names and signatures of the released files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from hanlin import images as pictures
from hanlin.chat.visualglm import VisualGLMFormat
from hanlin.errors import RequestError
from hanlin.hf.chat import History, encode_prompt, reply_text, stream
from hanlin.hf.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from hanlin.hf.register import HFFamily
from hanlin.hf.tokenizer import to_hanlin
from hanlin.layers.embedding import Embedding
from hanlin.models import visualglm
from hanlin.models.eva import BLIP2
from hanlin.types import Message

__all__ = ["VISUALGLM", "ChatGLMForConditionalGenerationWithImage", "VisualGLMConfig"]


class VisualGLMConfig(ChatGLMConfig):
    """ChatGLM-6B's keys, and those of the image encoder."""

    def __init__(
        self,
        image_length: int = 32,
        eva_config: dict[str, Any] | None = None,
        qformer_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_length, self.eva_config, self.qformer_config = image_length, eva_config, qformer_config
        super().__init__(**kwargs)

    def read(self, values: Mapping[str, Any]) -> visualglm.VisualGLMConfig:
        return visualglm.read_config({k: v for k, v in values.items() if k != "tie_word_embeddings"})


class ChatGLMForConditionalGenerationWithImage(ChatGLMForConditionalGeneration):
    """The language model with its image encoder, and the `chat` and `stream_chat` of the model card."""

    config_class = VisualGLMConfig  # type: ignore[assignment]

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__(config)
        read = cast(visualglm.VisualGLMConfig, config.to_hanlin())
        self.image_length = read.image_length
        self.image_encoder = BLIP2(read.vision, read.queries, read.hidden_size)
        self.post_init()
        self.freeze()

    def forward(  # type: ignore[override]  # as released: it takes images
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | None = None,
        pre_image_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ChatGLM's; `images` (N, 3, S, S), normalised, take the places from `pre_image_length` on."""
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        if images is None or input_ids is None:
            return super().forward(input_ids=input_ids, **kwargs)
        rows, length = input_ids.shape
        start = int(pre_image_length or 0)
        if length < start + self.image_length or len(images) != rows:
            raise RequestError(f"{len(images)} images at {start} do not fit ids of shape {tuple(input_ids.shape)}")
        one = torch.arange(start, start + self.image_length, device=input_ids.device)
        places = (torch.arange(rows, device=input_ids.device)[:, None] * length + one).flatten()
        embedding = cast(Embedding, self.get_input_embeddings())
        embedding.given = places, self.image_encoder(images).flatten(0, 1)
        try:
            return super().forward(input_ids=input_ids, **kwargs)
        finally:
            embedding.given = None

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] < input_ids.shape[1]:
            inputs.pop("images", None)  # the cache holds it
        return inputs

    @torch.no_grad()
    def chat(  # type: ignore[override]  # as the card has it
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_path: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 1024,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        top_k: int = 30,
        temperature: float = 0.95,
        repetition_penalty: float = 1.2,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer a query about an image: (response, history with this turn). `kwargs` go to `generate`.

        `image_path` is a file, its bytes, or a Pillow image; "" or None for none. Nothing is fetched.
        """
        chat_format, inputs = self._asked(tokenizer, image_path, query, history)
        more = {"repetition_penalty": repetition_penalty, **({"top_k": top_k} if do_sample else {}), **kwargs}
        options = self.options(max_length, do_sample, top_p, temperature, logits_processor, more)
        ids = self.generate(**inputs, num_beams=num_beams, **options)[0, inputs["input_ids"].shape[1] :]
        response = reply_text(chat_format, ids.tolist())
        return response, [*(history or ()), (query, response)]

    def stream_chat(  # type: ignore[override]  # as the card has it
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_path: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 1024,
        do_sample: bool = True,
        top_p: float = 0.7,
        top_k: int = 30,
        temperature: float = 0.95,
        repetition_penalty: float = 1.2,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """Answer a query about an image piece by piece: (response so far, history with it)."""
        chat_format, inputs = self._asked(tokenizer, image_path, query, history)
        more = {"repetition_penalty": repetition_penalty, **({"top_k": top_k} if do_sample else {}), **kwargs}
        options = self.options(max_length, do_sample, top_p, temperature, logits_processor, more)
        return stream(self, chat_format, inputs, query, list(history or ()), **options)

    def _asked(
        self, tokenizer: PreTrainedTokenizerBase, image: Any, query: str, history: Sequence[tuple[str, str]] | None
    ) -> tuple[VisualGLMFormat, Any]:
        # The released class asks in Chinese, whatever the language of the question.
        chat_format = VisualGLMFormat(to_hanlin(tokenizer), image_length=self.image_length, english=False)
        turns = []
        for asked, answered in history or ():
            turns += [Message(role="user", content=asked), Message(role="assistant", content=answered)]
        shown = () if image is None or image == "" else (pictures.of(image),)
        rendered = chat_format.render([*turns, Message(role="user", content=query, images=shown)])
        weight = self.image_encoder.glm_proj.weight
        inputs = encode_prompt(rendered.ids, weight.device)
        for start, data in rendered.images:
            size = cast(visualglm.VisualGLMConfig, self.config.to_hanlin()).vision.image_size
            pixels = torch.from_numpy(pictures.pixels(data, size))[None]
            inputs["images"], inputs["pre_image_length"] = pixels.to(weight.device, weight.dtype), start
        return chat_format, inputs


VISUALGLM = HFFamily(
    name="visualglm",
    config=VisualGLMConfig,
    model=ChatGLMForConditionalGenerationWithImage,
    causal_lm=ChatGLMForConditionalGenerationWithImage,
    seq2seq=ChatGLMForConditionalGenerationWithImage,
    slow_tokenizer=ChatGLMTokenizer,
)
