"""ChatGLM2's block against the official code's outputs, and GLM-4 in both its formats against Transformers' class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatglm2_directory import as_glm, config, glm_config, read_golden, weights, write
from hanlin.checkpoints.load import load_model
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions

GLM4 = {"layernorm_epsilon": 1.5625e-07, "rope_ratio": 500, "eos_token_id": [93, 94], "seq_length": 131072}


def load(path: Path) -> Any:
    return load_model(path, dtype=torch.float32, device=torch.device("cpu")).model


def hidden(model: Any, ids: Tensor) -> Tensor:
    return model(ids, Positions(torch.arange(len(ids))[None]), PackedAttend([len(ids)]))  # type: ignore[no-any-return]


def test_hidden_states(shared: Path, tmp_path: Path) -> None:
    tensors, steps = read_golden(shared / "assets" / "golden" / "glm2_model.data")
    tensors["transformer.output_layer.weight"] = torch.zeros(5, 32)
    sizes = {"num_attention_heads": 8, "kv_channels": 4, "num_layers": 1, "padded_vocab_size": 5}
    model = load(write(tmp_path, config(**sizes), tensors))
    ids = torch.zeros(0, dtype=torch.int32)
    for new, want in steps:
        ids = torch.cat((ids, new))
        assert (hidden(model, ids)[-len(new) :] - want).abs().max() <= 1e-5


@pytest.mark.parametrize("ratio", [1, 500, 10000])
def test_glm4_in_both_formats_and_in_transformers(tmp_path: Path, ratio: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf', which is not installed")
    values = config(**{**GLM4, "rope_ratio": ratio, "num_layers": 3})
    tensors = weights(values)
    original = load(write(tmp_path / "original", values, tensors))
    path = write(tmp_path / "glm", glm_config(values), as_glm(tensors, values))
    ours = load(path)
    theirs = transformers.GlmForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = [model.head(hidden(model, ids)) for model in (original, ours)]
        want = theirs(ids[None]).logits[0]
    assert want.abs().max() > 1
    assert max(float((logits - want).abs().max()) for logits in got) <= 1e-5


def test_a_prefix_of_keys_and_values(tmp_path: Path) -> None:
    """P-Tuning v2, plain and projected: the projected one holds what the plain one reads from its table."""
    values = config()
    tensors = weights(values)
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(5, 2 * 2 * 2 * 8, generator=generator)
    ids = torch.arange(9)
    found = []
    for name, projection in (("plain", False), ("projected", True)):
        encoder = {"embedding.weight": table}
        if projection:
            encoder |= {"trans.0.weight": torch.randn(32, 64, generator=generator), "trans.0.bias": torch.zeros(32)}
            encoder |= {"trans.2.weight": torch.randn(64, 32, generator=generator), "trans.2.bias": torch.zeros(64)}
        more = {f"transformer.prefix_encoder.{key}": value for key, value in encoder.items()}
        given = config(pre_seq_len=5, prefix_projection=projection)
        model = load(write(tmp_path / name, given, {**tensors, **more}))
        soft = model.parts().prefix()
        want = table
        if projection:
            inner = torch.tanh(table @ encoder["trans.0.weight"].T)
            want = inner @ encoder["trans.2.weight"].T
        assert [len(soft), *soft[0][0].shape] == [2, 5, 2, 8]
        assert torch.allclose(
            torch.stack([torch.stack(pair) for pair in soft]), want.view(5, 2, 2, 2, 8).permute(1, 2, 0, 3, 4)
        )
        found.append(model(ids, Positions(ids[None]), PackedAttend([9], None, soft)))
    assert (found[0] - found[1]).abs().max() > 0.1
    assert (found[0] - hidden(load(write(tmp_path / "none", values, tensors)), ids)).abs().max() > 0.1
