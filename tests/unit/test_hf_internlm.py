"""InternLM 1 and InternLM3 as Transformers classes: tokenizers, `chat`, `stream_chat`, `generate`, GPUs or none."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tokenizer_samples import INTERNLM, INTERNLM2

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

import hanlin  # noqa: E402 - after the check above
import hanlin.hf as hf  # noqa: E402
from hanlin.chat.internlm2 import META_INSTRUCTION  # noqa: E402
from hanlin.errors import ConfigError  # noqa: E402
from hanlin.hf.tokenizer import to_hanlin  # noqa: E402
from hanlin.models.registry import build, read_config  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
V1 = {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "vocab_size": 103168, "bias": True, **SIZES}
# Nobody may hand on the tokenizer of InternLM3: another of the same kind, under the released names, stands for it.
V3 = {
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "vocab_size": 92544,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **SIZES,
}
TEXT = "What's 你好?  two\n\n spaces 1234567 🎉"
HISTORY = [("你好", "你好，有什么我可以帮助你的吗？")]


def write(path: Path, values: dict[str, Any], vocabulary: Path, named: str) -> Path:
    path.mkdir(parents=True)
    names = {"AutoConfig": "c.C", "AutoModel": "m.M", "AutoModelForCausalLM": "m.M"}
    (path / "config.json").write_text(json.dumps({**values, "auto_map": names}))
    (path / "m.py").write_text("raise RuntimeError('code of the directory ran')")
    shutil.copyfile(vocabulary, path / "tokenizer.model")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    auto_map = {"AutoTokenizer": ["t.T", None]}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named, "auto_map": auto_map, **tokens}))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in build(read_config(values), dtype=torch.float32).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = (1 + 0.1 * noise if "norm" in name else 0.3 * noise).bfloat16()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("v1") / "internlm-chat-7b", V1, INTERNLM, "InternLMTokenizer")


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("v3") / "internlm3-8b-instruct", V3, INTERNLM2, "InternLM3Tokenizer")


def loaded(path: Path, auto: str = "AutoModelForCausalLM") -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    return tokenizer, model.eval()


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM"])
def test_auto_classes(v1: Path, v3: Path, auto: str) -> None:
    for path, classes in (
        (v1, (hf.InternLMTokenizer, hf.InternLMForCausalLM)),
        (v3, (hf.InternLM3Tokenizer, hf.InternLM3ForCausalLM)),
    ):
        assert tuple(map(type, loaded(path, auto))) == classes


def test_internlm_tokens(v1: Path) -> None:
    tokenizer, _ = loaded(v1)
    assert tokenizer("你好")["input_ids"] == [1, 76379]
    assert tokenizer.convert_tokens_to_ids(["<eoh>", "<eoa>"]) == [103027, 103028]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == to_hanlin(tokenizer).encode(TEXT) and tokenizer.decode(ids) == TEXT


def test_internlm_prompts(v1: Path, tmp_path: Path) -> None:
    """The late format by default, the early one for the checkpoint that has it; ids as recorded."""
    tokenizer, model = loaded(v1)
    ids = model.build_inputs(tokenizer, "晚上睡不着应该怎么办", HISTORY, "Hi.")["input_ids"][0].tolist()
    late = f"<s><|System|>:Hi.\n<|User|>:你好\n<|Bot|>:{HISTORY[0][1]}<eoa>\n<|User|>:晚上睡不着应该怎么办\n<|Bot|>:"
    assert ids == tokenizer(late, add_special_tokens=False)["input_ids"]
    model.early_format = True
    ids = model.build_inputs(tokenizer, "晚上睡不着应该怎么办", HISTORY, META_INSTRUCTION)["input_ids"][0].tolist()
    assert ids == [
        *(1, 333, 352, 1621, 352, 27232, 76379, 103027, 364, 333, 352, 23845, 352, 27232, 76379, 98899, 68408, 73159),
        *(67566, 67513, 61056, 99050, 103028, 364, 333, 352, 1621, 352, 27232, 67891, 76046, 67551, 68573, 103027),
        *(364, 333, 352, 23845, 352, 27232),
    ]
    renamed = tmp_path / "internlm-chat-7b-v1_1"
    shutil.copytree(v1, renamed)
    assert loaded(renamed)[1].early_format
    for path, name in ((v1, "internlm"), (renamed, "internlm-v1_1")):
        with hanlin.load(path, dtype="float32", runner="torch", cache_bytes=1 << 20) as llm:
            assert llm.chat_format.name == name


def test_a_query_cannot_end_its_turn(v1: Path) -> None:
    tokenizer, model = loaded(v1)
    ids = model.build_inputs(tokenizer, "a<eoh>\n<eoa>b", [])["input_ids"][0].tolist()
    assert not {103027, 103028} & set(ids)


def test_chat_stream_chat_and_generate(v1: Path, v3: Path) -> None:
    for path in (v1, v3):
        tokenizer, model = loaded(path)
        response, history = model.chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=6)
        assert history == [("你好", response)] and response
        steps = list(model.stream_chat(tokenizer, "你好", history=[], do_sample=False, max_new_tokens=6))
        assert steps[0] == ("", [("你好", "")]) and steps[-1] == (response, history)
        assert model.generate(**tokenizer("A", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape == (1, 5)
        with hanlin.load(path, dtype="float32", runner="torch", cache_bytes=1 << 20) as llm:
            assert llm.chat("你好", temperature=0, max_tokens=6).text == response


def test_signatures_are_those_of_the_cards() -> None:
    for kind in (hf.InternLMForCausalLM, hf.InternLM3ForCausalLM):
        assert inspect.signature(kind.chat) == inspect.signature(hf.InternLM2ForCausalLM.chat)
        assert inspect.signature(kind.stream_chat) == inspect.signature(hf.InternLM2ForCausalLM.stream_chat)


def test_saved_and_loaded(v1: Path, v3: Path, tmp_path: Path) -> None:
    for path in (v1, v3):
        tokenizer, model = loaded(path)
        copy = tmp_path / path.name
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
        assert (copy / "tokenizer.model").read_bytes() == (path / "tokenizer.model").read_bytes()
        again, same = loaded(copy)
        assert type(same) is type(model) and again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(same.state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora_and_training(v1: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra 'tune' (peft), which is not installed")
    _, model = loaded(v1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"])
    model = peft.get_peft_model(model, config)
    ids = torch.tensor([[1, 5, 9, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(grads) == 4 and all(g is not None and bool(g.any()) for g in grads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(v1: Path) -> None:
    with pytest.warns(UserWarning, match=r"no GPU here; the model is loaded on the CPU in float32\. hanlin\.load\(\)"):
        model = hf.load_model_on_gpus(v1, num_gpus=2)
    assert type(model) is hf.InternLMForCausalLM and not model.training
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert hf.load_model_on_gpus(v1, num_gpus=1, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="num_gpus must be a whole number >= 1, not 0"):
        hf.load_model_on_gpus(v1, num_gpus=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus(v1: Path) -> None:
    model = hf.load_model_on_gpus(v1, num_gpus=1)
    assert (model.device.type, model.dtype) == ("cuda", torch.float16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(v1)
    assert model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=4)[0]
    with pytest.warns(UserWarning, match="GPUs asked for"):
        hf.load_model_on_gpus(v1, num_gpus=64)
