"""A model and a conversation together: asking, asking again, and what happens when the context is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hanlin.cli.conversation import Conversation
from hanlin.cli.generation import Reply, generate
from hanlin.cli.render import View, quiet_keys
from hanlin.errors import ContextLengthError, RequestError
from hanlin.types import ChatFormat, Delta, Message, SamplingParams

__all__ = ["Model", "Session"]


class Model(Protocol):
    """What a chat needs of `hanlin.LLM`."""

    name: str
    default_sampling: SamplingParams
    context_length: int

    @property
    def chat_format(self) -> ChatFormat: ...

    def stream(self, messages: Any, sampling: SamplingParams | None = None) -> Iterator[Delta]: ...

    def stats(self) -> Mapping[str, Any]: ...


@dataclass(kw_only=True)
class Session:
    """One chat.

    Attributes:
        view: makes the place where a reply appears.
        notice: tells the person something beside the conversation.
        last: the newest reply.
        images: files as bytes, to be shown with the next turn.
    """

    model: Model
    conversation: Conversation
    view: Callable[[], View]
    notice: Callable[[str], object]
    last: Reply | None = field(default=None, init=False)
    images: tuple[bytes, ...] = field(default=(), init=False)

    def ask(self, text: str) -> Reply:
        """Send a turn and show the reply. A turn without a reply is not kept.

        Raises:
            HanlinError: the turn could not be answered; the conversation is as before.
        """
        turn = Message(role="user", content=text, images=self.images)
        reply = self._answer((*self.conversation.messages, turn))
        if turn in self.conversation.messages:
            self.images = ()
        return reply

    def show(self, image: bytes) -> None:
        """Show an image with the next turn. The models here see one a conversation: with another, it starts afresh.

        Raises:
            RequestError: a model that cannot see.
        """
        if not getattr(self.model, "sees", False):
            raise RequestError(f"{self.model.name} cannot see images. VisualGLM-6B can.")
        if any(message.images for message in self.conversation.messages):
            self.conversation.clear()
            self.notice("The model sees one image; the conversation starts afresh with this one.")
        self.images = (image,)

    def retry(self) -> Reply:
        """Answer the last question again. The old reply stays until there is a new one.

        Raises:
            HanlinError: there is no question, or it could not be answered.
        """
        messages = self.conversation.messages
        asked = [i for i, message in enumerate(messages) if message.role == "user"]
        if not asked:
            raise RequestError("There is no question to answer again.")
        sampling = self.conversation.sampling
        if sampling.temperature == 0 or sampling.seed is not None:
            why = "the temperature is 0" if sampling.temperature == 0 else f"the seed is {sampling.seed}"
            self.notice(f"Expect the same reply, unless something else changed: {why}.")
        return self._answer(messages[: asked[-1] + 1])

    def _answer(self, messages: tuple[Message, ...]) -> Reply:
        conversation = self.conversation
        before = conversation.messages, conversation.forgotten
        conversation.messages = messages
        kept = False
        try:
            reply = self._fit()
            kept = bool(reply.text) or not reply.stopped
        finally:
            if not kept:
                conversation.messages, conversation.forgotten = before
        self.last = reply
        if kept:
            calls = reply.completion.tool_calls if reply.completion else ()
            said = Message(role="assistant", content=reply.text, tool_calls=calls)
            conversation.messages = (*messages, said)
        self._explain(reply)
        return reply

    def _fit(self) -> Reply:
        """Forget old turns until the rest fits into the context."""
        while True:
            try:
                return self._generate()
            except ContextLengthError:
                if not self._forget("The conversation no longer fits the context"):
                    raise

    def _forget(self, why: str) -> bool:
        dropped = self.conversation.forget()
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            self.notice(
                f"{why} of {self.model.context_length} tokens: the oldest {turns} no longer sent. "
                "/clear starts afresh; /save still keeps everything."
            )
        return bool(dropped)

    def _generate(self) -> Reply:
        stream = self.model.stream(self.conversation.sent(), self.conversation.sampling)
        view = self.view()
        try:
            with quiet_keys():
                return generate(stream, view.push)
        finally:
            view.finish()

    def _explain(self, reply: Reply) -> None:
        done, sampling = reply.completion, self.conversation.sampling
        if done is None:
            return
        if done.tool_calls:
            names = ", ".join(call.name for call in done.tool_calls)
            self.notice(f"The model asks for a tool ({names}); hanlin chat runs none.")
        elif done.finish_reason == "length" and reply.tokens == sampling.max_tokens:
            self.notice(
                f"Cut off after max_tokens = {reply.tokens}. More is allowed with /set max_tokens {2 * reply.tokens}, "
                "on the command line with --max-tokens."
            )
        elif done.finish_reason == "length" and not self._forget("Cut off, because the conversation fills the context"):
            self.notice(f"Cut off, because prompt and reply fill the context of {self.model.context_length} tokens.")
        elif not reply.text:
            self.notice("The model had nothing to say.")
