"""A trained model's weights in InternLM2's layout: the default model, fused, against Transformers' own Llama."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from hanlin.checkpoints.load import load_model
from hanlin.hub.default import SMOLLM2, location, present
from hanlin.hub.places import Places
from hanlin.tokenizers import from_gguf

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

from hanlin.hf import InternLM2Config, InternLM2ForCausalLM  # noqa: E402 - after the check above

PROMPT = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"


def fused(weights: Mapping[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Llama's tensors under InternLM2's names: for each key head its query heads, the key, the value."""
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "self_attn.o_proj": "attention.wo",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    out = {}
    for name, tensor in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            rows = [part.unflatten(0, (groups, -1)) for part in parts]
            name, tensor = name.replace("self_attn.q_proj", "attention.wqkv"), torch.cat(rows, 1).flatten(0, 1)
        elif "k_proj" in name or "v_proj" in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


@pytest.mark.slow
@pytest.mark.e2e
@torch.no_grad()
def test_a_trained_model() -> None:
    path = location(SMOLLM2, Places.default())
    if not present(path, SMOLLM2):
        pytest.skip("needs the default model in the cache (hanlin pull)")
    loaded = load_model(path, dtype=torch.float32, device=torch.device("cpu"))
    numbers, weights = loaded.config, loaded.model.state_dict()
    common = {
        "vocab_size": numbers.vocab_size,
        "hidden_size": numbers.hidden_size,
        "intermediate_size": numbers.intermediate_size,
        "num_hidden_layers": numbers.num_layers,
        "num_attention_heads": numbers.num_heads,
        "num_key_value_heads": numbers.num_kv_heads,
        "max_position_embeddings": numbers.max_positions,
        "rms_norm_eps": numbers.norm_eps,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    base = numbers.rope.base
    ours = InternLM2ForCausalLM(InternLM2Config(**common, bias=False, rope_theta=base)).eval()
    ours.load_state_dict(fused(weights, numbers.num_kv_heads))
    rope = {"rope_type": "default", "rope_theta": base}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, rope_parameters=rope)).eval()
    llama.load_state_dict(weights)

    tokenizer = from_gguf(loaded.metadata)
    ids = torch.tensor([tokenizer.encode(PROMPT, parse_special=True)])
    got, expected = ours(ids).logits, llama(ids).logits
    # Logits reach 20 and go through 30 layers: float32 leaves this much.
    assert float((got - expected).abs().max()) <= 2e-4
    options = {"max_new_tokens": 24, "do_sample": False}
    reply = ours.generate(ids, **options)
    assert torch.equal(reply, llama.generate(ids, **options))
    assert "sky" in tokenizer.decode(reply[0, ids.shape[1] :].tolist()).lower()
    print(
        f"largest difference {float((got - expected).abs().max()):.1e}, largest logit {float(expected.abs().max()):.1f}"
    )
