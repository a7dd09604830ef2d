"""ChatGLM2's configurations: which are read, what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm2_directory import config, glm_config, weights, write
from chatglm_directory import quantised
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.row_quantised import dequantised
from hanlin.errors import ConfigError
from hanlin.layers.rope import Positions, Rope, rotate
from hanlin.models.chatglm import ChatGLMConfig
from hanlin.models.chatglm2 import ChatGLM2Config
from hanlin.models.registry import read_config


def test_the_released_shapes() -> None:
    values = config(
        hidden_size=4096, ffn_hidden_size=13696, kv_channels=128, num_attention_heads=32, padded_vocab_size=151552,
        num_layers=40, num_hidden_layers=40, vocab_size=151552, rope_ratio=10000, seq_length=1048576,
        multi_query_group_num=4, layernorm_epsilon=1.5625e-07, eos_token_id=[151329, 151336, 151338],
        classifier_dropout=None,
    )  # fmt: skip
    found = read_config(values)
    assert isinstance(found, ChatGLM2Config) and found.model_type == "chatglm2"
    assert (found.num_layers, found.num_kv_heads, found.vocab_size, found.max_positions) == (40, 4, 151552, 1048576)
    assert found.stop_ids == (151329, 151336, 151338)
    assert found.qkv_bias and not found.out_bias
    assert (found.rope.dims, found.rope.base, found.rope.kind, found.rope.interleaved) == (64, 1e8, "none", True)
    glm = read_config(glm_config(values))
    assert glm.model_type == "glm"
    assert (glm.rope, glm.norm_eps, glm.stop_ids) == (found.rope, found.norm_eps, found.stop_ids)


def test_the_first_family_has_the_same_name_and_other_keys() -> None:
    assert isinstance(read_config({"model_type": "chatglm"}), ChatGLMConfig)
    assert isinstance(read_config(config()), ChatGLM2Config)


@pytest.mark.parametrize(("ratio", "base", "divisor"), [(1, 1e4, 1.0), (16, 1e4, 16.0), (50, 5e5, 1.0)])
def test_ratios_stretch_positions_or_the_base(ratio: int, base: float, divisor: float) -> None:
    """Pairs of neighbours in the first half of a head turn by place / divisor * base^(-2i / 64); the rest stays."""
    found = read_config(config(kv_channels=128, hidden_size=512, rope_ratio=ratio))
    x = torch.randn(3, 2, 128, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 7, 30000])
    got = rotate(x, Rope(found.rope)(Positions(places[None])))
    want = x.clone()
    for row, place in enumerate(places.tolist()):
        for pair in range(32):
            angle = torch.tensor(place / divisor * base ** (-2 * pair / 64), dtype=torch.float64)
            turn = torch.polar(torch.ones((), dtype=torch.float64), angle)
            value = torch.complex(x[row, :, 2 * pair].double(), x[row, :, 2 * pair + 1].double()) * turn
            want[row, :, 2 * pair], want[row, :, 2 * pair + 1] = value.real.float(), value.imag.float()
    assert torch.allclose(got, want, atol=2e-2)  # angles of float32, at 30,000 turns of the fastest wave
    assert torch.allclose(got[:2], want[:2], atol=1e-5)
    assert torch.equal(got[..., 64:], x[..., 64:])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rmsnorm": False, "post_layer_norm": False}, ["rmsnorm", "post_layer_norm"]),
        ({"multi_query_attention": None}, ["multi_query_attention"]),
        ({"kv_channels": 6}, ["pairs"]),
        ({"rope_ratio": -1}, ["rope_ratio"]),
        ({"rope_ratio": 0, "some_scaling": 3}, ["rope_ratio", "some_scaling"]),
        ({"multi_query_group_num": 3}, ["num_kv_heads"]),
        ({"quantization_bit": 3}, ["quantization_bit"]),
    ],
)
def test_everything_wrong_is_named(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(config(**changes))
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize("share", ["half", [1], 7, -1.0])
def test_a_strange_share_of_rotary_dimensions(share: Any) -> None:
    values = {**glm_config(config()), "partial_rotary_factor": share}
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        read_config(values)


def test_where_the_share_may_stand() -> None:
    values = {key: value for key, value in glm_config(config()).items() if key != "partial_rotary_factor"}
    assert read_config(values).rope.dims == 4
    parameters = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 1.0}
    assert read_config({**values, "rope_parameters": parameters}).rope.dims == 8


@pytest.mark.parametrize("bits", [4, 8])
def test_released_quantised_files(tmp_path: Path, bits: int) -> None:
    """chatglm2-6b-int4 and its like: the same numbers as files that hold what the codes stand for."""
    values = config(quantization_bit=bits)
    stored = quantised(weights(values), bits)
    dense = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale")
        if not name.endswith("_scale"):
            dense[name] = tensor.float() if scale is None else dequantised(tensor, scale, bits)
    device = torch.device("cpu")
    found = load_model(write(tmp_path / "codes", values, stored), dtype=torch.float32, device=device).model
    plain = load_model(write(tmp_path / "plain", config(), dense), dtype=torch.float32, device=device).model
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))
