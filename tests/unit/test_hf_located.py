"""Transformers finds models by every name that Hanlin knows: short, of earlier organisations, of other hubs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_directory import make_directory

pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

from hanlin.hf.located import located

SNIPPET = """
import json, sys
import hanlin.hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
hanlin.hf.register(hanlin.hf.FAMILY)  # again: changes nothing
out = {}
for name in sys.argv[1:]:
    config = AutoConfig.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    own = hanlin.hf.InternLM2ForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    by_key = AutoModel.from_pretrained(pretrained_model_name_or_path=name)
    kinds = [type(thing).__name__ for thing in (config, model, own, tokenizer, by_key)]
    out[name] = [*kinds, tokenizer("hi")["input_ids"]]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the cache of huggingface_hub, and one in ModelScope's."""
    root = tmp_path_factory.mktemp("caches")
    made = make_directory(root / "made", tokenizer="small")
    folder = root / "hf" / "hub" / "models--internlm--internlm2-chat-7b"
    shutil.copytree(made, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40, encoding="ascii")
    there = root / "ms" / "models" / "Shanghai_AI_Laboratory--internlm2-chat-1_8b" / "snapshots" / "master"
    shutil.copytree(made, there)
    return root


def test_auto_classes_and_ours_take_all_names(caches: Path) -> None:
    names = [
        "internlm/internlm2-chat-7b",
        "internlm2-chat-7b",
        "Shanghai_AI_Laboratory/InternLM2-Chat-7B",
        "hf:OpenLMLab/internlm2-chat-7b",
        "internlm2-chat-7b@main",
        "ms:Shanghai_AI_Laboratory/internlm2-chat-1_8b",
        "ms:internlm2-chat-1_8b@master",
    ]
    environment = {
        **os.environ,
        "HF_HOME": str(caches / "hf"),
        "HF_HUB_OFFLINE": "1",
        "MODELSCOPE_CACHE": str(caches / "ms"),
        "HANLIN_HOME": str(caches / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", SNIPPET, *names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert set(out) == set(names)
    for name, (config, *models, ids) in out.items():
        assert config == "InternLM2Config", name
        assert models == ["InternLM2ForCausalLM"] * 2 + ["InternLM2TokenizerFast", "InternLM2ForCausalLM"], name
        assert ids == out[names[0]][-1]


def test_what_is_no_model_of_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANLIN_USE_MODELSCOPE", "0")
    for name in ("gpt2", "someone/model", "org/name:Q4_0", "", "a\0b", None, 3, tmp_path, str(tmp_path)):
        assert located(name, {}) is name


def test_without_a_cache_todays_id_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANLIN_USE_MODELSCOPE", "0")
    options: dict[str, object] = {}
    assert located("ZhipuAI/glm-4-9b-hf@v1", options) == "zai-org/glm-4-9b-hf"
    assert options == {"revision": "v1"}
    assert located("codegeex2-6b-int4", {}) == "zai-org/codegeex2-6b-int4"
