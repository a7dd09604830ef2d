"""LoRA by PEFT on the fused projection, under the names that adapters made elsewhere have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")
peft = pytest.importorskip("peft", reason="needs the extra 'tune' (peft), which is not installed")

from safetensors.torch import load_file  # noqa: E402 - after the checks above

from hanlin.hf import InternLM2Config, InternLM2ForCausalLM, InternLM2ForSequenceClassification  # noqa: E402

# PEFT asks Transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def make(kind: type = InternLM2ForCausalLM) -> Any:
    torch.manual_seed(2)
    return kind(
        InternLM2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bias=False,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def train(model: Any, ids: torch.Tensor, steps: int = 3, **labels: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, **(labels or {"labels": ids})).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_the_fused_projection(tmp_path: Path, checkpointing: bool) -> None:
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.randint(3, 97, (2, 10))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["wqkv", "wo"])
    model = peft.get_peft_model(base, config).train()
    if checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("wqkv.lora_" in name or "wo.lora_" in name for name in trained)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        adapted = model(ids).logits

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.attention.wqkv.lora_A.weight" in saved
    fresh = make()
    fresh.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted)
        assert again.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False).shape[1] > 10

    merged = again.merge_and_unload()
    assert isinstance(merged, InternLM2ForCausalLM)
    assert merged.state_dict().keys() == before.keys()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "wqkv" in name or "attention.wo" in name}
    merged.save_pretrained(tmp_path / "merged")
    loaded = InternLM2ForCausalLM.from_pretrained(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_all_linear_leaves_the_head_alone() -> None:
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"wqkv", "wo", "w1", "w2", "w3"}


def test_a_classifier() -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["wqkv"])
    model = peft.get_peft_model(make(InternLM2ForSequenceClassification), config).train()
    losses = train(model, torch.randint(3, 97, (4, 6)), labels=torch.tensor([0, 1, 0, 1]))
    assert losses[-1] < losses[0]
    assert model.base_model.model.score.modules_to_save["default"].weight.requires_grad
