"""A tokenizer as the `tokenizer.ggml.*` keys of a GGUF file, so that llama.cpp and `from_gguf` cut text as it does."""

from __future__ import annotations

from typing import Any

from hanlin.errors import TokenizerError, problems
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.tokenizers.gguf import pre_of
from hanlin.tokenizers.hf import HFTokenizer
from hanlin.tokenizers.spm import SentencePieceTokenizer
from hanlin.tokenizers.spm_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

__all__ = ["gguf_keys"]

# What ends a turn, by its name; the first that a tokenizer has.
_TURN_ENDS = ("<|im_end|>", "<eoa>", "<|eot_id|>")
# Of a token that no merge should lead to.
_NEVER = -1000.0


def gguf_keys(tokenizer: BaseTokenizer, *, name: str = "the tokenizer") -> dict[str, Any]:
    """Key names to plain values: one token, kind and, for SentencePiece, score for each id.

    llama.cpp wants every token once: ids without a text become unused `[PAD<id>]`.

    Raises:
        TokenizerError: everything about a tokenizer that llama.cpp has no words for.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        keys = _sentencepiece(tokenizer, name)
    elif isinstance(tokenizer, HFTokenizer):
        keys = _byte_level(tokenizer, name)
    else:
        raise TokenizerError(
            f"{name}: ChatGLM-6B can't be a GGUF file: llama.cpp has no architecture for it, and no kind of tokenizer "
            "with its rules for lines, tabs and blanks. `hanlin convert --to hanlin` packs it for Hanlin."
        )
    return keys | {f"tokenizer.ggml.{key}": value for key, value in _roles(tokenizer).items()}


def _roles(tokenizer: BaseTokenizer) -> dict[str, Any]:
    specials = tokenizer.specials
    ids = {"bos": specials.bos, "eos": specials.eos, "unknown": specials.unk, "padding": specials.pad}
    ids["eot"] = specials.eot
    if tokenizer.token_id("[gMASK]") in tokenizer.special_ids:
        ids["eot"] = tokenizer.token_id("<|user|>")
        ids["eom"] = tokenizer.token_id("<|observation|>")  # behind a call of a tool
    elif ids["eot"] is None:
        ends = (tokenizer.token_id(piece) for piece in _TURN_ENDS)
        ids["eot"] = next((i for i in ends if i in tokenizer.special_ids), None)
    found: dict[str, Any] = {f"{role}_token_id": i for role, i in ids.items() if i is not None}
    found["add_bos_token"] = specials.bos is not None and specials.bos in specials.prefix
    found["add_eos_token"] = specials.eos is not None and specials.eos in specials.suffix
    return found


def _vocabulary(tokenizer: BaseTokenizer, kinds: list[int]) -> dict[str, Any]:
    """The tokens, each once, and their kinds."""
    tokens: list[str] = []
    seen: set[str] = set()
    for i, piece in enumerate(tokenizer.table.pieces):
        if not piece or piece in seen:
            piece, kinds[i] = f"[PAD{i}]", UNUSED
        seen.add(piece)
        tokens.append(piece)
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


def _sentencepiece(tokenizer: SentencePieceTokenizer, name: str) -> dict[str, Any]:
    model, special, size = tokenizer.model, tokenizer.special_ids, tokenizer.vocab_size
    found = []
    if model.algorithm != BPE:
        found.append("it is a Unigram model; llama.cpp's kind for SentencePiece merges pairs")
    if not model.byte_fallback:
        found.append("characters without a piece do not fall back to bytes")
    if found:
        raise TokenizerError(problems(f"{name} as a GGUF tokenizer", found))
    kinds = [*model.kinds, *[CONTROL] * (size - len(model.kinds))]
    # Reserved pieces that no text reaches are control pieces in SentencePiece's own object only.
    kinds = [UNUSED if kind == CONTROL and i not in special else kind for i, kind in enumerate(kinds)]
    kinds = [CONTROL if i in special and kind not in (UNKNOWN, BYTE) else kind for i, kind in enumerate(kinds)]
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", **_vocabulary(tokenizer, kinds)}
    own = zip(model.pieces, model.scores, tokenizer.table.pieces, strict=False)
    scores = [score if piece == named else _NEVER for piece, score, named in own]
    keys["tokenizer.ggml.scores"] = [*scores, *[_NEVER] * (size - len(scores))]
    keys["tokenizer.ggml.add_space_prefix"] = model.dummy_prefix
    keys["tokenizer.ggml.remove_extra_whitespaces"] = model.remove_extra_spaces
    return keys


def _byte_level(tokenizer: HFTokenizer, name: str) -> dict[str, Any]:
    rules = tokenizer.rules
    added = {entry["id"] for entry in rules["added_tokens"]}
    special = tokenizer.special_ids
    glm = tokenizer.token_id("[gMASK]") in special
    pre = pre_of(rules, glm=glm)
    if pre is None:
        raise TokenizerError(
            f"{name}: llama.cpp has no name for how this tokenizer.json cuts text into words. If the model came with a "
            "tokenizer.model, put that beside it."
        )
    kinds = [CONTROL if i in special else USER_DEFINED if i in added else NORMAL for i in range(tokenizer.vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"].get("merges") or []]
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, **_vocabulary(tokenizer, kinds)}
    return keys | ({"tokenizer.ggml.merges": merges} if merges else {})
