"""Llama, Qwen2, InternLM 1 and every RoPE kind against Transformers' own classes and frequencies, float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions, Rope, RopeConfig
from hanlin.models.llama import LlamaForCausalLM, read_config

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn betas": {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn attention": {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
    "yarn mscale": {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn untruncated": {"rope_type": "yarn", **YARN, "truncate": False},
}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def compare(theirs: Any, values: dict[str, Any], length: int = 50) -> float:
    """Largest difference of logits over two packed sequences, each given alone to their model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise / 8)
        ours = LlamaForCausalLM(read_config(values)).eval()
        state = {k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}
        ours.load_state_dict(state, strict=True)
        lengths = [length, length // 4]
        prompts = [torch.randint(0, 101, (n,), generator=generator) for n in lengths]
        rope = ours.model.rope.config
        angles = torch.cat([torch.full((n,), rope.dynamic_length(n)) for n in lengths])
        positions = Positions(torch.cat([torch.arange(n) for n in lengths])[None], angles if angles.any() else None)
        got = ours.head(ours(torch.cat(prompts), positions, PackedAttend(lengths))).split(lengths)
        # The short one first: their dynamic scaling remembers the longest text it has seen.
        expected = [theirs.eval()(ids[None], use_cache=False).logits[0] for ids in reversed(prompts)][::-1]
    assert max(float(x.abs().max()) for x in expected) > 1
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("rope", "tied"), [*((rope, False) for rope in ROPES), ("default", True)])
def test_llama(rope: str, tied: bool) -> None:
    common = {**SIZES, "max_position_embeddings": 40, "tie_word_embeddings": tied}
    scaling = {**ROPES[rope], "rope_theta": 500000.0}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, rope_parameters=scaling))
    assert compare(theirs, {"model_type": "llama", **common, "rope_parameters": scaling}) <= 1e-5


@pytest.mark.parametrize("size", [8, 48])
def test_llama_with_a_head_size_of_its_own(size: int) -> None:
    common = {**SIZES, "head_dim": size, "max_position_embeddings": 64}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    assert compare(theirs, {"model_type": "llama", **common}) <= 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_qwen2(tied: bool) -> None:
    common = {**SIZES, "max_position_embeddings": 64, "tie_word_embeddings": tied, "use_sliding_window": False}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common, rope_parameters=rope))
    found = compare(theirs, {"model_type": "qwen2", **common, "rope_theta": 1e6, "sliding_window": 131072})
    assert found <= 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_internlm_1(bias: bool) -> None:
    common = {**SIZES, "num_key_value_heads": 4, "max_position_embeddings": 64}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, attention_bias=bias))
    assert compare(theirs, {"model_type": "internlm", **common, "bias": bias}) <= 1e-5


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("dims", [16, 64, 128])
def test_frequencies(rope: str, base: float, dims: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**ROPES[rope], "rope_theta": base}
    config = transformers.LlamaConfig(
        hidden_size=4 * dims, num_attention_heads=4, max_position_embeddings=128, rope_parameters=scaling
    )
    length = 300
    expected, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    ours = Rope(RopeConfig.parse(ROPES[rope], dims=dims, base=base, max_positions=128))
    lengths = torch.tensor([ours.config.dynamic_length(length)])
    got = ours.frequencies(dims, lengths, torch.device("cpu"))[0]
    assert ours.attention_factor == pytest.approx(attention, rel=1e-6)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)


def test_yarn_without_an_original_length() -> None:
    """What was trained is then `max_position_embeddings`, as Transformers takes it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": 4.0}
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={**scaling, "rope_theta": 1e4},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = Rope(RopeConfig.parse(scaling, dims=64, base=1e4, max_positions=128))
    got = ours(Positions(torch.tensor([[1]])))
    assert ours.config.trained_length == 128
    torch.testing.assert_close(torch.atan2(got.sin, got.cos)[0], expected, rtol=1e-5, atol=1e-7)
