"""VisualGLM-6B's prompt with the real vocabulary: the released code's pieces, encoded apart, around 32 places."""

from __future__ import annotations

from pathlib import Path

from hanlin.chat.visualglm import VisualGLMFormat
from hanlin.tokenizers.chatglm import ChatGLMTokenizer
from hanlin.tokenizers.spm_model import SpmModel
from hanlin.types import Message


def test_the_prompt_of_the_card(shared: Path) -> None:
    data = (shared / "assets" / "ice_text_v1_1.model").read_bytes()
    tokenizer = ChatGLMTokenizer(SpmModel.parse(data, "ice_text.model"), rows=130528)
    message = Message(role="user", content="描述这张图片。", images=(b"an image",))
    rendered = VisualGLMFormat(tokenizer).render([message])
    before, behind = tokenizer.encode("<img>"), tokenizer.encode("</img>问：描述这张图片。\n答：")
    assert rendered.ids == (*before, *[3] * 32, *behind, 130001, 130004)
    assert (before, rendered.images) == ([46, 2265, 33], ((3, b"an image"),))
    assert behind == [98, 2265, 33, 64286, 12, 67194, 74366, 65842, 63823, 4, 67342, 12]
