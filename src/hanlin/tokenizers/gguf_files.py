"""The tokenizer of a GGUF file as the files of a model directory, which every other program reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hanlin.tokenizers.base import Specials
from hanlin.tokenizers.gguf import tokenizer_data
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
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    files["tokenizer_config.json"] = _json(config)
    return files


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
