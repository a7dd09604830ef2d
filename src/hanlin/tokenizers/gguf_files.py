"""The tokenizer of a GGUF file as the files of a model directory, which every other program reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hanlin.tokenizers.base import Specials
from hanlin.tokenizers.gguf import is_glm, tokenizer_data
from hanlin.tokenizers.glm import ROLES
from hanlin.tokenizers.hf import byte_alphabet
from hanlin.tokenizers.spm_model import SpmModel

__all__ = ["gguf_to_files"]


def gguf_to_files(metadata: Mapping[str, Any], *, name: str = "GGUF") -> dict[str, bytes]:
    """`tokenizer.model` or `tokenizer.json`, and `tokenizer_config.json` with the chat template, by name.

    Raises:
        TokenizerError: as `from_gguf`.
    """
    made, specials, rows = tokenizer_data(metadata, name=name)
    config: dict[str, Any] = {
        "add_bos_token": bool(specials.prefix),
        "add_eos_token": bool(specials.suffix),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    files: dict[str, bytes] = {}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    if _glm(made):
        return _glm_files(made, config)
    if isinstance(made, SpmModel):
        files["tokenizer.model"] = made.serialize()
        pieces = dict(enumerate(made.pieces))
        arch = metadata.get("general.architecture")
        config["tokenizer_class"] = "InternLM2Tokenizer" if arch == "internlm2" else "LlamaTokenizer"
    else:
        pieces = {i: piece for piece, i in made["model"]["vocab"].items()}
        made = {**made, "truncation": None, "padding": None, "post_processor": _around(specials, pieces)}
        files["tokenizer.json"] = _json(made)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in made["added_tokens"]
        }
    roles = {"bos": specials.bos, "eos": specials.eos, "unk": specials.unk, "pad": specials.pad}
    config |= {f"{role}_token": pieces[i] for role, i in roles.items() if i is not None and 0 <= i < rows}
    files["tokenizer_config.json"] = _json(config)
    return files


def _glm(made: SpmModel | dict[str, Any]) -> bool:
    return is_glm(made.pieces if isinstance(made, SpmModel) else made["model"]["vocab"])


def _glm_files(made: SpmModel | dict[str, Any], config: dict[str, Any]) -> dict[str, bytes]:
    """ChatGLM2's and later ones' `tokenizer.model`, without the special tokens that their classes add themselves."""
    config = {key: value for key, value in config.items() if not key.startswith("add_")}
    if isinstance(made, SpmModel):
        pieces, count = made.pieces, made.pieces.index("[MASK]")
        own = replace(made, pieces=pieces[:count], scores=made.scores[:count], kinds=made.kinds[:count])
        data = own.serialize()
        config |= {"tokenizer_class": "ChatGLMTokenizer", "roles": ROLES[1] in pieces}
    else:
        alphabet, ids = byte_alphabet(), made["model"]["vocab"]
        ranks = sorted((i, piece) for piece, i in ids.items() if i < ids["<|endoftext|>"])
        tokens = (bytes(alphabet[letter] for letter in piece) for _, piece in ranks)
        data = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
        config |= {"tokenizer_class": "ChatGLM4Tokenizer"}
    return {"tokenizer.model": data, "tokenizer_config.json": _json(config)}


def _around(specials: Specials, pieces: Mapping[int, str]) -> dict[str, Any] | None:
    """What puts the special tokens around a text."""
    if not specials.prefix and not specials.suffix:
        return None

    def tokens(ids: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": pieces[i], "type_id": 0}} for i in ids]

    single = [*tokens(specials.prefix), {"Sequence": {"id": "A", "type_id": 0}}, *tokens(specials.suffix)]
    pair = [*single, *tokens(specials.prefix), {"Sequence": {"id": "B", "type_id": 0}}, *tokens(specials.suffix)]
    known = {pieces[i]: {"id": pieces[i], "ids": [i], "tokens": [pieces[i]]} for i in specials.prefix + specials.suffix}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
