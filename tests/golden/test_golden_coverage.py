"""Every recorded list of ids, as text and as a conversation, out of directories with the released names; and that none
of the records is left out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hanlin.chat import chat_format_for
from hanlin.tokenizers import load_tokenizer
from hanlin.tokenizers.spm_model import SpmModel
from hanlin.types import Message


class Released(NamedTuple):
    """What a released directory says of its tokenizer: the file among the assets and its name, class, rows, family."""

    asset: str
    file: str
    cls: str
    rows: int
    family: str
    named: str  # the model's name, which some directories need


SENTENCES = "tokenizer_chatglm2.model"
RELEASED = {
    "chatglm-6b": Released(
        "ice_text_v1_1.model", "ice_text.model", "ChatGLMTokenizer", 130528, "chatglm", "chatglm-6b"
    ),
    "chatglm2-6b": Released(SENTENCES, "tokenizer.model", "ChatGLMTokenizer", 65024, "chatglm2", "chatglm2-6b"),
    "chatglm3-6b_chat": Released(
        "tokenizer_chatglm3.model", "tokenizer.model", "ChatGLMTokenizer", 65024, "chatglm2", "chatglm3-6b"
    ),
    "codegeex2-6b": Released(SENTENCES, "tokenizer.model", "ChatGLMTokenizer", 65024, "chatglm2", "codegeex2-6b"),
    "glm-4-9b": Released(
        "tokenizer_glm4.tiktoken", "tokenizer.model", "ChatGLM4Tokenizer", 151552, "chatglm2", "glm-4-9b"
    ),
    "glm-4-9b_chat": Released(
        "tokenizer_glm4.tiktoken", "tokenizer.model", "ChatGLM4Tokenizer", 151552, "chatglm2", "glm-4-9b-chat"
    ),
    "internlm-chat-7b-v1_1": Released(
        "tokenizer_internlm.model", "tokenizer.model", "InternLMTokenizer", 103168, "internlm", "internlm-chat-7b-v1_1"
    ),
}
# Where the official code's outputs for one block are compared.
BLOCKS = {
    "glm_model.data": "test_chatglm_golden.py",
    "glm_ptuning_v2_model.data": "test_chatglm_golden.py",
    "glm2_model.data": "test_chatglm2_golden.py",
    "internlm_model.data": "test_internlm_golden.py",
}
ROUND = re.compile(r"\[Round \d+\]\n+问：(.*?)\n+答：(.*?)(?=\n+\[Round|\Z)", re.DOTALL)
TURN = re.compile(r"<\|User\|>:(.*?)<eoh>\n<\|Bot\|>:(.*?)(?:<eoa>\n|\Z)", re.DOTALL)


def recorded(shared: Path) -> dict[str, Any]:
    found = json.loads((shared / "assets" / "golden_token_ids.json").read_text(encoding="utf-8"))
    return {name: entries for name, entries in found.items() if name != "source"}


def directory(path: Path, shared: Path, of: Released) -> Path:
    data = (shared / "assets" / of.asset).read_bytes()
    if of.named.startswith("codegeex2"):  # its own file is not at hand; it differs in this alone, see facts about it
        data = replace(SpmModel.parse(data, of.file), dummy_prefix=False).serialize()
    (path / of.file).write_bytes(data)
    said = {"tokenizer_class": of.cls, "name_or_path": f"THUDM/{of.named}"}
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    rows = "padded_vocab_size" if of.family == "chatglm2" else "vocab_size"
    kind = "internlm" if of.family == "internlm" else "chatglm"
    (path / "config.json").write_text(json.dumps({"model_type": kind, rows: of.rows}))
    return path


def conversation(entry: Any) -> list[Message] | None:
    """The turns of a recorded conversation or prompt; None for a text that is neither."""
    if isinstance(entry, list):
        return [Message(role=role, content=content) for role, content in entry]
    pairs = ROUND.findall(entry) or TURN.findall(entry)
    turns = [
        Message(role=role, content=text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    assert not turns or not turns[-1].content, "the last answer is to be written"
    return turns[:-1] or None


@pytest.mark.parametrize("name", RELEASED)
def test_recorded_ids(shared: Path, tmp_path: Path, name: str) -> None:
    of, entries = RELEASED[name], recorded(shared)[name]
    tokenizer = load_tokenizer(directory(tmp_path, shared, of))
    early = "internlm-v1_1" if of.family == "internlm" else None
    chat = chat_format_for(tokenizer, model_type=of.family, name=early)
    assert tokenizer.vocab_size == of.rows and entries
    asked = 0
    for entry, ids in entries:
        if isinstance(entry, str):
            assert tokenizer.encode(entry, add_special=True, parse_special=of.family == "internlm") == ids
        turns = conversation(entry)
        if turns:
            assert list(chat.render(turns).ids) == ids
            asked += 1
    assert asked or name in ("glm-4-9b", "codegeex2-6b")
    if of.family == "chatglm":  # a first question stands bare
        assert list(chat.render([Message(role="user", content=entries[0][0])]).ids) == entries[0][1]
    if name == "codegeex2-6b":  # a prompt is text to go on with
        assert chat.name == "raw"
        assert list(chat.render([Message(role="user", content=entries[0][0])]).ids) == entries[0][1]


def test_no_record_is_left_out(shared: Path) -> None:
    assert set(recorded(shared)) == set(RELEASED)
    assert {path.name for path in (shared / "assets" / "golden").iterdir()} == set(BLOCKS)
    for file, where in BLOCKS.items():
        assert Path(file).stem in (Path(__file__).parent / where).read_text(encoding="utf-8")
