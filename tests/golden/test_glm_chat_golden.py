"""ChatGLM2's, ChatGLM3's and GLM-4's conversations in the official code's ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_glm_tokenizer_golden import golden, tokenizers  # noqa: F401 - fixtures

from hanlin.chat import chat_format_for
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.types import Message


@pytest.mark.parametrize("model", ["chatglm3-6b", "glm-4-9b"])
def test_official_conversations(
    shared: Path,
    golden: dict[str, Any],  # noqa: F811
    tokenizers: dict[str, BaseTokenizer],  # noqa: F811
    model: str,
) -> None:
    chat = chat_format_for(tokenizers[model], model_type="chatglm2")
    assert golden[f"{model}_chat"]
    for turns, ids in golden[f"{model}_chat"]:
        messages = [Message(role=role, content=content) for role, content in turns]
        assert list(chat.render(messages).ids) == ids


def test_official_rounds(golden: dict[str, Any], tokenizers: dict[str, BaseTokenizer]) -> None:  # noqa: F811
    chat = chat_format_for(tokenizers["chatglm2-6b"], model_type="chatglm2")
    asked = [Message(role="user", content="你好")]
    answer = golden["chatglm2-6b"][2][0].partition("答：")[2].partition("\n\n[Round 2]")[0]
    again = [*asked, Message(role="assistant", content=answer), Message(role="user", content="晚上睡不着应该怎么办")]
    for messages, number in ((asked, 1), (again, 2)):
        assert list(chat.render(messages).ids) == golden["chatglm2-6b"][number][1]
