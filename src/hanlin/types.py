"""The values that cross rooms: messages, tools, sampling parameters, completions, and the protocols between them.

Nothing here imports torch or any other room, so servers, agents and evaluations can use it for free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from hanlin import images
from hanlin.constraint import Constraint
from hanlin.errors import RequestError, problems

__all__ = [
    "BestOf",
    "ChatFormat",
    "ChatModel",
    "Completion",
    "Constraint",
    "Delta",
    "Detokenizer",
    "FinishReason",
    "GuidesCalls",
    "Message",
    "Messages",
    "Rendered",
    "ReplyEvent",
    "ReplyParser",
    "SamplingParams",
    "Score",
    "Timings",
    "TokenLogprob",
    "TokenModel",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "Usage",
    "ranks",
]

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")
FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the model asks for.

    `arguments` is JSON text for a function, and source code for `kind="interpreter"`.
    """

    name: str
    arguments: str
    id: str = ""
    kind: Literal["function", "interpreter"] = "function"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool that the model may call; `parameters` is a JSON schema. `kind="interpreter"` declares an interpreter."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["function", "interpreter"] = "function"

    @classmethod
    def parse(cls, value: Tool | Mapping[str, Any]) -> Tool:
        """Read OpenAI's `{"type": "function", "function": {...}}`, `{"type": "interpreter"}`, or a bare function.

        Raises:
            RequestError: when there is no name, or a field is of the wrong type.
        """
        if isinstance(value, Tool):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"a tool must be a mapping, not {type(value).__name__}")
        if value.get("type") in ("interpreter", "code_interpreter"):
            return cls(name="interpreter", description=str(value.get("description", "")), kind="interpreter")
        inner = value.get("function", value)
        if not isinstance(inner, Mapping):
            raise RequestError("tool.function must be a mapping with 'name', 'description' and 'parameters'")
        name, parameters = inner.get("name"), inner.get("parameters") or {}
        found = []
        if not isinstance(name, str) or not name:
            found.append(f"'name' must be a non-empty string, not {name!r}")
        if not isinstance(parameters, Mapping):
            found.append(f"'parameters' must be a JSON schema object, not {type(parameters).__name__}")
        if found:
            raise RequestError(problems("tool", found))
        return cls(name=str(name), description=str(inner.get("description") or ""), parameters=dict(parameters))


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `role="tool"` is a tool's result (ChatML's environment turn, ChatGLM3's observation).

    `images` are files as bytes, for models that see.
    """

    role: str
    content: str = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    images: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, value: Message | Mapping[str, Any]) -> Message:
        """Read an OpenAI-style message; text parts are joined, `environment`/`observation`/`function` mean `tool`.

        Raises:
            RequestError: an unknown role, a part that is neither text nor image, fields of the wrong type, all at once.
        """
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"a message must be a mapping with 'role' and 'content', not {type(value).__name__}")
        found: list[str] = []
        role = value.get("role")
        role = {"environment": "tool", "observation": "tool", "function": "tool", "developer": "system"}.get(
            role if isinstance(role, str) else "", role
        )
        if role not in ROLES:
            found.append(f"'role' must be one of {', '.join(ROLES)}, not {role!r}")
        name = value.get("name")
        if name is not None and not isinstance(name, str):
            found.append(f"'name' must be a string, not {type(name).__name__}")
        content, pictures = _content(value.get("content"), found)
        calls = tuple(_call(call, found) for call in value.get("tool_calls") or ())
        if found:
            raise RequestError(problems("message", found))
        call_id = value.get("tool_call_id")
        return cls(
            role=str(role),
            content=content,
            name=name,
            tool_calls=calls,
            tool_call_id=None if call_id is None else str(call_id),
            images=pictures,
        )


def _content(value: object, found: list[str]) -> tuple[str, tuple[bytes, ...]]:
    """The text of a content, and its images."""
    if value is None or isinstance(value, str):
        return value or "", ()
    texts, pictures = [], []
    if not isinstance(value, Sequence):
        found.append(f"'content' must be a string or a list of parts, not {type(value).__name__}")
        value = ()
    for part in value:
        given = part if isinstance(part, Mapping) else {"type": type(part).__name__}
        try:
            picture = images.of_part(given)
        except RequestError as error:
            found.append(str(error))
            continue
        if picture is not None:
            pictures.append(picture)
        elif given.get("type") in ("text", "input_text") and isinstance(given.get("text"), str):
            texts.append(given["text"])
        else:
            found.append(f"content parts must be text or images, not {given.get('type')!r}")
    return "".join(texts), tuple(pictures)


def _call(value: object, found: list[str]) -> ToolCall:
    if isinstance(value, ToolCall):
        return value
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        found.append("each of 'tool_calls' must be {'id', 'type', 'function': {'name', 'arguments'}}")
        return ToolCall(name="", arguments="")
    arguments = inner.get("arguments", inner.get("parameters", "{}"))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    kind: Literal["function", "interpreter"] = "interpreter" if value.get("type") == "interpreter" else "function"
    return ToolCall(name=inner["name"], arguments=arguments, id=str(value.get("id") or ""), kind=kind)


Messages: TypeAlias = "str | Sequence[Message | Mapping[str, Any]]"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the next tokens.

    Attributes:
        max_tokens: how many tokens to generate at most; None means until the context is full.
        min_tokens: no stop is honoured before that many tokens.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probabilities reach this sum, in (0, 1].
        min_p: drop tokens less probable than this share of the most probable one, in [0, 1).
        repetition_penalty: divide (or multiply, if negative) the logits of tokens seen in prompt or reply; 1 is off.
        presence_penalty: subtract from the logits of tokens that the reply already holds.
        frequency_penalty: subtract for each time that the reply already holds the token.
        logit_bias: added to the logits of these ids.
        bad_words: texts that never appear; a text of several tokens is forbidden at its last one.
        stop: texts that end the reply; they are not part of it.
        stop_token_ids: ids that end the reply, beside the model's own.
        ignore_eos: go on past the model's own stop ids.
        n: how many replies to one prompt.
        seed: None draws one, which the completion reports; the same seed gives the same reply.
        logprobs: None, or how many alternatives to report beside each chosen token.
        skip_special_tokens: leave special tokens out of the text.
        constraint: what the reply must look like; nothing above lifts it.

    Raises:
        RequestError: naming every impossible value at once.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "stop_token_ids"):
            value = getattr(self, name) or ()
            alone = isinstance(value, str) or not isinstance(value, Iterable)
            object.__setattr__(self, name, (value,) if alone else tuple(value))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        found = list(self._wrong())
        if found:
            raise RequestError(problems("sampling parameters", found))

    def _wrong(self) -> Iterator[str]:
        checks: tuple[tuple[str, float, float, bool, str], ...] = (
            ("min_tokens", 0, 2**63 - 1, True, ">= 0"),
            ("temperature", 0.0, 1e6, False, ">= 0"),
            ("top_k", 0, 2**63 - 1, True, ">= 0, or -1"),
            ("min_p", 0.0, 1.0, False, "in [0, 1]"),
            ("repetition_penalty", 1e-6, 1e6, False, "> 0"),
            ("presence_penalty", -1e6, 1e6, False, "finite"),
            ("frequency_penalty", -1e6, 1e6, False, "finite"),
            ("n", 1, 1024, True, "in 1..1024"),
        )
        for name, low, high, whole, allowed in checks:
            if not _number(getattr(self, name), low, high, whole):
                yield f"{name} must be a{' whole' if whole else ''} number {allowed}, not {getattr(self, name)!r}"
        if not _number(self.top_p, 0.0, 1.0, False) or self.top_p == 0:
            yield f"top_p must be in (0, 1], not {self.top_p!r}"
        if self.max_tokens is not None and not _number(self.max_tokens, 1, 2**63 - 1, True):
            yield f"max_tokens must be a whole number >= 1 or None, not {self.max_tokens!r}"
        elif self.max_tokens is not None and isinstance(self.min_tokens, int) and self.min_tokens > self.max_tokens:
            yield f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}"
        if self.seed is not None and not _number(self.seed, -(2**63), 2**64 - 1, True):
            yield f"seed must be a whole number of at most 64 bits or None, not {self.seed!r}"
        if self.logprobs is not None and not _number(self.logprobs, 0, 1000, True):
            yield f"logprobs must be a whole number in 0..1000 or None, not {self.logprobs!r}"
        for name in ("stop", "bad_words"):
            if not all(isinstance(text, str) and text for text in getattr(self, name)):
                yield f"{name} must hold non-empty strings only"
        if not all(_number(i, 0, 2**31, True) for i in self.stop_token_ids):
            yield f"stop_token_ids must hold ids >= 0, not {self.stop_token_ids!r}"
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} must be true or false, not {getattr(self, name)!r}"
        bias: object = self.logit_bias
        constraint: object = self.constraint
        if not isinstance(constraint, Constraint | None):
            yield f"constraint must be a Constraint, not {type(constraint).__name__}"
        if not isinstance(bias, Mapping):
            yield f"logit_bias must map ids to numbers, not {type(bias).__name__}"
        else:
            for key, value in bias.items():
                if not _number(key, 0, 2**31, True) or not _number(value, -1e6, 1e6, False):
                    yield f"logit_bias must map ids to finite numbers, not {key!r}: {value!r}"

    def override(self, **overrides: Any) -> SamplingParams:
        """A copy with other values.

        Raises:
            RequestError: naming every unknown field and every impossible value.
        """
        known = {f.name for f in fields(self)}
        unknown = [f"unknown parameter {name!r}" for name in overrides if name not in known]
        if unknown:
            raise RequestError(problems("sampling parameters", unknown, f"Known: {', '.join(sorted(known))}."))
        return replace(self, **overrides)


def _number(value: object, low: float, high: float, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return low <= value <= high and (isinstance(value, int) or math.isfinite(value))  # isfinite(10**400) overflows


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The log-probability (natural, of the model's own distribution) of a token, and of the best alternatives."""

    id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens: of the prompt, how many of those came from the prefix cache, and generated."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds: waiting for a place, computing the prompt, generating."""

    queue: float = 0.0
    prompt: float = 0.0
    generation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished reply.

    `seed` is the one that was used, given or drawn; `index` tells the n replies to one prompt apart; `stop` is the
    text or the id that ended the reply.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    seed: int = 0
    index: int = 0
    stop: str | int | None = None


@dataclass(frozen=True, kw_only=True)
class BestOf(Completion):
    """The best of several replies, its score, and all of them with theirs, in the order they were drawn in."""

    score: float
    candidates: tuple[Completion, ...]
    scores: tuple[float, ...]


def ranks(scores: Sequence[float]) -> list[int]:
    """Each score's place, 0 for the highest; of equal ones the first comes first."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(range(len(scores)), key=order.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What came new. `done` is the whole completion, in a reply's last delta only."""

    text: str = ""
    ids: tuple[int, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    done: Completion | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities of given tokens; the first token of a sequence has none (None)."""

    ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of the scored tokens; nan when there is none."""
        count = sum(value is not None for value in self.logprobs)
        return math.exp(-self.total / count) if count else math.nan


class Detokenizer(Protocol):
    """Turns ids into text piece by piece. The pieces joined equal `Tokenizer.decode` of all ids."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that is settled by these ids; an unfinished character is held back."""

    def finish(self) -> str:
        """What was held back."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Special tokens are made from text only when `parse_special` is asked for."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def special_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of `text`. `add_special` adds what the model expects around a bare prompt (BOS, gMASK...)."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def token_id(self, piece: str) -> int | None:
        """The id of exactly this piece or special token, or None."""

    def token_text(self, token: int) -> str:
        """How a single token reads, special or not; unprintable bytes as U+FFFD."""

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer: ...


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as ids, and how much each counts in the training loss (0 or 1).

    `images` are (first id whose place it takes, image file).
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    images: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReplyEvent:
    """A piece of a reply: text, or a whole tool call."""

    text: str = ""
    tool_call: ToolCall | None = None


class ReplyParser(Protocol):
    """Reads a reply's ids as they come, for any split, into text and tool calls."""

    def push(self, ids: Sequence[int]) -> list[ReplyEvent]: ...

    def finish(self) -> list[ReplyEvent]: ...


class ChatFormat(Protocol):
    """How one family writes conversations.

    Attributes:
        name: as in the registry.
        stop_ids: ids that end a reply.
        default_system: the system prompt used when a conversation has none; None when the family has none.
        defaults: the family's recommended sampling.
    """

    name: str
    stop_ids: tuple[int, ...]
    default_system: str | None
    defaults: SamplingParams

    def render(
        self,
        messages: Iterable[Message],
        tools: Sequence[Tool] = (),
        *,
        generation_prompt: bool = True,
    ) -> Rendered:
        """Ids of the whole conversation. With `generation_prompt`, ready for the assistant to go on; a last
        assistant message is then left open, to be continued.

        Raises:
            ChatFormatError: messages that this format cannot express.
        """

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser: ...


@runtime_checkable
class GuidesCalls(Protocol):
    """A chat format that can say how a call is written."""

    def tool_grammar(self, tools: Sequence[Tool], names: Sequence[str], *, parallel: bool) -> str:
        """The grammar (Lark, llguidance's dialect) of a reply that calls one of the tools so named, or, when
        `parallel`, one or more."""


class TokenModel(Protocol):
    """What reinforcement learning and evaluations know of a model: tokens."""

    def generate(self, prompts: Any, sampling: SamplingParams | None = None, **overrides: Any) -> list[Completion]: ...

    def score(self, prompts: Any) -> list[Score]: ...


class ChatModel(Protocol):
    """What agents know of a model: messages."""

    def chat(
        self, messages: Any, sampling: SamplingParams | None = None, tools: Any = None, **overrides: Any
    ) -> Any: ...

    def stream(
        self, messages: Any, sampling: SamplingParams | None = None, tools: Any = None, **overrides: Any
    ) -> Iterator[Delta]: ...
