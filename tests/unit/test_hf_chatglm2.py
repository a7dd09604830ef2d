"""ChatGLM2, ChatGLM3 and GLM-4 through Transformers: what the model cards type, against Hanlin's own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import hanlin
import hanlin.hf
from chatglm2_directory import config, tiktoken_file, tokenizer_model, weights, write
from hanlin.hf import ChatGLM4Tokenizer, ChatGLMConfig, ChatGLMForConditionalGeneration
from hanlin.hf.chatglm2 import ChatGLMForConditionalGeneration as Later
from hanlin.hf.chatglm2_tokenizer import ChatGLMTokenizer
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import build, read_config

KINDS = ("chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")


def directory(path: Path, kind: str, **changes: Any) -> Path:
    four = kind.startswith("glm")
    values = config(_name_or_path=f"THUDM/{kind}", padded_vocab_size=500, **changes)
    if four:
        values |= {"eos_token_id": [300, 301], "pad_token_id": 300, "rope_ratio": 500}
    cls = "ChatGLM4Tokenizer" if four else "ChatGLMTokenizer"
    said = {"tokenizer_class": cls, "auto_map": {"AutoTokenizer": ["tokenization_chatglm.X", None]}}
    tokenizer = tiktoken_file() if four else tokenizer_model()
    write(path / kind, values, weights(values), tokenizer_config=said, tokenizer__model=tokenizer)
    (path / kind / "modeling_chatglm.py").write_text("raise SystemExit('foreign code was run')")
    return path / kind


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: Any) -> dict[str, Path]:
    return {kind: directory(tmp_path_factory.mktemp("models"), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(paths: dict[str, Path]) -> dict[str, tuple[Any, Any]]:
    return {
        kind: (
            AutoTokenizer.from_pretrained(path, trust_remote_code=True),
            AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval(),
        )
        for kind, path in paths.items()
    }


def plain(path: Path, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of Hanlin's own module with the same weights."""
    values = json.loads((path / "config.json").read_text())
    module = build(read_config(values), dtype=torch.float32).to_empty(device="cpu")
    module.load_state_dict({k: v for k, v in weights(values).items() if "inv_freq" not in k})
    hidden = module(torch.tensor(ids), Positions(torch.arange(len(ids))[None]), PackedAttend([len(ids)]))
    return module.head(hidden)  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("kind", KINDS)
def test_the_classes_and_the_numbers(
    kind: str, paths: dict[str, Path], loaded: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    path, (tokenizer, model) = paths[kind], loaded[kind]
    assert type(model) is Later and type(model).__name__ == "ChatGLMForConditionalGeneration"
    assert type(tokenizer) is (ChatGLM4Tokenizer if kind.startswith("glm") else ChatGLMTokenizer)
    assert type(AutoConfig.from_pretrained(path, trust_remote_code=True)) is type(model.config)
    assert type(ChatGLMConfig.from_pretrained(path)) is type(model.config)
    assert type(ChatGLMForConditionalGeneration.from_pretrained(path)) is Later
    batch = tokenizer(["the cat", "a"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    for row, text in enumerate(("the cat", "a")):
        ids = tokenizer(text)["input_ids"]
        assert ids[:2] == tokenizer.get_prefix_tokens()
        assert (logits[row, -len(ids) :] - plain(path, ids)).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {k for k in weights(config()) if "inv_freq" not in k} == set(again.state_dict())
    kept = AutoTokenizer.from_pretrained(tmp_path)
    assert type(kept) is type(tokenizer)
    text = "philosophy <|user|> sop the cat"
    assert kept(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert kept.decode(kept(text)["input_ids"], skip_special_tokens=True) == text
    assert (kept.get_vocab().get("<|user|>") is None) == (kind == "chatglm2-6b")


@pytest.mark.parametrize("kind", KINDS)
def test_chat_equals_the_engine(kind: str, paths: dict[str, Path], loaded: dict[str, tuple[Any, Any]]) -> None:
    tokenizer, model = loaded[kind]
    response, history = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=6)
    with hanlin.load(str(paths[kind]), runner="torch", dtype="float32") as llm:
        first = llm.chat([{"role": "user", "content": "你好"}], temperature=0, max_tokens=6)
        assert response == first.text
        streamed = list(model.stream_chat(tokenizer, "the cat", history, do_sample=False, max_new_tokens=6))
        turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": response}]
        second = llm.chat([*turns, {"role": "user", "content": "the cat"}], temperature=0, max_tokens=6)
        assert streamed[-1][0] == second.text
    if kind == "chatglm2-6b":
        assert history == [("你好", response)]
        assert streamed[-1][1] == [("你好", response), ("the cat", second.text)]
        assert model.chat(tokenizer, "你好", [], 40, do_sample=False)[0].startswith(response)
        assert tokenizer.build_prompt("a", [("b", "c")]) == "[Round 1]\n\n问：b\n\n答：c\n\n[Round 2]\n\n问：a\n\n答："
        return
    assert history == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "metadata": "", "content": response},
    ]
    assert [turn["content"] for turn in streamed[-1][1]] == ["你好", response, "the cat", second.text]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_on_and_changes_nothing(kind: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    tokenizer, model = loaded[kind]
    options = {"do_sample": False, "max_new_tokens": 5}
    history, cache = [], None
    for query in ("a", "the cat", "你好"):
        want, _ = model.chat(tokenizer, query, history, **options)
        options_here = {**options, "past_key_values": cache, "return_past_key_values": True}
        *_, (response, after, cache) = model.stream_chat(tokenizer, query, history, **options_here)
        assert response == want
        assert cache.get_seq_length() == len(cache.hanlin_ids)
        history = after


CALLS = {
    "chatglm3-6b": ('get_weather\n```python\ntool_call(city="b")\n```', "get_weather\n```python\ntool_call(city=open("),
    "glm-4-9b-chat": ('get_weather\n{"city": "b"}', 'get_weather\n{"city":'),
}


@pytest.mark.parametrize("kind", CALLS)
def test_tools_of_the_cards(kind: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    tokenizer, model = loaded[kind]
    good, bad = CALLS[kind]
    tools = [{"name": "get_weather", "description": "w", "parameters": {"type": "object", "properties": {}}}]
    system = {"role": "system", "content": "the cat", "tools": tools}
    asked = [system, {"role": "user", "content": "a"}]
    response, history = model.process_response(f"\n好<|assistant|>{good}", asked)
    assert response == {"name": "get_weather", "parameters": {"city": "b"}}
    name, _, content = good.partition("\n")
    assert history[2:] == [
        {"role": "assistant", "metadata": "", "content": "好"},
        {"role": "assistant", "metadata": name, "content": content},
    ]
    assert model.process_response(bad, asked)[0] == {"name": "get_weather", "content": bad.partition("\n")[2]}
    assert model.process_response(good, asked[1:])[0] == {"name": "get_weather", "content": content}
    inputs = tokenizer.build_chat_input("1", history, role="observation")["input_ids"][0].tolist()
    text = tokenizer.decode(inputs).replace("|>\n ", "|>\n").replace("weather\n ", "weather\n")
    assert text.endswith(f"<|user|>\na<|assistant|>\n好<|assistant|>{good}<|observation|>\n1<|assistant|>")
    assert '"name": "get_weather"' in text
    answer, told = model.chat(tokenizer, "1", history, role="observation", do_sample=False, max_new_tokens=3)
    assert told[:4] == history and told[4] == {"role": "observation", "content": "1"} and len(told) == 6
    assert isinstance(answer, (str, dict))


def test_glm4s_card(loaded: dict[str, tuple[Any, Any]]) -> None:
    tokenizer, model = loaded["glm-4-9b-chat"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}],
        add_generation_prompt=True,
        tokenize=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        outputs = model.generate(**inputs, max_length=25, do_sample=True, top_k=1)
    outputs = outputs[:, inputs["input_ids"].shape[1] :]
    assert isinstance(tokenizer.decode(outputs[0], skip_special_tokens=True), str)
    many = tokenizer.apply_chat_template(
        [[{"role": "user", "content": "a"}], [{"role": "user", "content": "hello 你好"}]],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
    )
    assert many["attention_mask"][0].tolist()[0] == 0
    said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert said == "[gMASK]<sop><|user|>\na"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize(bits: int, paths: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(paths["chatglm3-6b"], dtype=torch.float32).quantize(bits).eval()
    layer = model.transformer.encoder.layers[0].self_attention.query_key_value
    assert layer.weight.dtype == torch.int8 and layer.bias is not None
    ids = torch.tensor([[264, 1, 5, 9]])
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.quantization_bit == bits
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


def test_lora_by_peft(loaded: dict[str, tuple[Any, Any]], paths: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModel.from_pretrained(paths["chatglm3-6b"], dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0))
    assert any("query_key_value.lora_A" in name for name, _ in tuned.named_parameters())
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_prefix_alone_learns(paths: dict[str, Path]) -> None:
    model = Later.from_pretrained(paths["chatglm3-6b"], pre_seq_len=4, dtype=torch.float32)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["transformer.prefix_encoder.embedding.weight"]
    ids = torch.tensor([[1, 5, 9]])
    before = model(ids).logits
    model.transformer.prefix_encoder.embedding.weight.data.normal_()
    assert not torch.allclose(model(ids).logits, before)
