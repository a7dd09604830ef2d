"""The tokenizer inside a GGUF file: `tokenizer.ggml.*` keys, for byte-level BPE ("gpt2") and SentencePiece ("llama").

Key names and token kinds: ggml-org/ggml, docs/gguf.md. How each `tokenizer.ggml.pre` cuts words: the
tokenizer.json of the models that it is named after.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hanlin.errors import TokenizerError, problems
from hanlin.tokenizers.base import BaseTokenizer, Specials, is_markup
from hanlin.tokenizers.glm import ChatGLM2Tokenizer, GLM4Tokenizer
from hanlin.tokenizers.hf import HFTokenizer
from hanlin.tokenizers.spm import SentencePieceTokenizer, known_added
from hanlin.tokenizers.spm_model import BPE, BYTE, CONTROL, MAX_PIECES, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SpmModel

__all__ = ["from_gguf", "is_glm", "pre_of", "tokenizer_data"]

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
        **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _Words(patterns=(_LLAMA3,))),
        "glm4": _Words(patterns=(_LLAMA3,), ignore_merges=True),
        "qwen2": _Words(patterns=(_QWEN2,), nfc=True),
    }


def pre_of(rules: Mapping[str, Any], *, glm: bool) -> str | None:
    """The name that llama.cpp has for how a `tokenizer.json` cuts text into words, if it has one.

    `glm`: of GLM-4 and not of Llama 3, which cut alike but start differently.
    """
    pre, normalizer = rules.get("pre_tokenizer"), rules.get("normalizer")
    steps = pre.get("pretokenizers") if isinstance(pre, Mapping) and pre.get("type") == "Sequence" else [pre]
    patterns = [_pattern(step) for step in steps if isinstance(step, Mapping)] if isinstance(steps, list) else []
    kind = normalizer.get("type") if isinstance(normalizer, Mapping) else None
    cut = tuple(pattern for pattern in patterns if pattern)
    if None in patterns or kind not in (None, "NFC"):
        return None
    ignore = bool(rules["model"].get("ignore_merges"))
    names = ("gpt-2", "smollm", *(("glm4", "chatglm-bpe") if glm else ("llama-bpe", "dbrx")), "qwen2", "default")
    fitting = [name for name in names if _words()[name].patterns == cut and _words()[name].ignore_merges == ignore]
    return next(iter(fitting), None)


def _pattern(step: Mapping[str, Any]) -> str | None:
    """What a step of a pre-tokenizer cuts by; "" for nothing, None for what can't be said."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Digits" and step.get("individual_digits"):
        return r"\p{N}"
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return _GPT2 if step.get("use_regex", True) else ""
    plain = kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    found = pattern.get("Regex") if plain and isinstance(pattern, Mapping) else None
    return found if isinstance(found, str) else None


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
        if is_glm(made.pieces):
            return ChatGLM2Tokenizer(made, specials=specials, name=name)
        return SentencePieceTokenizer(made, added=known_added(made), specials=specials, name=name)
    glm = is_glm(made["model"]["vocab"])
    return (GLM4Tokenizer if glm else HFTokenizer)(made, specials=specials, rows=rows, name=name)


def is_glm(pieces: Container[str]) -> bool:
    """Whether these are the pieces of ChatGLM2 or a later one, which start every prompt in their own way."""
    return "[gMASK]" in pieces and ("sop" in pieces or "<sop>" in pieces)


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
    # llama.cpp wants each token once, so that converters name ids without a text.
    unused = [i for i, kind in enumerate(kinds[: len(tokens)]) if kind == UNUSED and tokens[i] == f"[PAD{i}]"]
    for i in unused:
        tokens[i] = ""
    made, specials = builders[model](keys, tokens, kinds)
    return made, _glm_start(specials, tokens), len(tokens)


def _glm_start(specials: Specials, tokens: list[str]) -> Specials:
    """With the tokens that ChatGLM2 and later ones put before a bare prompt, if it is one of those."""
    if not is_glm(tokens):
        return specials
    start = tokens.index("<sop>" if "<sop>" in tokens else "sop")
    return replace(specials, prefix=(tokens.index("[gMASK]"), start), suffix=())


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
        if token:
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
    """Pieces as they were: llama.cpp's converter writes InternLM2's NUL as a dragon, and renames ChatGLM3's ends."""
    pieces = list(tokens)
    if is_glm(pieces) and pieces[1:3] == ["<bos>", "<eos>"]:
        pieces[1:3] = ["<s>", "</s>"]
    if "🐉" in pieces:
        place = pieces.index("🐉")
        if pieces[place + 1 : place + 3] == ["\x01", "\x02"]:
            pieces[place] = "\0"
    return pieces
