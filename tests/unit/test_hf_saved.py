"""What the Transformers classes save, Hanlin itself loads: with the same ids, and the same replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm_directory
import visualglm_directory
from hf_directory import make_directory
from tokenizer_samples import INTERNLM, INTERNLM2

pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

from test_hf_chatglm2 import KINDS, directory
from test_hf_internlm import V1, V3, write
from transformers import AutoModel, AutoTokenizer

import hanlin
import hanlin.hf

OPTIONS = {"runner": "torch", "dtype": "float32", "cache_max_entry_count": 64, "threads": 1}
TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "好"}]


def make(path: Path, kind: str) -> Path:
    if kind in KINDS:
        return directory(path, kind)
    if kind == "visualglm":
        return visualglm_directory.write(path / kind)
    if kind == "chatglm-6b":
        return chatglm_directory.make_directory(path / kind)
    if kind == "internlm2":
        return make_directory(path / kind)
    if kind == "reward":
        return make_directory(path / kind, architectures=["InternLM2ForRewardModel"], reward_token_id=92527)
    first = kind == "internlm"
    tokenizer = ("InternLMTokenizer", INTERNLM) if first else ("InternLM3Tokenizer", INTERNLM2)
    return write(path / kind, V1 if first else V3, tokenizer[1], tokenizer[0])


def answer(path: Path, judges: bool) -> Any:
    with hanlin.load(path, **OPTIONS) as llm:
        if judges:
            return llm.get_score(TALK)
        reply = llm.chat([*TALK, {"role": "user", "content": "你好"}], temperature=0, max_tokens=6)
        return llm.chat_format.name, llm.tokenizer.encode("the cat 你好\n"), reply.ids


@pytest.mark.parametrize("kind", [*KINDS, "chatglm-6b", "visualglm", "internlm2", "internlm", "internlm3", "reward"])
def test_saved_directories_load_everywhere(tmp_path: Path, kind: str) -> None:
    path, saved = make(tmp_path, kind), tmp_path / "saved"
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    if not hasattr(model, "chat") and kind != "reward":
        model = hanlin.hf.__dict__[model.config.architectures[0]].from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    assert not (saved / "config.json").read_text(encoding="utf-8").count("auto_map")
    assert type(AutoTokenizer.from_pretrained(saved)) is type(tokenizer)
    judges = kind == "reward"
    if judges:
        assert answer(saved, judges) == pytest.approx(answer(path, judges), abs=1e-5)
    else:
        assert answer(saved, judges) == answer(path, judges)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_too(tmp_path: Path, kind: str, bits: int) -> None:
    path, saved = make(tmp_path, kind), tmp_path / "saved"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).quantize(bits)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    with hanlin.load(saved, **OPTIONS) as llm:
        reply = llm.generate("the cat", temperature=0, max_tokens=6)[0].ids
    ids = tokenizer("the cat", return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=6)[0, ids["input_ids"].shape[1] :].tolist()
    assert list(reply) == out[: len(reply)]


def test_an_image_too(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs the extra 'vision' (pillow), which is not installed")
    path, saved = make(tmp_path, "visualglm"), tmp_path / "saved"
    AutoModel.from_pretrained(path, dtype=torch.float32).save_pretrained(saved)
    AutoTokenizer.from_pretrained(path).save_pretrained(saved)
    found = []
    for where, seed in ((path, 1), (saved, 1), (saved, 2)):
        image = tmp_path / f"{seed}.png"
        image.write_bytes(visualglm_directory.picture(seed))
        content = [{"type": "image", "image": str(image)}, {"type": "text", "text": "你好"}]
        with hanlin.load(where, **OPTIONS) as llm:
            found.append(llm.chat([{"role": "user", "content": content}], temperature=0, max_tokens=10).ids)
    assert found[0] == found[1] != found[2]
