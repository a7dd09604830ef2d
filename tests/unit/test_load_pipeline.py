"""The loading pipeline: released names, GGUF order, tying, and every mismatch at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.names import unpermute
from hanlin.checkpoints.safetensors_writer import save_safetensors
from hanlin.errors import CheckpointError, ConfigError
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import read_config

CONFIGS: dict[str, dict[str, Any]] = {
    "internlm2": {"model_type": "internlm2", "num_key_value_heads": 2, "bias": True, "rms_norm_eps": 1e-5},
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write(path: Path, model: torch.nn.Module, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_safetensors(path, model.named_parameters(), metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({**SIZES, **config}))
    return path


def load(path: Path) -> Any:
    return load_model(path, dtype=torch.float32, device=torch.device("cpu")).model


def logits(model: Any, count: int = 9) -> torch.Tensor:
    ids = torch.arange(count)
    return model.head(model(ids, Positions(ids[None]), PackedAttend([count])))


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_and_loaded_is_the_same(tiny: Any, tmp_path: Path, kind: str) -> None:
    model = tiny(kind, **SIZES, **CONFIGS[kind])
    again = load(write(tmp_path / "m", model, CONFIGS[kind]))
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    assert torch.equal(logits(model), logits(again))


def gguf_rows(rows: torch.Tensor, heads: int) -> np.ndarray[Any, Any]:
    """Rotary halves of each head into GGUF's pairs."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).numpy()


def write_gguf(path: Path, model: Any, arch: str) -> Path:
    gguf = pytest.importorskip("gguf")
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope.base)
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    tensors = dict(model.named_parameters())
    table = {
        "model.embed_tokens": "token_embd", "model.tok_embeddings": "token_embd", "model.norm": "output_norm",
        "lm_head": "output", "output": "output", "input_layernorm": "attn_norm", "attention_norm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "ffn_norm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "attention.wo": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    }  # fmt: skip
    for name, value in tensors.items():
        stem, kind = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if stem == "attention.wqkv":
            g, r, k = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
            parts = value.data.reshape(g, r + 2, k, *value.shape[1:]).split((r, 1, 1), 1)
            for letter, part, heads in zip("qkv", parts, (c.num_heads, g, 0), strict=True):
                rows = part.flatten(0, 2)
                out = gguf_rows(rows, heads) if heads else rows.numpy()
                writer.add_tensor(f"{prefix}attn_{letter}.{kind}", np.ascontiguousarray(out))
            continue
        heads = {"self_attn.q_proj": c.num_heads, "self_attn.k_proj": c.num_kv_heads}.get(stem, 0)
        rows = gguf_rows(value.data, heads) if heads else value.data.numpy()
        writer.add_tensor(f"{prefix}{table[stem]}.{kind}", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", CONFIGS)
def test_gguf_gives_the_same_logits(tiny: Any, tmp_path: Path, kind: str) -> None:
    model = tiny(kind, **SIZES, **CONFIGS[kind])
    again = load(write_gguf(tmp_path / "m.gguf", model, kind))
    assert torch.allclose(logits(model), logits(again), atol=1e-6)


def test_unpermute_inverts_the_conversion() -> None:
    rows = torch.arange(24.0)[:, None]
    assert torch.equal(unpermute(torch.from_numpy(gguf_rows(rows, 3)), 3), rows)


def test_all_mismatches_are_named_at_once(tiny: Any, tmp_path: Path) -> None:
    model = tiny("internlm2", **SIZES, **CONFIGS["internlm2"])
    path = write(tmp_path / "m", model, {**CONFIGS["internlm2"], "vocab_size": 66, "bias": False})
    with pytest.raises(CheckpointError) as caught:
        load(path)
    text = str(caught.value)
    assert "'model.tok_embeddings.weight' has shape (64, 32), the configuration needs (66, 32)" in text
    assert "'output.weight' has shape (64, 32)" in text
    assert text.count("unexpected tensor") == 4 and "attention.wqkv.bias" in text


def test_missing_tensors_are_named_at_once(tiny: Any, tmp_path: Path) -> None:
    model = tiny("internlm2", **SIZES, **CONFIGS["internlm2"])
    path = tmp_path / "m"
    path.mkdir()
    kept = [(n, p) for n, p in model.named_parameters() if "wo" not in n]
    save_safetensors(path, kept)
    (path / "config.json").write_text(json.dumps({**SIZES, **CONFIGS["internlm2"]}))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value).count("missing tensor") == 4  # weight and bias of two layers


def test_bait_is_not_touched(tiny: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m", tiny("internlm2", **SIZES, **CONFIGS["internlm2"]), CONFIGS["internlm2"])
    marker = tmp_path / "executed"
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("modeling_internlm2", "configuration_internlm2", "tokenization_internlm2"):
        (path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt5"}, "model_type 'gpt5' is not supported"),
        ({"hidden_act": "gelu"}, "'hidden_act' = 'gelu' is not supported"),
        ({"clip_qkv": 3}, "unknown key 'clip_qkv' = 3 could change numbers"),
        ({"num_attention_heads": "many"}, "'num_attention_heads' must be a whole number"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "unknown type 'spiral'"),
        ({"rope_scaling": {"type": "dynamic"}}, "dynamic needs 'factor'"),
        ({"rms_norm_eps": 0}, "norm_eps must be in (0, 1)"),
        ({"vocab_size": 2**40}, "'vocab_size' must be a whole number"),
    ],
)
def test_configurations_that_cannot_be_honoured(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config({**SIZES, **CONFIGS["internlm2"], **change})
    assert says in str(caught.value)


def test_several_wrong_keys_are_named_at_once() -> None:
    wrong = {"hidden_act": "gelu", "foo": 1, "rope_scaling": {"type": "linear"}}
    with pytest.raises(ConfigError) as caught:
        read_config({**SIZES, **CONFIGS["internlm2"], **wrong})
    assert all(word in str(caught.value) for word in ("hidden_act", "'foo'", "linear needs 'factor'"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "version https://git-lfs.github.com/spec/v1\n", '{"a":' * 5000])
def test_broken_config_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="'fp8'"):
        load(tmp_path)
