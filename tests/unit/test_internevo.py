"""InternEvo's training checkpoints: any cut gives the released model's tensors, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hanlin.checkpoints.description import describe_directory
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError, UnsafeCheckpointError
from hanlin.models.registry import build, read_config
from hf_directory import make_directory
from internevo_directory import make_internevo


def internlm2(tmp_path: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    values = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, **changes}
    path = make_directory(tmp_path / "hf", tokenizer="small", **values)
    return load_file(path / "model.safetensors"), {**json.loads((path / "config.json").read_text()), "_kind": "w"}


def internlm(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = {
        "model_type": "internlm",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "bias": True,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **changes,
    }
    model = build(read_config(config), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(p.shape, generator=generator).half() for name, p in model.named_parameters()}
    return state, {**config, "_kind": "v1"}


def same(path: Path, state: dict[str, Tensor]) -> None:
    with open_source(path) as source:
        assert set(source.infos) == set(state)
        for name, value in state.items():
            info, again = source.infos[name], source.load(name)
            assert info.shape == tuple(value.shape) == tuple(again.shape), name
            assert again.dtype == value.dtype and info.nbytes == value.nbytes
            assert torch.equal(again.view(torch.int16), value.view(torch.int16)), name
            assert source.raw(name).tobytes() == again.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("adapt_hf", [True, False, None])
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_internlm2_joined(tmp_path: Path, tp: int, pp: int, adapt_hf: bool | None) -> None:
    state, config = internlm2(tmp_path)
    same(make_internevo(tmp_path / "evo", state, config, tp=tp, pp=pp, adapt_hf=adapt_hf), state)


@pytest.mark.parametrize("changes", [{"cut": "wp"}, {"prefix": "model."}, {"embed_split": False}, {"as_config": True}])
def test_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    state, config = internlm2(tmp_path, bias=True)
    same(make_internevo(tmp_path / "evo", state, config, tp=2, pp=2, **changes), state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_internlm_1_joined(tmp_path: Path, tp: int, bias: bool) -> None:
    state, config = internlm(bias=bias)
    same(make_internevo(tmp_path / "evo", state, config, tp=tp, pp=2), state)


def test_the_configuration_comes_from_the_arguments(tmp_path: Path) -> None:
    state, config = internlm2(tmp_path)
    path = make_internevo(tmp_path / "evo", state, config, tp=2, pp=2)
    ours, theirs = read_config(describe_directory(path).values), read_config(config)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.norm_eps, ours.rope.base) == (theirs.norm_eps, theirs.rope.base)
    loaded: Any = load_model(path, dtype=torch.float32, device=torch.device("cpu")).model
    assert torch.equal(loaded.model.layers[2].attention.wo.weight, state["model.layers.2.attention.wo.weight"].float())
    old, said = internlm()
    path = make_internevo(tmp_path / "old", old, said)
    assert read_config(describe_directory(path).values).qkv_bias
    load_model(path, dtype=torch.float32, device=torch.device("cpu"))


def test_a_normed_head_has_rows_of_length_one(tmp_path: Path) -> None:
    state, config = internlm2(tmp_path)
    path = make_internevo(tmp_path / "evo", state, config, tp=2, norm_head=True)
    with open_source(path) as source:
        head = source.load("output.weight").float()
        want = torch.nn.functional.normalize(state["output.weight"].float(), dim=-1)
        assert torch.equal(head, want.bfloat16().float())


def test_everything_that_is_wrong_is_said(tmp_path: Path) -> None:
    state, config = internlm2(tmp_path)

    def refused(path: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            open_source(path)

    path = make_internevo(tmp_path / "a", state, config, tp=2, pp=2)
    (path / "model_tp1_pp0.pt").unlink()
    (path / "model_tp0_pp1.pt").unlink()
    refused(path, r"(?s)missing file model_tp1_pp0.pt.*missing file model_tp0_pp1.pt|model_tp0_pp1.*model_tp1_pp0")
    path = make_internevo(tmp_path / "b", state, config, norm_type="layernorm", num_experts=8)
    refused(path, "(?s)norm_type.*num_experts")
    (path / "model_config.pt").unlink()
    refused(path, "model_config.pt")
    path = make_internevo(tmp_path / "c", state, config, pp=2, num_chunks=2)
    refused(path, "num_chunks")
    path = make_internevo(tmp_path / "d", state, config, tp=2)
    torch.save({"layers.0.attention.wqkv.weight": torch.zeros(2, 2)}, path / "model_tp1_pp0.pt")
    refused(path, "(?s)rank 1 of stage 0 lacks.*more")
    path = make_internevo(tmp_path / "e", state, config, tp=2)
    (path / "model_tp0_pp0.pt").rename(path / "model_tp0_pp0_dp0.pt")
    refused(path, "FSDP")
    path = make_internevo(tmp_path / "f", state, config, num_attention_heads=0, rope_base="x")
    refused(path, "(?s)num_attention_heads.*rope_base")
    path = make_internevo(tmp_path / "g", {f"a.{name}": value for name, value in state.items()}, config)
    refused(path, "neither InternLM's nor")


def test_classes_are_known_in_the_arguments_only(tmp_path: Path) -> None:
    state, config = internlm2(tmp_path)
    path = make_internevo(tmp_path / "a", state, config)
    weights = torch.load(path / "model_tp0_pp0.pt")
    torch.save({**weights, "bait": torch.bfloat16}, path / "model_tp0_pp0.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"torch\.bfloat16"):
        open_source(path)
    path = make_internevo(tmp_path / "b", state, config, bait=print)
    with pytest.raises(UnsafeCheckpointError, match="print"):
        open_source(path)
