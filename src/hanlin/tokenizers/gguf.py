"""The tokenizer inside a GGUF file: `tokenizer.ggml.*` keys, for byte-level BPE ("gpt2") and SentencePiece ("llama").

Key names and token kinds: ggml-org/ggml, docs/gguf.md. How each `tokenizer.ggml.pre` cuts words: the
tokenizer.json of the models that it is named after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanlin.errors import TokenizerError, problems
from hanlin.tokenizers.base import BaseTokenizer, Specials, is_markup
from hanlin.tokenizers.hf import HFTokenizer
from hanlin.tokenizers.spm import SentencePieceTokenizer, known_added
from hanlin.tokenizers.spm_model import BPE, BYTE, CONTROL, MAX_PIECES, NORMAL, UNKNOWN, USER_DEFINED, SpmModel

__all__ = ["from_gguf", "tokenizer_data"]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL


@dataclass(frozen=True, kw_only=True)
class _Words:
    """How text is cut into words before merging: each pattern cuts further what the one before left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _words() -> dict[str, _Words]:
    default = _Words(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
    gpt2 = _Words(patterns=(_GPT2,))
    digits = _Words(patterns=(r"\p{N}", _GPT2))
    llama3 = _Words(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
    return {
        "default": default,
        **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), gpt2),
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), digits),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), llama3),
        **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _Words(patterns=(_LLAMA3,))),
        "qwen2": _Words(patterns=(_QWEN2,), nfc=True),
    }


def from_gguf(metadata: Mapping[str, Any], *, name: str = "GGUF") -> BaseTokenizer:
    """The tokenizer that a GGUF file's key-value pairs describe.

    Args:
        metadata: GGUF key names to plain values: numbers, strings, booleans, lists.
        name: the file, for messages.

    Raises:
        TokenizerError: keys that are missing, broken or of a kind that is not supported, all named at once.
    """
    made, specials, rows = tokenizer_data(metadata, name=name)
    if isinstance(made, SpmModel):
        return SentencePieceTokenizer(made, added=known_added(made), specials=specials, name=name)
    return HFTokenizer(made, specials=specials, rows=rows, name=name)


def tokenizer_data(
    metadata: Mapping[str, Any], *, name: str = "GGUF"
) -> tuple[SpmModel | dict[str, Any], Specials, int]:
    """What a `tokenizer.model` or a `tokenizer.json` would hold, the ids with a role, and the number of ids.

    Raises:
        TokenizerError: as `from_gguf`.
    """
    keys = _Keys(metadata, name)
    model = keys.value("model", str, None)
    builders: Mapping[str, Callable[..., tuple[Any, Specials]]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    keys.finish()
    if model not in builders:
        raise TokenizerError(
            f"{name}: tokenizer.ggml.model {model!r} is not supported; known: {', '.join(builders)}."
            + (" The file holds no tokenizer: use the original model's directory." if model in (None, "none") else "")
        )
    tokens = keys.items("tokens", str)
    kinds = keys.items("token_type", int, optional=True) or [NORMAL] * len(tokens)
    if not tokens:
        keys.found.append("tokenizer.ggml.tokens is missing or empty")
    elif len(tokens) > MAX_PIECES:
        keys.found.append(f"tokenizer.ggml.tokens has {len(tokens)} entries, more than {MAX_PIECES}")
    if len(kinds) != len(tokens):
        keys.found.append(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    strange = sorted({kind for kind in kinds if not NORMAL <= kind <= BYTE})
    if strange:
        keys.found.append(f"tokenizer.ggml.token_type must be 1..6, not {strange[:8]}")
    made, specials = builders[model](keys, tokens, kinds)
    return made, specials, len(tokens)


class _Keys:
    """Reads `tokenizer.ggml.*` with types checked, gathering what is wrong."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self._metadata = metadata
        self.name = name
        self.found: list[str] = []

    def value(self, key: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is default or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        self.found.append(f"tokenizer.ggml.{key} must be {kind.__name__}, not {value!r:.60}")
        return default

    def items(self, key: str, kind: type | tuple[type, ...], *, optional: bool = False) -> list[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None and optional:
            return []
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            self.found.append(f"tokenizer.ggml.{key} must be a list, not {type(value).__name__}")
            return []
        wrong = next((item for item in value if not isinstance(item, kind)), None)
        if wrong is not None:
            self.found.append(f"tokenizer.ggml.{key} must not hold {wrong!r:.60}")
            return []
        return list(value)

    def specials(self, size: int, *, bos: int | None, eos: int | None, unk: int | None, add_bos: bool) -> Specials:
        defaults = {"bos": bos, "eos": eos, "eot": None, "unknown": unk, "padding": None}
        ids: dict[str, int | None] = {}
        for role, default in defaults.items():
            ids[role] = value = self.value(f"{role}_token_id", int, default)
            if value is not None and not 0 <= value < size:
                if value is default:
                    ids[role] = None
                else:
                    self.found.append(f"tokenizer.ggml.{role}_token_id is {value}, but there are {size} tokens")
        bos_id, eos_id = ids["bos"], ids["eos"]
        with_bos = self.value("add_bos_token", bool, add_bos)
        with_eos = self.value("add_eos_token", bool, False)
        return Specials(
            bos=bos_id,
            eos=eos_id,
            eot=ids["eot"],
            unk=ids["unknown"],
            pad=ids["padding"],
            prefix=(bos_id,) if with_bos and bos_id is not None else (),
            suffix=(eos_id,) if with_eos and eos_id is not None else (),
        )

    def finish(self) -> None:
        if self.found:
            raise TokenizerError(problems(self.name, self.found, "Fetch the file again, or convert the model anew."))


def _ending(specials: Specials, tokens: Sequence[str]) -> set[int]:
    """Ids that end a text and look like structure; some converters leave them typed as ordinary tokens."""
    ids = (specials.bos, specials.eos, specials.eot)
    return {i for i in ids if i is not None and i < len(tokens) and is_markup(tokens[i])}


def _byte_level(keys: _Keys, tokens: list[str], kinds: list[int]) -> tuple[dict[str, Any], Specials]:
    known = _words()
    pre = keys.value("pre", str, "default")
    words = known.get(pre)
    if words is None:
        keys.found.append(f"tokenizer.ggml.pre {pre!r} is not supported; known: {', '.join(sorted(known))}")
        words = known["default"]
    merges = keys.items("merges", str)
    specials = keys.specials(len(tokens), bos=None, eos=None, unk=None, add_bos=words.add_bos)
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        # A token that stands twice has its first id; the other, which no text can mean, decodes to nothing.
        ids.setdefault(token, i)
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left not in ids or right not in ids or left + right not in ids:
            keys.found.append(f"tokenizer.ggml.merges: {merge!r:.60} does not join two tokens into a third")
            break
    keys.finish()
    special = _ending(specials, tokens) | {i for i, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)}
    added = [
        {
            "id": i,
            "content": token,
            "special": i in special,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if (i in special or kind == USER_DEFINED) and token
    ]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in words.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    data = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if words.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": words.ignore_merges},
    }
    return data, specials


def _sentencepiece(keys: _Keys, tokens: list[str], kinds: list[int]) -> tuple[SpmModel, Specials]:
    scores = keys.items("scores", (float, int))
    if len(scores) != len(tokens):
        keys.found.append(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    specials = keys.specials(len(tokens), bos=1, eos=2, unk=0, add_bos=True)
    dummy_prefix = keys.value("add_space_prefix", bool, True)
    remove_extra_spaces = keys.value("remove_extra_whitespaces", bool, False)
    keys.finish()
    ending = _ending(specials, tokens)
    kinds = [CONTROL if i in ending and kind not in (UNKNOWN, BYTE) else kind for i, kind in enumerate(kinds)]
    if UNKNOWN not in kinds and specials.unk is not None:
        kinds[specials.unk] = UNKNOWN
    model = SpmModel(
        pieces=_restored(tokens),
        scores=[float(score) for score in scores],
        kinds=kinds,
        algorithm=BPE,
        byte_fallback=BYTE in kinds,
        dummy_prefix=dummy_prefix,
        remove_extra_spaces=remove_extra_spaces,
    )
    model.check(keys.name)
    return model, specials


def _restored(tokens: Sequence[str]) -> list[str]:
    """InternLM2's pieces as they were: llama.cpp's converter writes the NUL piece as a dragon, for C's sake."""
    pieces = list(tokens)
    if "🐉" in pieces:
        place = pieces.index("🐉")
        if pieces[place + 1 : place + 3] == ["\x01", "\x02"]:
            pieces[place] = "\0"
    return pieces
