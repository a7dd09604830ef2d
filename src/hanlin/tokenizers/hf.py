"""Tokenizers stored as `tokenizer.json`: Qwen2, Llama 3, SmolLM2, InternLM2's fast tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tokenizers import Tokenizer as RustTokenizer

from hanlin.errors import HanlinError, RequestError, TokenizerError, problems
from hanlin.tokenizers.base import AddedToken, BaseTokenizer, Specials, is_markup
from hanlin.tokenizers.detokenizer import TokenTable

__all__ = ["MAX_ID", "HFTokenizer", "byte_alphabet"]

MAX_ID = 1 << 21
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFTokenizer(BaseTokenizer):
    """Ids as the `tokenizers` library gives them, except that no text reaches a special token unless it is parsed for.

    Text is put together here, not by the library: its own decoders need the whole reply, and turn all of a run of byte
    tokens into U+FFFD when one byte is wrong. Normalisers are the file's own, so text that one changes (NFC for Qwen2)
    comes back changed.

    Args:
        data: the parsed `tokenizer.json`. Truncation, padding and dropout that a training run left in it are ignored.
        specials: ids with a role; by default only what the file puts around a text.
        special: texts of further added tokens to treat as special, such as those that tokenizer_config.json names.
        rows: rows of the model's embedding; ids between the vocabulary and this decode to nothing.
        name: for messages.

    Raises:
        TokenizerError: a file that is broken, or of a kind that is not supported.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        specials: Specials | None = None,
        special: Collection[str] = (),
        rows: int = 0,
        name: str = "tokenizer.json",
    ) -> None:
        content = _checked(data, name)
        decoder = _Decoder(data.get("decoder"), name)
        added = {token.id: token.content for token in content.added}
        special_ids = {token.id for token in content.added if token.special or token.content in special}
        self._name = name
        self._source = _source(data, {i for i, text in added.items() if i in special_ids or is_markup(text)})
        self._plain = _build(self._source, name)
        self._plain.encode_special_tokens = True
        moved = [text for i, text in added.items() if self._plain.token_to_id(text) != i]
        if moved:
            raise TokenizerError(f"{name}: added tokens whose ids do not follow the vocabulary's: {moved[:8]}")
        names = {i: piece for piece, i in content.vocabulary.items()} | added
        absent = [i for i in (*content.prefix, *content.suffix) if i not in names]
        if absent:
            raise TokenizerError(f"{name}: the post-processor adds ids that the vocabulary does not have: {absent[:8]}")
        size = max(rows, max(names) + 1)
        texts = [b""] * size
        for i, piece in names.items():
            texts[i] = piece.encode() if i in added else decoder.text(piece)
        table = TokenTable(
            pieces=tuple(names.get(i, "") for i in range(size)),
            texts=tuple(texts),
            special_ids=frozenset(special_ids),
            spaced_ids=frozenset(i for i, piece in names.items() if i not in added and piece.startswith("▁")),
            strip=decoder.strip,
            byte_errors=not decoder.byte_level,
        )
        specials = specials or Specials(prefix=content.prefix, suffix=content.suffix)
        super().__init__(table, specials, {text: i for i, text in added.items()})

    @property
    def rules(self) -> dict[str, Any]:
        """The `tokenizer.json` that text is cut by."""
        return dict(json.loads(self._source))

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        tokenizer = self._parsing if parse_special else self._plain
        with _library(RequestError, "the text cannot be tokenized"):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _parsing(self) -> Any:
        # A second instance, not a switch on the first: another thread may be encoding plain text.
        return _build(self._source, self._name)


class _Decoder:
    """What the file's `decoder` says about a piece's bytes: GPT-2's byte alphabet, or "▁" and byte pieces."""

    def __init__(self, decoder: object, name: str) -> None:
        steps = list(_steps(decoder, "decoders"))
        kinds = [step.get("type") for step in steps]
        known = {"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace"}
        strange = [str(kind) for kind in kinds if kind not in known]
        if strange or not kinds:
            given = ", ".join(strange) or "none"
            raise TokenizerError(f"{name}: decoder {given} is not supported; known: {', '.join(sorted(known))}.")
        self.byte_level = "ByteLevel" in kinds
        self._fallback = "ByteFallback" in kinds
        self._alphabet = byte_alphabet() if self.byte_level else {}
        self._replace = [("▁", " ")] if "Metaspace" in kinds else []
        for step in steps:
            if step.get("type") == "Replace":
                pattern, content = step.get("pattern"), step.get("content")
                old = pattern.get("String") if isinstance(pattern, dict) else None
                if not isinstance(old, str) or not old or not isinstance(content, str):
                    raise TokenizerError(
                        f"{name}: decoder Replace needs a pattern that is a string, not {pattern!r:.60}"
                    )
                self._replace.append((old, content))
        prefixed = any(
            (step.get("type") == "Strip" and step.get("content") == " " and step.get("start"))
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        self.strip: Literal["none", "first"] = "first" if prefixed else "none"

    def text(self, piece: str) -> bytes:
        if self.byte_level:
            values = [self._alphabet.get(letter) for letter in piece]
            # A piece with any other letter stands for itself: the library's rule.
            return piece.encode() if None in values else bytes(value for value in values if value is not None)
        byte = _BYTE_PIECE.fullmatch(piece) if self._fallback else None
        if byte:
            return bytes((int(byte.group(1), 16),))
        for old, new in self._replace:
            piece = piece.replace(old, new)
        return piece.encode()


def _steps(component: object, key: str) -> Iterator[dict[str, Any]]:
    """The parts of a component that may be a "Sequence" of parts under `key`."""
    if isinstance(component, dict):
        inner = component.get(key) if component.get("type") == "Sequence" else [component]
        for step in inner if isinstance(inner, list) else ():
            if isinstance(step, dict):
                yield step


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(0x100 + k): value for k, value in enumerate(others)}


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What a sound `tokenizer.json` holds, as far as it is used here."""

    vocabulary: dict[str, int]
    added: list[AddedToken]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def _checked(data: Mapping[str, Any], name: str) -> _Content:
    model = data.get("model")
    found: list[str] = []
    vocabulary: dict[str, int] = {}
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping):
        found.append("there is no 'model' with a 'vocab' of pieces and ids")
    elif model.get("type", "BPE") != "BPE":
        found.append(f"model type {model.get('type')!r} is not supported, only 'BPE'")
    else:
        vocabulary = dict(model["vocab"])
        wrong = [piece for piece, i in vocabulary.items() if not _is_id(i)]
        if wrong:
            found.append(f"{len(wrong)} pieces have no id in 0..{MAX_ID - 1}, such as {wrong[0]!r}")
        if not vocabulary:
            found.append("the vocabulary is empty")
        marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if marks:
            found.append(f"{' and '.join(marks)} are not supported")
    added: list[AddedToken] = []
    entries = data.get("added_tokens") or []
    for entry in entries if isinstance(entries, list) else [entries]:
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(content, str) or not content or not _is_id(entry.get("id")):
            found.append(f"an added token must have 'content' and an 'id' in 0..{MAX_ID - 1}, not {str(entry)[:80]}")
        else:
            added.append(AddedToken(id=entry["id"], content=content, special=entry.get("special") is True))
    prefix, suffix = _around(data.get("post_processor"), found)
    if found:
        raise TokenizerError(problems(name, found, "Fetch the file again, or use the model's tokenizer.model."))
    return _Content(vocabulary=vocabulary, added=added, prefix=prefix, suffix=suffix)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ID


def _around(processor: object, found: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the file's post-processor puts before and after a text."""
    parts: list[list[int]] = [[], []]
    for step in _steps(processor, "processors"):
        if step.get("type") not in ("TemplateProcessing", "ByteLevel"):
            found.append(f"post-processor {step.get('type')!r:.40} is not supported, only 'TemplateProcessing'")
            continue
        place = 0
        template, known = step.get("single"), step.get("special_tokens")
        for item in template if isinstance(template, list) else ():
            token = item.get("SpecialToken") if isinstance(item, dict) else None
            if not isinstance(token, dict):
                place = 1
                continue
            name = token.get("id")
            entry = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            if isinstance(ids, list) and all(map(_is_id, ids)):
                parts[place] += ids
            else:
                found.append(f"the post-processor names {name!r:.40}, but gives it no ids")
    return tuple(parts[0]), tuple(parts[1])


def _source(data: Mapping[str, Any], neutral: set[int]) -> str:
    """The file as the library is to see it: what it would do beyond cutting text is left out or done here."""
    added = [dict(entry, special=entry["id"] in neutral) for entry in data.get("added_tokens") or []]
    model = dict(data["model"], dropout=None)
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    changed = {**data, **unused, "added_tokens": added, "model": model}
    return json.dumps(changed, ensure_ascii=False)


def _build(source: str, name: str) -> Any:
    with _library(TokenizerError, f"{name} cannot be used"):
        return RustTokenizer.from_str(source)


@contextmanager
def _library(kind: type[HanlinError], what: str) -> Iterator[None]:
    """Turn whatever the library raises into one of our errors.

    Its errors are bare `Exception`, and its panics (a pattern that gives up on a text, say) are no `Exception` at all.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise kind(f"{what}: {str(error)[:300]}") from None
