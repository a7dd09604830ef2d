"""InternLM2-Reward as a Transformers class: the model card's methods, and the same scores as the engine's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_directory import code_ran, make_directory

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

import hanlin  # noqa: E402 - after the check above
from hanlin.errors import ConfigError, RequestError  # noqa: E402
from hanlin.hf import InternLM2ForCausalLM, InternLM2ForRewardModel, InternLM2Model  # noqa: E402
from hanlin.types import ranks  # noqa: E402

QUESTION = {"role": "user", "content": "Hello! What's your name?"}
CHATS = [
    [
        QUESTION,
        {"role": "assistant", "content": "My name is InternLM2! A helpful AI assistant. What can I do for you?"},
    ],
    [QUESTION, {"role": "assistant", "content": "I have no idea."}],
    [{"role": "system", "content": "Be rude."}, QUESTION, {"role": "assistant", "content": "<|im_end|>你好"}],
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes: dict[str, Any] = {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 92527}
    return make_directory(tmp_path_factory.mktemp("reward") / "internlm2-reward", **changes)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    made = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(made) is InternLM2ForRewardModel and not code_ran(directory)
    return made


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "slow"])
def tokenizer(request: pytest.FixtureRequest, directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory, use_fast=request.param)


def test_the_model_cards_snippet(model: Any, tokenizer: Any, directory: Path) -> None:
    scores = model.get_scores(tokenizer, CHATS)
    assert len(set(scores)) == 3 and all(type(score) is float for score in scores)
    for chat, score in zip(CHATS, scores, strict=True):
        assert model.get_score(tokenizer, chat) == pytest.approx(score, abs=2e-5)
    with hanlin.load(directory, dtype="float32", runner="torch", cache_bytes=1 << 20) as llm:
        assert llm.reward(CHATS) == pytest.approx(scores, abs=2e-5)
    assert model.compare(tokenizer, CHATS[0], CHATS[1]) is (scores[0] > scores[1])
    both = model.compare(tokenizer, CHATS[0], CHATS[1], return_logits=True)
    assert both == pytest.approx(tuple(scores[:2]), abs=2e-5)
    assert model.rank(tokenizer, CHATS) == ranks(scores)
    assert model.rank(tokenizer, CHATS, return_logits=True) == scores


def test_scores_are_those_of_the_template_and_the_reward_token(model: Any, tokenizer: Any) -> None:
    """One begin token, which the template writes; the value at the reward token, at the end of the row."""
    for chat in CHATS[:2]:
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert ids[:2] == [1, 92543]
        with torch.no_grad():
            body = model.model(torch.tensor([[*ids, 92527]])).last_hidden_state[0, -1]
            score = body @ model.v_head.weight[0]
        assert model.get_score(tokenizer, chat) == pytest.approx(float(score), abs=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(model: Any, directory: Path, side: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side=side)
    alone = [model.get_score(tokenizer, chat) for chat in CHATS]
    assert model.get_scores(tokenizer, CHATS) == pytest.approx(alone, abs=2e-5)


def test_forward(model: Any) -> None:
    ids = torch.tensor([[1, 7, 92527], [1, 92527, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    output = model.requires_grad_(False)(ids, attention_mask=mask)
    assert output.logits.shape == (2, 1) and output.logits.dtype == torch.float32
    assert float(output.logits[1]) == pytest.approx(float(model(ids[1:, :2]).logits), abs=1e-5)
    assert torch.equal(model(ids, attention_mask=mask, return_dict=False)[0], output.logits)
    with pytest.raises(RequestError, match="last token of input_ids must be the reward token"):
        model(ids)


def test_released_signatures() -> None:
    for name, expected in {
        "get_score": "(self, tokenizer, conversation, **kwargs)",
        "get_scores": "(self, tokenizer, conversations, **kwargs)",
        "compare": "(self, tokenizer, conversation1, conversation2, return_logits=False, **kwargs)",
        "rank": "(self, tokenizer, conversations, return_logits=False, **kwargs)",
    }.items():
        signature = inspect.signature(getattr(InternLM2ForRewardModel, name))
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(plain)) == expected


def test_saved_and_loaded(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(again) is InternLM2ForRewardModel and again.reward_token_id == 92527
    assert again.get_score(tokenizer, CHATS[0]) == model.get_score(tokenizer, CHATS[0])
    with hanlin.load(tmp_path, dtype="float32", runner="torch", cache_bytes=1 << 20) as llm:
        assert llm.get_score(CHATS[0]) == pytest.approx(model.get_score(tokenizer, CHATS[0]), abs=2e-5)


def test_a_reward_model_does_not_write(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward model, it writes nothing; load it with AutoModel\.from_pretrained"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_auto_model_follows_the_named_class(tmp_path: Path) -> None:
    """The card's best-of-n demo loads a chat model by `AutoModel` and lets it generate."""
    path = make_directory(tmp_path / "m", tokenizer="none")
    assert type(transformers.AutoModel.from_pretrained(path)) is InternLM2ForCausalLM
    path = make_directory(tmp_path / "n", tokenizer="none", architectures=["InternLM2Model"])
    assert type(transformers.AutoModel.from_pretrained(path)) is InternLM2Model
