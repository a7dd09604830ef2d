"""What a chat remembers: the turns, the system prompt, the sampling; and the file that keeps them."""

from __future__ import annotations

import base64
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hanlin.errors import RequestError, problems
from hanlin.types import Message, SamplingParams

__all__ = ["Conversation", "Saved", "read", "write"]

FORMAT = "hanlin-chat"
VERSION = 1
LARGEST = 64 * 2**20  # bytes; far beyond any context, small enough to read without harm


@dataclass(kw_only=True)
class Conversation:
    """A chat so far.

    Attributes:
        system: the system prompt; None leaves it to the chat format, "" sends an empty one.
        sampling: used for every reply.
        messages: all turns, without the system prompt. Only ever replaced, so that a caller can restore them.
        forgotten: how many of the oldest messages are kept here but no longer sent, because the context was full.
    """

    system: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    messages: tuple[Message, ...] = ()
    forgotten: int = 0

    def sent(self) -> list[Message]:
        """What the model gets to see."""
        system = [] if self.system is None else [Message(role="system", content=self.system)]
        sent = list(self.messages[self.forgotten :])
        hidden = tuple(image for message in self.messages[: self.forgotten] for image in message.images)
        if hidden and sent:  # what was shown is still talked about
            sent[0] = replace(sent[0], images=(*hidden, *sent[0].images))
        return system + sent

    def turns(self) -> list[int]:
        """Where each turn begins in `messages`, among those that are still sent."""
        return [i for i, message in enumerate(self.messages) if message.role == "user" and i >= self.forgotten]

    def forget(self) -> int:
        """Stop sending the older half of the turns; return how many. The last turn is always sent.

        Half, not one: every forgotten turn changes the start of the prompt, and with it the whole prefix cache.
        """
        turns = self.turns()
        dropped = len(turns) // 2
        if dropped:
            self.forgotten = turns[dropped]
        return dropped

    def clear(self) -> None:
        """Forget all turns; system prompt and sampling stay."""
        self.messages, self.forgotten = (), 0


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a file holds. `sampling` is None where the file has none (a bare list of OpenAI messages)."""

    system: str | None
    messages: tuple[Message, ...]
    sampling: SamplingParams | None
    model: str | None


def write(path: Path, conversation: Conversation, model: str) -> None:
    """Save as JSON, all or nothing.

    Raises:
        RequestError: the place cannot be written, or holds a file that is not a saved conversation.
    """
    system = [] if conversation.system is None else [Message(role="system", content=conversation.system)]
    text = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "sampling": {f.name: _plain(getattr(conversation.sampling, f.name)) for f in fields(SamplingParams)},
            "messages": [_openai(message) for message in (*system, *conversation.messages)],
        },
        ensure_ascii=False,
        indent=1,
    )
    if path.exists():
        try:
            read(path)
        except RequestError as error:
            raise RequestError(
                f"{path} exists and is not a saved conversation; it was left alone. Choose another name."
            ) from error
    try:
        handle, staged = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(staged).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(staged).unlink()
            raise
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} was not written: {_reason(error)}. The conversation is unchanged.") from error


def read(path: Path) -> Saved:
    """Read a saved conversation, or a JSON list of OpenAI messages.

    Raises:
        RequestError: naming the file and everything in it that is wrong.
    """
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RequestError(f"{path} is not a regular file")
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path} cannot be read: {_reason(error)}") from error
    if len(raw) > LARGEST:
        raise RequestError(f"{path} is larger than {LARGEST // 2**20} MiB; that is no conversation")
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from error
    return _saved(path, {"messages": value} if isinstance(value, list) else value)


def _saved(path: Path, value: object) -> Saved:
    remedy = "Expected a file written by /save, or a JSON list of {'role', 'content'} messages."
    if not isinstance(value, Mapping) or not isinstance(value.get("messages"), list):
        raise RequestError(problems(str(path), ["no list of 'messages'"], remedy))
    found: list[str] = []
    if value.get("format", FORMAT) != FORMAT or value.get("version", VERSION) != VERSION:
        found.append(f"format {value.get('format')!r} version {value.get('version')!r} is not {FORMAT!r} {VERSION}")
    messages = []
    for index, item in enumerate(value["messages"]):
        try:
            messages.append(_sound(Message.parse(item)))
        except (RequestError, TypeError, UnicodeEncodeError) as error:
            found.append(f"messages[{index}]: {error}")
    system = messages.pop(0).content if messages and messages[0].role == "system" else None
    sampling = None
    if "sampling" in value:
        try:
            sampling = _sampling(value["sampling"])
            if sampling.n != 1:
                found.append(f"sampling.n must be 1, because a chat shows one reply, not {sampling.n}")
        except (RequestError, TypeError) as error:
            found.append(str(error))
    model = value.get("model")
    if model is not None and not isinstance(model, str):
        found.append(f"'model' must be a string, not {type(model).__name__}")
    if found:
        raise RequestError(problems(str(path), _some(found), remedy))
    return Saved(system=system, messages=tuple(messages), sampling=sampling, model=model)


def _sound(message: Message) -> Message:
    """Lone surrogates are valid in JSON, but no text."""
    message.content.encode()
    return message


def _sampling(value: object) -> SamplingParams:
    if not isinstance(value, Mapping):
        raise RequestError(f"'sampling' must be an object, not {type(value).__name__}")
    bias = value.get("logit_bias")
    if isinstance(bias, Mapping):  # JSON knows no integer keys
        value = {**value, "logit_bias": {int(k) if str(k).isdecimal() else k: v for k, v in bias.items()}}
    return SamplingParams().override(**value)


def _some(found: list[str], most: int = 10) -> Iterable[str]:
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _openai(message: Message) -> dict[str, Any]:
    """A message as OpenAI's API writes it; what is empty is left out."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        uris = [f"data:image;base64,{base64.b64encode(image).decode()}" for image in message.images]
        parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
        entry["content"] = [*parts, {"type": "text", "text": message.content}]
    if message.name is not None:
        entry["name"] = message.name
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        entry["tool_calls"] = [
            {"id": call.id, "type": call.kind, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return entry


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
