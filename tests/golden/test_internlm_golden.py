"""InternLM 1 and 3: the recorded block through the real loading path, Transformers as oracle, and their HF classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hanlin import assembly
from hanlin.checkpoints.load import load_model
from hanlin.engine.sequence import Sequence
from hanlin.kernels.native import available
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.options import EngineConfig
from hanlin.replies import ScoreSink
from hanlin.types import SamplingParams

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

import hanlin.hf as hf  # noqa: E402 - after the check above

NAMES = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def recorded(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], torch.Tensor]:
    """A directory with the released names, ids (5,), and what the official code gave for them (5, 32)."""
    data = (shared / "assets/golden/internlm_model.data").read_bytes()
    place = 0

    def take(*shape: int, dtype: str = "<f4") -> Any:
        nonlocal place
        out = np.frombuffer(data, dtype, int(np.prod(shape)), place).reshape(shape)
        place += out.nbytes
        return out.astype(np.float32) if dtype == "<f4" else out

    layer = "model.layers.0."
    weights = {"model.embed_tokens.weight": take(5, 32), f"{layer}input_layernorm.weight": take(32)}
    qkv, bias = take(96, 32), take(96)
    for index, name in enumerate(NAMES):
        weights[f"{layer}self_attn.{name}.weight"] = qkv[32 * index : 32 * index + 32]
        weights[f"{layer}self_attn.{name}.bias"] = bias[32 * index : 32 * index + 32]
    weights |= {
        f"{layer}self_attn.o_proj.weight": take(32, 32),
        f"{layer}self_attn.o_proj.bias": take(32),
        f"{layer}post_attention_layernorm.weight": take(32),
        f"{layer}mlp.gate_proj.weight": take(96, 32),
        f"{layer}mlp.up_proj.weight": take(96, 32),
        f"{layer}mlp.down_proj.weight": take(32, 96),
        "model.norm.weight": take(32),
        "lm_head.weight": np.zeros((5, 32), np.float32),
    }
    ids: list[int] = []
    outputs = []
    for count in (3, 1, 1):
        ids += take(count, dtype="<i4").tolist()
        outputs.append(take(count, 32))
    assert place == len(data) and ids == [0, 1, 2, 3, 4]
    path = tmp_path_factory.mktemp("internlm")
    config = {
        "architectures": ["InternLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
        "bias": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "model_type": "internlm",
        "num_attention_heads": 8,
        "num_hidden_layers": 1,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.33.2",
        "use_cache": True,
        "vocab_size": 5,
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path, ids, torch.from_numpy(np.concatenate(outputs))


def test_the_recorded_block(recorded: tuple[Path, list[int], torch.Tensor]) -> None:
    path, ids, want = recorded
    model = load_model(path, dtype=torch.float32, device=torch.device("cpu")).model
    with torch.no_grad():
        got = model(torch.tensor(ids), Positions(torch.arange(5)[None]), PackedAttend([5]))
    assert float((got - want).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    "runner", ["torch", pytest.param("native", marks=pytest.mark.skipif(not available(), reason="no native library"))]
)
def test_the_recorded_block_in_the_engine(recorded: tuple[Path, list[int], torch.Tensor], runner: str) -> None:
    path, ids, want = recorded
    settings = EngineConfig(dtype="float32", runner=runner, threads=1, cache_bytes=1 << 20, packed_cache=False)
    placement = assembly.place(settings)
    loaded = assembly.load(path, placement, None)
    engine = assembly.engine(loaded, settings, placement, loaded.config.rope)
    got = []
    for end in (3, 4, 5):
        sink = ScoreSink(lambda _: None)
        sequence = Sequence(prompt=tuple(ids[:end]), sampling=SamplingParams(max_tokens=1), sink=sink, pool="last")
        engine.add(sequence)
        while not engine.idle:
            engine.step()
        assert sequence.pooled is not None
        got.append(sequence.pooled)
    engine.runner.close()
    assert np.abs(np.stack(got) - want[2:].numpy()).max() <= 1e-5


def test_the_recorded_block_in_transformers(recorded: tuple[Path, list[int], torch.Tensor]) -> None:
    """Step by step over a cache, as the record was made."""
    path, ids, want = recorded
    model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model) is hf.InternLMForCausalLM
    cache, got = transformers.DynamicCache(), []
    with torch.no_grad():
        for step in (ids[:3], ids[3:4], ids[4:]):
            got.append(model.model(torch.tensor([step]), past_key_values=cache).last_hidden_state[0])
    assert float((torch.cat(got) - want).abs().max()) <= 1e-5


INTERNLM3 = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_theta": 50_000_000,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 6.0}])
def test_internlm3_is_a_llama(tmp_path: Path, bias: bool, scaling: dict[str, Any] | None) -> None:
    """Transformers has no modules of its own for it either: newer releases run it as Llama, with both biases alike."""
    config = {"model_type": "internlm3", **INTERNLM3, "rope_scaling": scaling, "qkv_bias": bias, "bias": bias}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["InternLM3ForCausalLM"], **config}))
    common = {k: v for k, v in INTERNLM3.items() if k != "rope_theta"}
    rope = {"rope_theta": 5e7, **(scaling or {"rope_type": "default"})}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**common, attention_bias=bias, mlp_bias=bias, rope_parameters=rope)
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise / 8)
        save_file(theirs.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        module = load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu")).model
        assert type(ours) is hf.InternLM3ForCausalLM
        for length in (50, 90):  # below and beyond the trained length, where dynamic scaling begins
            ids = torch.randint(0, 101, (length,), generator=generator)
            want = theirs(ids[None], use_cache=False).logits[0]
            assert float((ours(ids[None], use_cache=False).logits[0] - want).abs().max()) <= 1e-5
            angles = torch.full((length,), module.model.rope.config.dynamic_length(length))
            places = Positions(torch.arange(length)[None], angles if angles.any() else None)
            got = module.head(module(ids, places, PackedAttend([length])))
            assert float((got - want).abs().max()) <= 1e-5
            assert float(want.abs().max()) > 1


def test_internlm3_biases_apart() -> None:
    """`qkv_bias` is that of q, k and v alone, as in the released code."""
    made = hf.InternLM3ForCausalLM(hf.InternLM3Config(**{**INTERNLM3, "qkv_bias": True}))
    biased = {name.split(".")[-2] for name, _ in made.named_parameters() if name.endswith("bias")}
    assert biased == set(NAMES)


def test_released_defaults() -> None:
    one, three = hf.InternLMConfig(), hf.InternLM3Config()
    assert (one.vocab_size, one.hidden_size, one.intermediate_size, one.rms_norm_eps) == (103168, 4096, 11008, 1e-6)
    assert (one.bias, one.rope_theta, one.pad_token_id, one.bos_token_id, one.eos_token_id) == (True, 10000.0, 0, 1, 2)
    assert (three.vocab_size, three.num_key_value_heads, three.head_dim, three.rope_theta) == (128512, 2, 128, 5e7)
    read = hf.InternLMConfig(rotary={"base": 10000, "type": "dynamic"}, max_position_embeddings=4096).to_hanlin()
    assert (read.rope.kind, read.rope.factor, read.qkv_bias, read.out_bias) == ("dynamic", 1.0, True, True)
    again = hf.InternLM3Config(**json.loads(three.to_json_string()))
    assert again.to_hanlin() == three.to_hanlin()
