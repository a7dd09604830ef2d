"""The model cards' `chat` and `stream_chat`, over Hanlin's chat formats and Transformers' `generate`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hanlin.errors import RequestError
from hanlin.types import ChatFormat, ReplyParser

__all__ = ["History", "encode_prompt", "reply_text", "stream"]

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
