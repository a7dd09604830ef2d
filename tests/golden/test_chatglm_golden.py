"""ChatGLM-6B's block against the official code's outputs, loaded from directories with the released names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatglm_directory import config, read_golden, write
from hanlin.checkpoints.load import load_model
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import layout_of

SIZES = {"num_attention_heads": 8, "num_layers": 1, "vocab_size": 5}
IDS = {"mask_token_id": 3, "gmask_token_id": 1, "bos_token_id": 2, "eos_token_id": 4}


@pytest.mark.parametrize(("file", "length", "bar"), [("glm_model", 0, 1e-5), ("glm_ptuning_v2_model", 5, 2e-4)])
def test_hidden_states(shared: Path, tmp_path: Path, file: str, length: int, bar: float) -> None:
    tensors, soft, steps = read_golden(shared / "assets" / "golden" / f"{file}.data", length)
    tensors["lm_head.weight"] = torch.zeros(5, 32)
    path = write(tmp_path / "model", config(**SIZES, **IDS), tensors)
    prefix = None
    if soft is not None:
        prefix = tmp_path / "checkpoint-3000"
        prefix.mkdir()
        table = soft.permute(2, 0, 1, 3, 4).reshape(length, -1)
        torch.save({"transformer.prefix_encoder.embedding.weight": table}, prefix / "pytorch_model.bin")
    loaded = load_model(path, dtype=torch.float32, device=torch.device("cpu"), prefix=prefix)
    rule = layout_of(loaded.config)
    assert rule is not None
    parts = loaded.model.parts()  # type: ignore[operator]
    ids: list[int] = []
    for step, (new, want) in enumerate(steps):
        ids += new.tolist()
        context, positions = rule(ids)
        assert context == 2
        assert positions(0, len(ids)).tolist() == [[0, 1, 1, 1, 1][: len(ids)], [0, 0, 1, 2, 3][: len(ids)]]
        attend = PackedAttend([len(ids)], [context], parts.prefix() if parts.prefix else None)
        places = Positions(torch.from_numpy(positions(0, len(ids))))
        hidden = loaded.model(torch.tensor(ids), places, attend)[-len(new) :]
        assert (hidden - want).abs().max() <= bar, step
