"""The InternLM repository's own test suite for its model cards, on random weights behind the real tokenizer.

Source: InternLM's tests/test_hf_model.py: its prompts, arguments and what it forbids. The released weights are not
here, so that an answer's sense is not tested ("1+1=" needs a 2 there); all else of the suite is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_directory import code_ran, make_directory

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

import hanlin.hf  # noqa: E402, F401 - registers; after the check above

PROMPTS = ["你好", "what's your name"]
FORBIDDEN = ["UNUSED_TOKEN", "Mynameis", "Iama"]
SHORT = {"max_new_tokens": 24}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("card") / "internlm2_5-7b-chat")


@pytest.fixture(scope="module", params=[True, False], ids=["usefast", "slow"])
def tokenizer(request: pytest.FixtureRequest, directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True, use_fast=request.param)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, torch_dtype=torch.float16, trust_remote_code=True).eval()
    assert model.dtype == torch.float16
    return model


def check(response: str) -> None:
    assert len(response) != 0
    for word in FORBIDDEN:
        assert word not in response


@pytest.mark.parametrize("seed", range(3))
def test_chat(directory: Path, tokenizer: Any, model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    response, history = model.chat(tokenizer, "hello", history=[], **SHORT)
    check(response)
    response, history = model.chat(tokenizer, "please provide three suggestions", history=history, **SHORT)
    check(response)
    assert [turn[0] for turn in history] == ["hello", "please provide three suggestions"]
    for prompt in PROMPTS:
        length = 0
        for response, history in model.stream_chat(tokenizer, prompt, history=[], **SHORT):  # noqa: B007
            print(response[length:], flush=True, end="")
            length = len(response)
        check(response)
        assert history == [(prompt, response)]
    assert not code_ran(directory)


def test_math(tokenizer: Any, model: Any) -> None:
    check(model.chat(tokenizer, "1+1=", history=[], meta_instruction="", **SHORT)[0])


def test_base(tokenizer: Any, model: Any) -> None:
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"max_length": 64, "top_p": 10, "temperature": 1.0, "do_sample": True, "repetition_penalty": 1.0}
        with pytest.warns(UserWarning, match="top_p=10"):
            output = model.generate(**inputs, **options)
        check(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))


@pytest.mark.slow
def test_the_snippet_with_its_own_defaults(tokenizer: Any, model: Any) -> None:
    """Up to 1,024 tokens, unless the model stops by itself."""
    torch.manual_seed(0)
    response, history = model.chat(tokenizer, "hello", history=[])
    check(response)
    assert history == [("hello", response)]
