"""From what a caller says to sequences for the engine: everything is checked here, before anything is queued."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import Any, Literal

from hanlin.adapters import Adapters
from hanlin.calls import Calls
from hanlin.engine.sequence import Given, Sequence
from hanlin.errors import ChatFormatError, HanlinError, RequestError
from hanlin.guide import Grammar, Grammars
from hanlin.infill import infilled
from hanlin.layers.rope import RopeConfig
from hanlin.models.config import DecoderConfig
from hanlin.models.registry import Layout
from hanlin.replies import Deliver, Plain, Reply, ScoreSink
from hanlin.types import ChatFormat, Constraint, Message, Rendered, SamplingParams, Tokenizer, Tool
from hanlin.vision import Vision

__all__ = ["Job", "RequestBuilder", "adapted", "conversations_of", "prompts_of", "tools_of"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt, tokenised and checked. Cached prefixes are shared only between jobs of equal `salt`.

    `adapter` is the name of one that is loaded, None for the model as it is; `given` are its images.
    """

    ids: tuple[int, ...]
    sampling: SamplingParams
    salt: bytes = b""
    adapter: str | None = None
    chat: bool = False
    tools: tuple[Tool, ...] = ()
    one_call: bool = False
    grammar: Grammar | None = None
    given: tuple[Given, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RequestBuilder:
    """What a model needs to know to read requests.

    Attributes:
        chat_format: None for a base model; `no_chat` then says why.
        system_prompt: put before conversations that have none; "" is none.
        stop_ids: that end any reply, unless `ignore_eos`.
        layout: of a family that is not simply causal: see `hanlin.models.registry.Family`.
        vision: what the model sees with, if it does.
    """

    tokenizer: Tokenizer
    config: DecoderConfig
    rope: RopeConfig
    chat_format: ChatFormat | None
    no_chat: HanlinError | None
    system_prompt: str
    stop_ids: frozenset[int]
    defaults: SamplingParams
    adapters: Adapters
    grammars: Grammars | None = None
    layout: Callable[[List[int]], Layout] | None = None
    vision: Vision | None = None

    def chat_jobs(
        self, messages: Any, sampling: SamplingParams | None, tools: Any, overrides: Mapping[str, Any]
    ) -> tuple[bool, list[Job]]:
        """(whether a list is the natural answer, a job for each conversation)."""
        calls, rest = Calls.take(tools_of(tools), overrides)
        params = self.sampling(sampling, rest)
        many, conversations = conversations_of(messages)
        return many or params.n > 1, [self._chat(c, params, calls) for c in conversations]

    def prompt_jobs(self, prompts: Any, sampling: SamplingParams | None, overrides: Mapping[str, Any]) -> list[Job]:
        """A job for each prompt."""
        params = self.sampling(sampling, overrides)
        return [self._prompt(prompt, params) for prompt in prompts_of(prompts)]

    def stream_job(
        self, messages: Any, sampling: SamplingParams | None, tools: Any, prompt: Any, overrides: Mapping[str, Any]
    ) -> Job:
        """The one job of a stream, for a conversation or for a prompt."""
        if (messages is None) == (prompt is None):
            raise RequestError("stream needs either messages or prompt=")
        if prompt is not None:
            return self._prompt(prompt, self.sampling(sampling, overrides))
        many, conversations = conversations_of(messages)
        if many:
            raise RequestError("stream takes one conversation; use chat for a list of them")
        calls, rest = Calls.take(tools_of(tools), overrides)
        return self._chat(conversations[0], self.sampling(sampling, rest), calls)

    def sampling(self, given: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """Raises:
        RequestError: unknown or impossible values, and ids that the vocabulary does not have.
        """
        self._writes()
        params = given or self.defaults
        params = params.override(**Constraint.take(overrides)) if overrides else params
        found = [
            f"{name} holds id {token}, the vocabulary ends at {self.config.vocab_size - 1}"
            for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias))
            for token in ids
            if token >= self.config.vocab_size
        ]
        if found:
            raise RequestError("; ".join(found))
        return params

    def encode(self, prompt: Any) -> tuple[int, ...]:
        """Ids of a prompt: text in the model's own language, or ids as they are."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special=True, parse_special=True))
        ids = tuple(prompt)
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < self.config.vocab_size]
        if wrong:
            raise RequestError(f"a prompt must be text or ids in 0..{self.config.vocab_size - 1}; found {wrong[:5]!r}")
        return ids

    def format(self) -> ChatFormat:
        """Raises:
        ChatFormatError: for a base model.
        """
        if self.chat_format is None:
            raise ChatFormatError(str(self.no_chat))
        return self.chat_format

    def sequences(self, job: Job, *, stream: bool, deliver: Deliver) -> list[Sequence]:
        """The n sequences of a job; all but the first wait for its prompt, to share it."""
        sampling, skip = job.sampling, job.sampling.skip_special_tokens
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.stop_ids)
        # 53 bits: what JavaScript, too, reads exactly from a reply.
        seed = secrets.randbits(53) if sampling.seed is None else sampling.seed
        adapter = self.adapters.get(job.adapter)
        encode = self.tokenizer.encode
        bad = tuple(tuple(encode(start + text)) for text in sampling.bad_words for start in ("", " "))
        out: list[Sequence] = []
        for index in range(sampling.n):
            parser = self.format().parser(job.tools, skip_special=skip) if job.chat else None
            reply = Reply(
                tokenizer=self.tokenizer,
                parser=parser or Plain(self.tokenizer, skip_special=skip),
                sampling=sampling,
                stop_ids=stop_ids,
                seed=seed,
                index=index,
                stream=stream,
                deliver=deliver,
                one_call=job.one_call,
            )
            sequence = Sequence(
                prompt=job.ids,
                sampling=sampling,
                sink=reply,
                stop_ids=stop_ids,
                bad_ids=tuple(ids for ids in bad if ids),
                guide=job.grammar.matcher() if job.grammar else None,
                seed=(seed & (2**64 - 1)) + (index << 64),
                rope_length=self.rope.dynamic_length(len(job.ids)),
                **self._laid_out(job.ids),
                salt=job.salt,
                adapter=adapter,
                given=job.given,
                follows=out[0] if out else None,
            )
            out.append(sequence)
        return out

    def scored(
        self, prompts: Any, deliver: Callable[[Sequence | BaseException], None], adapter: str | None = None
    ) -> list[Sequence]:
        """Sequences whose given tokens are scored."""
        self._writes()
        ids = [self._scored(prompt) for prompt in prompts_of(prompts)]
        return [self.looked_at(each, deliver, score=True, adapter=adapter) for each in ids]

    def _scored(self, prompt: Any) -> tuple[int, ...]:
        """Ids of a prompt to be scored. Text that would see itself both ways stands behind an empty context instead."""
        if self.layout is None or not isinstance(prompt, str):
            return self.encode(prompt)
        encode = self.tokenizer.encode
        return (*encode("", add_special=True), *encode(prompt, parse_special=True))

    def judged(self, conversations: Any) -> list[tuple[int, ...]]:
        """Conversations as a reward model reads them: without a system prompt of ours, closed by its own token.

        Raises:
            RequestError: for a model without a reward head.
        """
        return [self._closed(self.shown(c)) for c in conversations_of(conversations)[1]]

    def judged_as_is(self, prompts: Any) -> list[tuple[int, ...]]:
        """Texts that the chat template has written already, or ids: begun and closed where they are not yet.

        Raises:
            RequestError: for a model without a reward head.
        """
        begin, out = tuple(self.tokenizer.encode("", add_special=True)), []
        for prompt in prompts_of(prompts):
            ids = self.encode(self.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else prompt)
            out.append(self._closed(ids if ids[: len(begin)] == begin else (*begin, *ids)))
        return out

    def shown(self, conversation: Any) -> tuple[int, ...]:
        """One conversation as the model reads it, without a system prompt of ours, and no reply begun."""
        return self.format().render(_one(conversation), generation_prompt=False).ids

    def _closed(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        end = self.config.reward_id
        if end is None:
            raise RequestError(
                "this model writes, it has no reward head; load a reward model, such as internlm2-1_8b-reward"
            )
        return ids if ids[-1:] == (end,) else (*ids, end)  # some templates write it themselves

    def infilled(self, before: Any, after: str) -> tuple[int, ...]:
        """Ids of a prompt whose reply is to stand between two texts; see `hanlin.infill`.

        Raises:
            RequestError: for a model that can only go on with a text.
        """
        return infilled(self.tokenizer, before, after, blanks=self.layout is not None)

    def embedded(self, texts: Any) -> list[tuple[int, ...]]:
        """Texts, or ids, as a model is to read them: special tokens in a text are text."""
        encode = self.tokenizer.encode
        return [
            tuple(encode(text, add_special=True)) if isinstance(text, str) else self.encode(text)
            for text in prompts_of(texts)
        ]

    def looked_at(
        self,
        ids: tuple[int, ...],
        deliver: Callable[[Sequence | BaseException], None],
        *,
        score: bool = False,
        pool: Literal["last", "mean", "value"] | None = None,
        adapter: str | None = None,
    ) -> Sequence:
        """A sequence that generates nothing, see `Sequence.score_prompt` and `Sequence.pool`.

        Raises:
            RequestError: tokens to be scored by a model that has no words for them.
        """
        if score:
            self._writes()
        return Sequence(
            prompt=ids,
            sampling=SamplingParams(max_tokens=1),
            sink=ScoreSink(deliver),
            score_prompt=score,
            pool=pool,
            adapter=self.adapters.get(adapter),
            rope_length=self.rope.dynamic_length(len(ids)),
            **self._laid_out(ids),
        )

    def _laid_out(self, ids: tuple[int, ...]) -> dict[str, Any]:
        """What is odd about the family, as a sequence carries it."""
        if self.layout is None:
            return {}
        prefix, positions = self.layout(ids)
        return {"prefix_len": prefix, "positions": positions}

    def _writes(self) -> None:
        """Raises:
        RequestError: for a reward model.
        """
        if self.config.reward_id is not None:
            raise RequestError(
                "this is a reward model, it judges conversations and writes nothing: use reward(), or load a chat model"
            )

    def _prompt(self, prompt: Any, sampling: SamplingParams) -> Job:
        return Job(ids=self.encode(prompt), sampling=sampling, grammar=self._grammar(sampling.constraint, sampling.n))

    def _grammar(self, constraint: Constraint | None, count: int) -> Grammar | None:
        if constraint is None:
            return None
        if self.grammars is None:
            raise RequestError("replies of this model cannot be constrained: its tokenizer has no table of its texts")
        return self.grammars.compile(constraint, count)

    def _chat(self, conversation: List[Message], sampling: SamplingParams, calls: Calls) -> Job:
        if self.system_prompt and all(message.role != "system" for message in conversation):
            conversation = [Message(role="system", content=self.system_prompt), *conversation]
        rendered = self.format().render(conversation, calls.tools)
        return Job(
            ids=rendered.ids,
            given=self._seen(rendered),
            sampling=sampling,
            chat=True,
            tools=calls.tools,
            one_call=not calls.parallel,
            grammar=self._grammar(calls.constraint(self.format(), sampling.constraint), sampling.n),
        )

    def _seen(self, rendered: Rendered) -> tuple[Given, ...]:
        """Raises:
        RequestError: images that cannot be read, or a model that cannot see any.
        """
        if rendered.images and self.vision is None:
            raise RequestError("this model cannot see images")
        return tuple(self.vision.given(*image) for image in rendered.images if self.vision is not None)


def adapted(jobs: list[Job], adapter: str | None) -> list[Job]:
    """The same jobs, for an adapter."""
    return [replace(job, adapter=adapter) for job in jobs]


def prompts_of(prompts: Any) -> list[Any]:
    """One prompt or many, as a list: strings or lists of ids.

    Raises:
        RequestError: for anything else.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, Mapping)):
        raise RequestError(f"prompts must be a string, ids, or a list of either, not {type(prompts).__name__}")
    items = list(prompts)
    if items and all(isinstance(i, int) for i in items):
        return [items]
    wrong = sorted({type(i).__name__ for i in items if not isinstance(i, (str, list, tuple))})
    if wrong:
        raise RequestError(f"prompts must hold strings or lists of ids, not {', '.join(wrong)}")
    return items


def conversations_of(messages: Any) -> tuple[bool, list[list[Message]]]:
    """(whether a list of conversations was given, the conversations); a string is one user message.

    Raises:
        RequestError: for anything that is neither messages nor a list of conversations.
    """
    if isinstance(messages, str):
        return False, [[Message(role="user", content=messages)]]
    if not isinstance(messages, Iterable) or isinstance(messages, (bytes, Mapping)):
        raise RequestError(f"messages must be a string or a list of messages, not {type(messages).__name__}")
    items = list(messages)
    if not items:
        raise RequestError("messages is empty: give at least one message")
    if all(isinstance(i, (Message, Mapping)) for i in items):
        return False, [[Message.parse(i) for i in items]]
    return True, [_one(i) for i in items]


def _one(messages: Any) -> list[Message]:
    many, (first, *_) = conversations_of(messages)
    if many:
        raise RequestError("conversations are nested too deeply: give messages, or a list of conversations")
    return first


def tools_of(tools: Iterable[Tool | Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    return tuple(Tool.parse(tool) for tool in tools or ())


def stop_ids_of(config: DecoderConfig, chat_format: ChatFormat | None, generation: Mapping[str, Any]) -> Iterator[int]:
    """Ids that end a reply: of the configuration, of `generation_config.json`, of the chat format."""
    yield from config.stop_ids
    given = generation.get("eos_token_id")
    yield from (i for i in (given if isinstance(given, list) else [given]) if type(i) is int)
    if chat_format is not None:
        yield from chat_format.stop_ids
