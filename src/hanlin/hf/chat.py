"""The model cards' `chat` and `stream_chat`, over Hanlin's chat formats and Transformers' `generate`."""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hanlin.chat.internlm2 import META_INSTRUCTION
from hanlin.errors import RequestError
from hanlin.types import ChatFormat, Message, ReplyParser

__all__ = ["CardChat", "History", "encode_prompt", "reply_text", "stream"]

History = list[tuple[str, str]]

_AHEAD = 20  # how many tokens may be generated before somebody takes their text


def encode_prompt(ids: Sequence[int], device: torch.device) -> BatchEncoding:
    """One prompt as `generate` takes it: ids and mask, each (1, S)."""
    row = torch.tensor([list(ids)], device=device)
    return BatchEncoding({"input_ids": row, "attention_mask": torch.ones_like(row)})


def reply_text(chat_format: ChatFormat, ids: Sequence[int]) -> str:
    """The text of a whole reply, up to its stop token, special tokens left out."""
    parser = chat_format.parser()
    return "".join(event.text for event in (*parser.push(ids), *parser.finish()))


def stream(
    model: Any, chat_format: ChatFormat, inputs: BatchEncoding, query: str, history: History, **options: Any
) -> Iterator[tuple[str, History]]:
    """Yield ("", history with the new turn), then the reply as it grows, one step a piece of settled text.

    Generation runs in a thread of its own, at most a few tokens ahead. It ends with the iterator: an abandoned loop
    stops it, and an error in it is raised here.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue(_AHEAD)
    abandoned = threading.Event()
    streamer = _Streamer(chat_format.parser(), pieces, abandoned)
    criteria = StoppingCriteriaList([*options.pop("stopping_criteria", ()), _Abandoned(abandoned)])

    def generate() -> None:
        try:
            model.generate(**inputs, streamer=streamer, stopping_criteria=criteria, **options)
            streamer.hand(None)
        except BaseException as error:  # it must reach the caller, whatever it is
            streamer.hand(error)

    worker = threading.Thread(target=generate, name="hanlin-stream-chat", daemon=True)
    worker.start()
    response = ""
    try:
        yield response, [*history, (query, response)]
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            response += piece
            yield response, [*history, (query, response)]
    finally:
        abandoned.set()
        worker.join()


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Turns the ids that `generate` gives into settled text."""

    def __init__(
        self, parser: ReplyParser, pieces: queue.Queue[str | BaseException | None], abandoned: threading.Event
    ) -> None:
        self._parser, self._pieces, self._abandoned = parser, pieces, abandoned
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:  # `generate` begins with the prompt, once for each reply
            if value.dim() > 1 and value.shape[0] > 1:
                raise RequestError("stream_chat streams one reply; leave num_return_sequences at 1")
            self._prompt = False
            return
        self._text(self._parser.push(value.reshape(-1).tolist()))

    def end(self) -> None:
        self._text(self._parser.finish())

    def hand(self, piece: str | BaseException | None) -> None:
        """Wait for room, but not for a reader who is gone."""
        while not self._abandoned.is_set():
            try:
                return self._pieces.put(piece, timeout=0.05)
            except queue.Full:
                continue

    def _text(self, events: Sequence[Any]) -> None:
        text = "".join(event.text for event in events)
        if text:
            self.hand(text)


class _Abandoned(StoppingCriteria):  # type: ignore[misc]
    """Stops `generate` when nobody reads any more."""

    def __init__(self, abandoned: threading.Event) -> None:
        self._abandoned = abandoned

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._abandoned.is_set(), device=input_ids.device)


class CardChat:
    """`chat` and `stream_chat` as InternLM's model cards have them, for a model that can `generate`."""

    @abstractmethod
    def chat_format(self, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """How this model writes conversations."""

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
        chat_format = self.chat_format(tokenizer)
        if meta_instruction == META_INSTRUCTION and chat_format.default_system is None:
            meta_instruction = ""  # the default of a signature; the format knows none
        turns = [Message(role="system", content=meta_instruction)] if meta_instruction else []
        for asked, answered in history or ():
            turns += (Message(role="user", content=asked), Message(role="assistant", content=answered))
        turns.append(Message(role="user", content=query))
        ids = chat_format.render(turns).ids
        return encode_prompt(ids, cast(Any, self).get_input_embeddings().weight.device)

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
        chat_format = self.chat_format(tokenizer)
        inputs = self.build_inputs(tokenizer, query, history, meta_instruction)
        options = _options(chat_format, max_new_tokens, do_sample, temperature, top_p, kwargs)
        ids = cast(Any, self).generate(**inputs, streamer=streamer, **options)[0, inputs["input_ids"].shape[1] :]
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
        chat_format = self.chat_format(tokenizer)
        inputs = self.build_inputs(tokenizer, query, history, meta_instruction)
        options = _options(chat_format, max_new_tokens, do_sample, temperature, top_p, kwargs)
        return stream(self, chat_format, inputs, query, list(history or ()), **options)


def _options(
    chat_format: ChatFormat,
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
