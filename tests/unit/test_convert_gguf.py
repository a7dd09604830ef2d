"""Models as GGUF files and back: the same bits where nothing is rounded, the same tokens, nothing left by a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatglm2_directory import as_glm, glm_config, tiktoken_file, tokenizer_model
from chatglm2_directory import config as chatglm2_config
from chatglm2_directory import weights as chatglm2_weights
from chatglm2_directory import write as write_chatglm2
from chatglm_directory import make_directory as chatglm_6b
from hanlin.chat.registry import chat_format_for
from hanlin.chat.templates import template_for
from hanlin.checkpoints import convert_gguf as module
from hanlin.checkpoints.base import TensorInfo
from hanlin.checkpoints.convert import convert
from hanlin.checkpoints.description import describe_gguf
from hanlin.checkpoints.gguf_keys import config_keys
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError, ConfigError, TokenizerError
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import build, read_config
from hanlin.tokenizers import from_gguf, load_tokenizer
from hanlin.tokenizers.gguf_files import gguf_to_files
from hanlin.tokenizers.to_gguf import gguf_keys
from hf_directory import make_directory, write_json


def to_gguf(source: Path, target: Path, outtype: str = "auto", **more: Any) -> Path:
    return convert(source, target, to="gguf", outtype=outtype, tokenizer=gguf_keys(load_tokenizer(source)), **more)


def back(source: Path, target: Path, to: str = "hf", **more: Any) -> Path:
    with open_source(source) as opened:
        files = gguf_to_files(opened.metadata)
    return convert(source, target, to=to, files=files, **more)


def weights(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(path: Path) -> Tensor:
    model: Any = load_model(path, dtype=torch.float32, device=torch.device("cpu")).model
    return model.head(model(torch.arange(3, 15), Positions(torch.arange(12)[None]), PackedAttend([12])))


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    if first.keys() != second.keys() or any(first[name].dtype != second[name].dtype for name in first):
        return False
    return all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first)


def llama_like(path: Path, **values: Any) -> Path:
    """A directory of a family that is a Llama, with the small SentencePiece tokenizer."""
    make_directory(path, tokenizer="small")
    (path / "model.safetensors").unlink()
    common = json.loads((path / "config.json").read_text())
    names = "hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps"
    kept = {key: common[key] for key in (*names.split(), "vocab_size", "max_position_embeddings")}
    if values["model_type"] == "internlm":
        kept["num_key_value_heads"] = kept["num_attention_heads"]
    values = {**kept, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0, **values}
    write_json(path / "config.json", values)
    model = build(read_config(values), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in model.named_parameters()}
    save_file({name: value.half() for name, value in tensors.items()}, path / "model.safetensors")
    return path


def chatglm(path: Path, kind: str, **changes: Any) -> Path:
    """ChatGLM2, ChatGLM3 or GLM-4, with a tokenizer as released."""
    if kind == "glm4":
        values = chatglm2_config(padded_vocab_size=320, rope_ratio=500, _name_or_path="glm-4", **changes)
        files = {"tokenizer__model": tiktoken_file(), "tokenizer_config": {"tokenizer_class": "ChatGLM4Tokenizer"}}
    else:
        values = chatglm2_config(padded_vocab_size=400, _name_or_path=f"THUDM/{kind}-6b", **changes)
        files = {"tokenizer__model": tokenizer_model(), "tokenizer_config": {"tokenizer_class": "ChatGLMTokenizer"}}
    return write_chatglm2(path, values, chatglm2_weights(values), **files)


@pytest.mark.parametrize("outtype", ["auto", "bf16", "f32"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_internlm2_there_and_back_gives_the_same_bits(tmp_path: Path, kv_heads: int, outtype: str) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small", num_key_value_heads=kv_heads)
    to_gguf(first, tmp_path / "b.gguf", outtype)
    back(tmp_path / "b.gguf", tmp_path / "c", "internlm2")
    assert same_bits(weights(first), weights(tmp_path / "c"))
    assert torch.allclose(logits(first), logits(tmp_path / "b.gguf"), atol=1e-5)
    values, again = (json.loads((path / "config.json").read_text()) for path in (first, tmp_path / "c"))
    same = values.keys() - {"auto_map", "attn_implementation", "pretraining_tp", "rope_scaling"}
    same -= {"initializer_range", "pad_token_id", "transformers_version", "rope_theta"}
    assert {key: again[key] for key in same} == {key: values[key] for key in same}
    assert (again["rope_theta"], again["rope_scaling"]["factor"]) == (1e6, 2.0)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_internlm2_with_biases_is_a_llama_there_and_comes_back(tmp_path: Path, kv_heads: int) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small", num_key_value_heads=kv_heads, bias=True)
    to_gguf(first, tmp_path / "b.gguf")
    with open_source(tmp_path / "b.gguf") as source:
        assert source.metadata["general.architecture"] == "llama"
        assert {"blk.0.attn_q.bias", "blk.0.attn_output.bias"} <= source.infos.keys()
    assert torch.allclose(logits(first), logits(tmp_path / "b.gguf"), atol=1e-5)
    back(tmp_path / "b.gguf", tmp_path / "c", "internlm2")
    assert same_bits(weights(first), weights(tmp_path / "c"))
    assert torch.allclose(logits(first), logits(tmp_path / "c"), atol=1e-5)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["bias"] is True
    back(tmp_path / "b.gguf", tmp_path / "d")
    assert torch.allclose(logits(first), logits(tmp_path / "d"), atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 16},
        {"model_type": "internlm", "bias": True},
        {"model_type": "internlm3", "qkv_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "model_type": "llama",
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ],
    ids=["llama-biases", "llama-tied", "internlm", "internlm3", "qwen2", "linear", "llama3"],
)
def test_llamas_there_and_back_give_the_same_bits(tmp_path: Path, values: dict[str, Any]) -> None:
    first = llama_like(tmp_path / "a", **values)
    to_gguf(first, tmp_path / "b.gguf")
    assert torch.allclose(logits(first), logits(tmp_path / "b.gguf"), atol=1e-5)
    back(tmp_path / "b.gguf", tmp_path / "c")
    assert same_bits(weights(first), weights(tmp_path / "c"))
    assert torch.allclose(logits(first), logits(tmp_path / "c"), atol=1e-5)


@pytest.mark.parametrize("kind", ["chatglm2", "chatglm3", "glm4"])
def test_chatglm_there_and_back_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    first = chatglm(tmp_path / "a", kind)
    to_gguf(first, tmp_path / "b.gguf")
    assert torch.allclose(logits(first), logits(tmp_path / "b.gguf"), atol=1e-5)
    back(tmp_path / "b.gguf", tmp_path / "c")
    before = {name: value for name, value in weights(first).items() if "inv_freq" not in name}
    assert same_bits(before, weights(tmp_path / "c"))
    assert torch.allclose(logits(first), logits(tmp_path / "c"), atol=1e-5)
    one, two = load_tokenizer(first), load_tokenizer(tmp_path / "c")
    with open_source(tmp_path / "b.gguf") as source:
        three = from_gguf(source.metadata)
    text = "philosophy [gMASK]sop<|user|>\n 你好 hello\t<sop>"
    for special in (False, True):
        ids = one.encode(text, parse_special=special, add_special=True)
        assert ids == two.encode(text, parse_special=special, add_special=True)
        assert ids == three.encode(text, parse_special=special, add_special=True)
    assert type(one) is type(two) is type(three)
    assert (first / "tokenizer.model").read_bytes() == (tmp_path / "c" / "tokenizer.model").read_bytes()


def test_glm_in_transformers_format_is_the_same_file_with_q_k_and_v_apart(tmp_path: Path) -> None:
    first = chatglm(tmp_path / "a", "glm4")
    values = json.loads((first / "config.json").read_text())
    files = {"tokenizer__model": tiktoken_file(), "tokenizer_config": {"tokenizer_class": "ChatGLM4Tokenizer"}}
    second = write_chatglm2(tmp_path / "b", glm_config(values), as_glm(weights(first), values), **files)
    to_gguf(second, tmp_path / "c.gguf")
    back(tmp_path / "c.gguf", tmp_path / "d")
    before = {name: value for name, value in weights(first).items() if "inv_freq" not in name}
    assert same_bits(before, weights(tmp_path / "d"))
    assert torch.allclose(logits(first), logits(tmp_path / "c.gguf"), atol=1e-5)


def test_32k_divides_positions_there_too(tmp_path: Path) -> None:
    first = chatglm(tmp_path / "a", "chatglm2", rope_ratio=16)
    to_gguf(first, tmp_path / "b.gguf")
    with open_source(tmp_path / "b.gguf") as source:
        assert source.metadata["chatglm.rope.scaling.type"] == "linear"
        assert source.metadata["chatglm.rope.freq_base"] == 10000.0
    assert torch.allclose(logits(first), logits(tmp_path / "b.gguf"), atol=1e-5)


def test_the_gguf_package_reads_the_file(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    to_gguf(first, tmp_path / "b.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "internlm2"
    assert said["internlm2.attention.head_count_kv"] == 2
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.chat_template"].startswith("{{ bos_token }}")
    assert len(said["tokenizer.ggml.tokens"]) == len(set(said["tokenizer.ggml.tokens"])) == 1500
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    held = weights(first)
    embedding = held["model.tok_embeddings.weight"].float().numpy()
    read = gguf.quants.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    assert np.abs(read - embedding).max() <= np.abs(embedding).max() / 127
    norm = tensors["blk.1.ffn_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(norm.data, held["model.layers.1.ffn_norm.weight"].float().numpy())
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    # Neighbouring dimensions rotate together there, halves of a head here.
    fused = held["model.layers.0.attention.wqkv.weight"].float().numpy().reshape(2, 4, 8, 32)
    first_query = gguf.quants.dequantize(tensors["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.Q8_0)[:8]
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.abs(first_query - fused[0, 0][order]).max() < np.abs(fused).max() / 127


@pytest.mark.parametrize("outtype", ["f16", "q8_0", "q4_0", "q4_1"])
def test_rounded_kinds_are_near(tmp_path: Path, outtype: str) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small", hidden_size=64, intermediate_size=96)
    to_gguf(first, tmp_path / "b.gguf", outtype)
    with open_source(tmp_path / "b.gguf") as source:
        kinds = {name: info.dtype for name, info in source.infos.items()}
    assert kinds["blk.0.ffn_gate.weight"] == outtype.upper()
    assert kinds["output.weight"] == ("Q8_0" if outtype.startswith("q") else "F16")
    back(tmp_path / "b.gguf", tmp_path / "c")
    before, after = weights(first), weights(tmp_path / "c")
    for name, value in before.items():
        worst = float((value.float() - after[name].float()).abs().max() / value.float().abs().max())
        assert worst < {"f16": 1e-3, "q8_0": 5e-3}.get(outtype, 0.13), name
    assert after["output.weight"].dtype == (torch.bfloat16 if outtype == "f16" else torch.float32)
    assert torch.allclose(logits(tmp_path / "b.gguf"), logits(tmp_path / "c"), atol=1e-4)
    back(tmp_path / "b.gguf", tmp_path / "d", outtype="bf16")
    assert {value.dtype for value in weights(tmp_path / "d").values()} == {torch.bfloat16}


def test_rows_that_do_not_divide_into_blocks_stay_float16(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small", intermediate_size=72)
    to_gguf(first, tmp_path / "b.gguf", "q8_0")
    with open_source(tmp_path / "b.gguf") as source:
        assert source.infos["blk.0.ffn_down.weight"].dtype == "F16"
        assert source.infos["blk.0.ffn_up.weight"].dtype == "Q8_0"


def test_a_tied_internlm2_gets_the_head_that_llama_cpp_wants(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small", tie_word_embeddings=True)
    held = weights(first)
    held.pop("output.weight", None)
    save_file(held, first / "model.safetensors", metadata={"format": "pt"})
    to_gguf(first, tmp_path / "b.gguf")
    with open_source(tmp_path / "b.gguf") as source:
        assert torch.equal(source.load("output.weight"), source.load("token_embd.weight"))
    assert torch.allclose(logits(first), logits(tmp_path / "b.gguf"), atol=1e-5)
    back(tmp_path / "b.gguf", tmp_path / "c")
    assert same_bits(held, weights(tmp_path / "c"))


def test_the_tokenizer_and_its_roles_go_along(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a")
    to_gguf(first, tmp_path / "b.gguf")
    before = load_tokenizer(first)
    with open_source(tmp_path / "b.gguf") as source:
        after = from_gguf(source.metadata)
        assert source.metadata["tokenizer.ggml.eot_token_id"] == 92542
    back(tmp_path / "b.gguf", tmp_path / "c")
    again = load_tokenizer(tmp_path / "c")
    for text in ("Hello  你好\n\t\0 x🐉", "<|im_start|>user\nhi<|im_end|>"):
        for special in (False, True):
            ids = before.encode(text, add_special=True, parse_special=special)
            assert after.encode(text, add_special=True, parse_special=special) == ids
            assert again.encode(text, add_special=True, parse_special=special) == ids
            assert before.decode(ids) == after.decode(ids) == again.decode(ids)
    assert before.special_ids == after.special_ids == again.special_ids
    said = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": [2, 92542]}
    template = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())["chat_template"]
    assert template == json.loads((first / "tokenizer_config.json").read_text())["chat_template"]


def test_rows_are_cut_or_given_unused_tokens(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    held = weights(first)
    for name in ("model.tok_embeddings.weight", "output.weight"):
        held[name] = torch.cat([held[name], torch.zeros(6, 32, dtype=torch.bfloat16)])
    save_file(held, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)1500.*1506 rows.*--vocab-size 1500"):
        to_gguf(first, tmp_path / "b.gguf")
    to_gguf(first, tmp_path / "b.gguf", vocab_size=1500)
    to_gguf(first, tmp_path / "c.gguf", vocab_size=1506)
    for name, rows in (("b", 1500), ("c", 1506)):
        with open_source(tmp_path / f"{name}.gguf") as source:
            assert source.infos["token_embd.weight"].shape[0] == rows
            assert len(source.metadata["tokenizer.ggml.tokens"]) == rows
    with open_source(tmp_path / "c.gguf") as source:
        assert from_gguf(source.metadata).decode([1505, 1504]) == ""
    with pytest.raises(ConfigError, match="have none"):
        to_gguf(first, tmp_path / "d.gguf", vocab_size=1400)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.gguf", "c.gguf"]


def test_what_gguf_cannot_say_is_refused_at_once(tmp_path: Path) -> None:
    config = read_config(json.loads((llama_like(tmp_path / "a", model_type="qwen2") / "config.json").read_text()))
    with pytest.raises(ConfigError, match=r"(?s)behind the attention.*in the MLP"):
        config_keys(replace(config, out_bias=True, mlp_bias=True), name="x", path=tmp_path)
    first = chatglm_6b(tmp_path / "glm")
    with pytest.raises(ConfigError, match="no architecture for ChatGLM-6B"):
        convert(first, tmp_path / "b.gguf", to="gguf", tokenizer={})
    with pytest.raises(TokenizerError, match="ChatGLM-6B can't be a GGUF file"):
        gguf_keys(load_tokenizer(first))
    assert not (tmp_path / "b.gguf").exists()
    to_gguf(make_directory(tmp_path / "c", tokenizer="small"), tmp_path / "b.gguf")
    with pytest.raises(ConfigError, match="GGUF file already"):
        convert(tmp_path / "b.gguf", tmp_path / "d.gguf", to="gguf", tokenizer={})
    with pytest.raises(ConfigError, match="q4_0 is for GGUF files"):
        back(tmp_path / "b.gguf", tmp_path / "d", outtype="q4_0")


def test_values_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    held = weights(first)
    held["model.layers.0.feed_forward.w1.weight"][0, 0] = 1e6
    save_file(held, first / "model.safetensors", metadata={"format": "pt"})
    for outtype in ("f16", "q8_0"):
        with pytest.raises(CheckpointError, match=r"(?s)'blk.0.ffn_gate.weight'.*--outtype bf16"):
            to_gguf(first, tmp_path / "b.gguf", outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("outtype", ["bf16", "q8_0"])
def test_what_reads_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outtype: str) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    right = module._stored

    def flipped(part: Any, value: Tensor, path: Path) -> Any:
        return right(part, -value if part.name == "blk.1.attn_k.weight" else value, path)

    monkeypatch.setattr(module, "_stored", flipped)
    with pytest.raises(CheckpointError, match=r"'blk.1.attn_k.weight' does not read as it was written"):
        to_gguf(first, tmp_path / "b.gguf", outtype)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_verb(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    hanlin = [sys.executable, "-m", "hanlin", "convert"]
    there = [*hanlin, str(first), str(tmp_path / "b.gguf"), "--to", "gguf", "--outtype", "f32"]
    done = subprocess.run(there, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "b.gguf")), done.stderr
    again = [*hanlin, str(tmp_path / "b.gguf"), str(tmp_path / "c"), "--to", "internlm2"]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "c")), done.stderr
    assert same_bits(weights(first), weights(tmp_path / "c"))
    text = "Hello 你好\n  two"
    assert load_tokenizer(tmp_path / "c").encode(text) == load_tokenizer(first).encode(text)


@pytest.mark.parametrize("kind", ["chatglm3", "glm4"])
def test_a_first_release_gets_a_template_that_says_the_same(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(chatglm(tmp_path / "a", kind))
    built_in = chat_format_for(tokenizer, model_type="chatglm2")
    template = template_for(built_in)
    assert template is not None
    assert type(chat_format_for(tokenizer, model_type="chatglm2", template=template)) is type(built_in)
    plain = load_tokenizer(make_directory(tmp_path / "b"))
    assert template_for(chat_format_for(plain, model_type="internlm2")) is None


class Claimed:
    """A source that says what it is told to."""

    path = Path("m.gguf")

    def __init__(self, infos: Any, **keys: Any) -> None:
        self.infos = infos
        self.metadata = {"general.architecture": "chatglm", **keys}


@given(
    keys=st.dictionaries(
        st.sampled_from(
            [
                *(f"chatglm.{key}" for key in ("embedding_length", "attention.head_count", "attention.key_length")),
                *(f"chatglm.rope.{key}" for key in ("freq_base", "dimension_count", "scaling.type", "scaling.factor")),
                *("chatglm.attention.layer_norm_rms_epsilon", "chatglm.block_count", "tokenizer.ggml.eos_token_id"),
            ]
        ),
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_whatever_a_file_claims_is_read_or_refused(keys: dict[str, Any]) -> None:
    shape = TensorInfo("token_embd.weight", (8, 4), "F32", 128, Path("m.gguf"))
    source: Any = Claimed({"token_embd.weight": shape, "output.weight": shape}, **keys)
    with suppress(ConfigError):
        read_config(describe_gguf(source).values)
