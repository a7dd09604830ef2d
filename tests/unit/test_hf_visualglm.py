"""VisualGLM-6B as Transformers classes: the card's own lines, and the same tokens as the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL", reason="needs Pillow: pip install 'hanlin[vision]'")

import torch
from transformers import AutoModel, AutoTokenizer

import hanlin
import hanlin.hf
from hanlin.errors import RequestError
from visualglm_directory import picture, write


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    where = write(tmp_path_factory.mktemp("visualglm") / "visualglm-6b")
    (where / "a.png").write_bytes(picture(1))
    return where


def test_the_cards_lines(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True).float()
    assert type(model) is hanlin.hf.ChatGLMForConditionalGenerationWithImage
    assert type(hanlin.hf.ChatGLMForConditionalGeneration.from_pretrained(path)) is type(model)
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 10}
    image = str(path / "a.png")
    response, history = model.chat(tokenizer, image, "你好", history=[], **options)
    assert history == [("你好", response)]
    *_, last = model.stream_chat(tokenizer, image, "你好", history=[], **options)
    assert last == (response, history)
    other, _ = model.chat(tokenizer, picture(2), "你好", history=[], **options)
    blind, _ = model.chat(tokenizer, "", "你好", history=[], **options)
    more, longer = model.chat(tokenizer, image, "问", history=history, **options)
    assert longer == [*history, ("问", more)] and len({response, other, blind}) == 3
    asked = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "你好"}]}]
    with hanlin.load(path, dtype="float32", packed_cache=False, cache_max_entry_count=64) as llm:
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "repetition_penalty": 1.0}
        assert llm.chat(asked, **settings).text == response
        talk = [*asked, {"role": "assistant", "content": response}, {"role": "user", "content": "问"}]
        assert llm.chat(talk, **settings).text == more
    for wrong in ("https://example.org/a.png", str(path / "none.png")):
        with pytest.raises(RequestError, match="cannot be read"):
            model.chat(tokenizer, wrong, "你好")


def test_forward_and_saving(path: Path, tmp_path: Path) -> None:
    model = hanlin.hf.ChatGLMForConditionalGenerationWithImage.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([[7, 3, 3, 3, 3, 3, 8, 91, 92]])
    ids[0, -2:] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with_image = model(ids, images=pixels, pre_image_length=1).logits
    with_image.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    plain = model(ids).logits
    assert (with_image - plain).abs().max() > 1e-3
    twice = model(ids.expand(2, -1), images=torch.cat((pixels, -pixels)), pre_image_length=1).logits
    assert (twice[0] - with_image[0]).abs().max() < 1e-4 and (twice[1] - twice[0]).abs().max() > 1e-3
    with pytest.raises(RequestError, match="do not fit"):
        model(ids, images=pixels, pre_image_length=6)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
