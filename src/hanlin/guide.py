"""Which tokens may come next when a reply is constrained: grammars, compiled for a vocabulary by llguidance.

A grammar is compiled anew for every reply. Copies of a compiled one share the states that its lexer has visited, and
the bounds on them: what one reply may still be would depend on replies before it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import llguidance
import numpy as np
from numpy.typing import NDArray

from hanlin.errors import RequestError
from hanlin.types import Constraint

__all__ = ["Grammar", "Grammars", "Matcher", "Texts"]

_SECONDS = 20.0  # for compiling
_AT_ONCE = 2
_STACK = 64 << 20  # rules and references are followed recursively
_STACKS = threading.Lock()  # the size of new threads' stacks is one number for the whole process
# JSON as people and models write it, on one line or on many; bounded, or a weak model writes blanks for ever.
_BLANKS = {"whitespace_pattern": r" |\r?\n[ \t]{0,40}"}


class Texts(Protocol):
    """What each id adds to a text: the tokenizers' `TokenTable`."""

    @property
    def texts(self) -> tuple[bytes, ...]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def spaced_ids(self) -> frozenset[int]: ...
    @property
    def strip(self) -> str: ...


class Grammars:
    """Compiles constraints for one vocabulary. Safe to use from several threads.

    Args:
        table: what each id adds to a text.
        encode: text to ids, without special tokens; what a grammar forces is written in these.
        size: of the model's vocabulary; ids behind the table's are never allowed.
    """

    def __init__(self, table: Texts, encode: Callable[[str], list[int]], size: int) -> None:
        self._table, self._encode, self.size = table, encode, size
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        self._limits = llguidance.LLParserLimits(step_max_items=5000, verbose_errors=False)

    def compile(self, constraint: Constraint, count: int = 1) -> Grammar:
        """A grammar that is ready for `count` replies.

        Raises:
            RequestError: a constraint that is malformed, too complex, slow to compile, or that nothing meets.
        """
        with self._lock:
            tokenizer = self._tokenizer  # takes 0.2 s the first time
        text = self._text(constraint)
        if not self._places.acquire(timeout=_SECONDS):
            raise RequestError("the constraint waited too long for others to be compiled; try again")
        made: list[Any] = []

        def work() -> None:
            try:
                made.extend(self._compiled(tokenizer, text) for _ in range(count))
            except BaseException as error:
                made.append(error)
            finally:
                self._places.release()

        worker = _roomy_thread(work)
        worker.join(_SECONDS)
        if worker.is_alive():
            raise RequestError(f"the constraint takes more than {_SECONDS:.0f} s to compile; make it simpler")
        if made and isinstance(made[-1], BaseException):
            raise made[-1]
        return Grammar(self, constraint, made)

    def first(self, token: int | None) -> NDArray[np.bool_] | None:
        """Which ids may stand first, or behind a first `token`; None where it makes no difference.

        Where a tokenizer leaves out the space that a text begins with, every reply begins with one, as those that the
        model was trained on; and the grammar is given a space in front.
        """
        if self._table.strip == "none":
            return None
        if token is None:
            return self._spaced & ~self._doubled if self._table.strip == "all" else self._spaced
        if self._table.strip == "all" and not self._table.texts[token].strip(b" "):
            return ~self._spaced
        return None

    def _compiled(self, tokenizer: llguidance.LLTokenizer, text: str) -> Matcher:
        inner = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=self._limits)
        if inner.is_error():
            raise RequestError(f"the constraint cannot be used: {_reason(inner)}")
        matcher = Matcher(self, inner)
        if matcher.error:
            raise RequestError(f"the constraint cannot be used: {matcher.error}")
        return matcher

    def _text(self, constraint: Constraint) -> str:
        """The grammar in llguidance's own form."""
        kind, value = constraint.kind, constraint.value
        grammar: dict[str, Any]
        if kind in ("json_object", "json_schema"):
            schema = {"type": "object"} if kind == "json_object" else json.loads(value)
            options = schema.get("x-guidance")
            schema["x-guidance"] = {**_BLANKS, **(options if isinstance(options, dict) else {})}
            grammar = {"json_schema": schema}
        elif kind == "choice":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
            grammar = {"lark_grammar": f"start: TEXT\nTEXT: {texts}"}
        elif kind == "regex":
            # digits are ASCII, as whoever reads them expects; other classes are Unicode's
            grammar = {"lark_grammar": f"start: TEXT\nTEXT: /{llguidance.regex_to_lark(value, 'd')}/"}
        else:
            grammar = {"lark_grammar": value}
        return self._led(grammar)

    def _led(self, grammar: dict[str, Any]) -> str:
        if self._table.strip == "none":
            return json.dumps({"grammars": [grammar]})
        return json.dumps({"grammars": [{"lark_grammar": 'start: " " @reply'}, {**grammar, "name": "reply"}]})

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        vocabulary = _Vocabulary(self)
        return llguidance.LLTokenizer(vocabulary, n_vocab=self.size + 1, eos_token=self.size)  # type: ignore[arg-type]

    def _natural(self, token: int) -> tuple[bool, bool, int]:
        """Orders ids of one text by which of them a tokenizer would write."""
        text = self._table.texts[token].decode(errors="replace")
        return token in self._table.spaced_ids, self._encode(text) == [token], -token

    def canonical(self, text: str) -> list[int]:
        """Ids whose texts are exactly `text`, the tokenizer's own where they are."""
        data = text.encode()
        try:
            ids = self._encode(text)
            if b"".join(self.kept[i] for i in ids) == data:
                return ids
        except Exception:  # llguidance ends the reply when its call fails, and there is another way
            pass
        return self._tokenizer.greedy_tokenize(text)

    @cached_property
    def kept(self) -> list[bytes]:
        """The text of each id, and none for the end, which is behind them. Of ids with one text, one has it."""
        texts = [*self._table.texts[: self.size], *[b""] * (self.size + 1 - len(self._table.texts[: self.size]))]
        groups: dict[bytes, list[int]] = {}
        for token, text in enumerate(texts):
            if text and token not in self._table.special_ids:
                groups.setdefault(text, []).append(token)
        for group in groups.values():
            for token in sorted(group, key=self._natural)[:-1] if len(group) > 1 else ():
                texts[token] = b""
        return texts

    @cached_property
    def _spaced(self) -> NDArray[np.bool_]:
        out = np.zeros(self.size, np.bool_)
        out[[i for i in self._table.spaced_ids if i < self.size]] = True
        return out

    @cached_property
    def _doubled(self) -> NDArray[np.bool_]:
        texts = self._table.texts[: self.size]
        out = np.zeros(self.size, np.bool_)
        out[: len(texts)] = [text.startswith(b"  ") for text in texts]
        return out

    @property
    def special_ids(self) -> list[int]:
        return sorted(i for i in self._table.special_ids if i < self.size)


class _Vocabulary:
    """What llguidance wants of a tokenizer: the attributes of its `TokenizerWrapper`, read once, and ids of a text.

    llguidance keeps it for as long as its own tokenizer, which the grammars keep: it must not keep the grammars.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = weakref.ref(grammars)
        self.eos_token_id = grammars.size

    @property
    def tokens(self) -> list[bytes]:
        return self._alive.kept

    @property
    def special_token_ids(self) -> list[int]:
        return self._alive.special_ids

    def __call__(self, text: str) -> list[int]:
        return self._alive.canonical(text)

    @property
    def _alive(self) -> Grammars:
        grammars = self._grammars()
        assert grammars is not None
        return grammars


class Grammar:
    """A constraint that compiles, with matchers for the replies of one request."""

    def __init__(self, grammars: Grammars, constraint: Constraint, ready: list[Matcher]) -> None:
        self._grammars, self._constraint, self._ready = grammars, constraint, ready

    def matcher(self) -> Matcher:
        """For one reply."""
        if not self._ready:
            self._ready = self._grammars.compile(self._constraint)._ready
        return self._ready.pop()


class Matcher:
    """What may follow in one reply. Used by one thread at a time.

    Attributes:
        allowed: (V,) which ids the grammar allows.
        may_end: whether the reply may end here.
        error: why it cannot go on: the grammar became too complex on the way.
    """

    def __init__(self, grammars: Grammars, inner: llguidance.LLMatcher) -> None:
        self._grammars, self._inner = grammars, inner
        self.allowed: NDArray[np.bool_] = np.zeros(grammars.size, np.bool_)
        self.may_end = False
        self.error = ""
        self._look(grammars.first(None))

    @property
    def over(self) -> bool:
        """Whether nothing is left but to end."""
        return self.may_end and not self.allowed.any()

    def advance(self, token: int) -> bool:
        """Take the next token; returns `over`."""
        if not self._inner.consume_token(token):
            self.error = _reason(self._inner)
            return False
        self._look(self._grammars.first(token) if self._fresh else None)
        return self.over

    def forced(self) -> list[int]:
        """The ids that follow in any case."""
        return [] if self.error or self._fresh else self._inner.compute_ff_tokens()

    def _look(self, first: NDArray[np.bool_] | None) -> None:
        mask = np.frombuffer(self._inner.compute_logit_bias(), np.uint8) != 0
        self.allowed, self.may_end = mask[:-1], bool(mask[-1])
        self._fresh = first is not None
        if first is not None:
            self.allowed = self.allowed & first
        if self._inner.is_error():
            self.error = _reason(self._inner)
        elif not self.may_end and not self.allowed.any():
            self.error = "nothing that this model can write meets it"


def _reason(inner: llguidance.LLMatcher) -> str:
    """The first lines of an error: without the state of the parser, which repeats the grammar."""
    text = inner.get_error().partition("<state>")[0].partition("<non-verbose/>")[0].strip()
    if not text or "NoExtension" in text + inner.stop_reason():
        return "nothing can meet it"
    return text.partition("<backtrace>")[0][:400].strip()


def _roomy_thread(work: Callable[[], None]) -> threading.Thread:
    """A started thread with a large stack, of which only what is used takes memory."""
    thread = threading.Thread(target=work, name="hanlin-grammar", daemon=True)
    with _STACKS:
        before = threading.stack_size()
        with contextlib.suppress(ValueError, RuntimeError):  # not to be had here
            threading.stack_size(_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread
