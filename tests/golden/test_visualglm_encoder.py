"""VisualGLM-6B's image encoder against Transformers' BLIP-2, which has the same mathematics under other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel


def vision_oracle(encoder: Any, config: Any) -> Any:
    """Transformers' vision transformer with the weights of ours."""
    v = config.vision
    model = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=v.width,
            intermediate_size=v.inner,
            num_hidden_layers=v.layers,
            num_attention_heads=v.heads,
            image_size=v.image_size,
            patch_size=v.patch,
            layer_norm_eps=v.eps,
        )
    )
    ours = encoder.vit.state_dict()
    named = {
        "embeddings.class_embedding": ours["transformer.word_embeddings.weight"][None],
        "embeddings.position_embedding": ours["transformer.position_embeddings.weight"][None],
    }
    for kind in ("weight", "bias"):
        named[f"embeddings.patch_embedding.{kind}"] = ours[f"mixins.patch_embedding.proj.{kind}"]
        named[f"post_layernorm.{kind}"] = ours[f"mixins.cls.ln_vision.{kind}"]
        for i in range(v.layers):
            theirs, here = f"encoder.layers.{i}", f"transformer.layers.{i}"
            for name, our in (
                ("layer_norm1", "input_layernorm"),
                ("self_attn.qkv", "attention.query_key_value"),
                ("self_attn.projection", "attention.dense"),
                ("layer_norm2", "post_attention_layernorm"),
                ("mlp.fc1", "mlp.dense_h_to_4h"),
                ("mlp.fc2", "mlp.dense_4h_to_h"),
            ):
                named[f"{theirs}.{name}.{kind}"] = ours[f"{here}.{our}.{kind}"]
    model.load_state_dict(named)
    model.post_layernorm.eps = 1e-5  # the released code leaves it at torch's own
    return model.eval()


def query_oracle(encoder: Any, config: Any) -> Any:
    q = config.queries
    model = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=q.width,
            intermediate_size=q.inner,
            num_hidden_layers=q.layers,
            num_attention_heads=q.heads,
            encoder_hidden_size=config.vision.width,
            cross_attention_frequency=2,
            layer_norm_eps=q.eps,
        )
    )
    ours = encoder.qformer.state_dict()
    named = {}
    for kind in ("weight", "bias"):
        # BERT's last norm of a layer is the first of our next one.
        norms = [f"transformer.layers.{i}.input_layernorm.{kind}" for i in range(q.layers)]
        norms.append(f"transformer.final_layernorm.{kind}")
        named[f"layernorm.{kind}"] = ours[norms[0]]
        for i in range(q.layers):
            theirs, here = f"encoder.layer.{i}", f"transformer.layers.{i}"
            parts = ours[f"{here}.attention.query_key_value.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                named[f"{theirs}.attention.attention.{name}.{kind}"] = part
            named[f"{theirs}.attention.output.dense.{kind}"] = ours[f"{here}.attention.dense.{kind}"]
            named[f"{theirs}.attention.output.LayerNorm.{kind}"] = ours[f"{here}.post_attention_layernorm.{kind}"]
            named[f"{theirs}.intermediate_query.dense.{kind}"] = ours[f"{here}.mlp.dense_h_to_4h.{kind}"]
            named[f"{theirs}.output_query.dense.{kind}"] = ours[f"{here}.mlp.dense_4h_to_h.{kind}"]
            named[f"{theirs}.output_query.LayerNorm.{kind}"] = ours[norms[i + 1]]
            if not q.crossed[i]:
                continue
            crossed, cross = f"{theirs}.crossattention", f"{here}.cross_attention"
            named[f"{crossed}.attention.query.{kind}"] = ours[f"{cross}.query.{kind}"]
            for name, part in zip(("key", "value"), ours[f"{cross}.key_value.{kind}"].chunk(2), strict=True):
                named[f"{crossed}.attention.{name}.{kind}"] = part
            named[f"{crossed}.output.dense.{kind}"] = ours[f"{cross}.dense.{kind}"]
            named[f"{crossed}.output.LayerNorm.{kind}"] = ours[f"{here}.post_cross_attention_layernorm.{kind}"]
    loaded = model.load_state_dict(named, strict=False)
    assert not loaded.unexpected_keys
    assert all(
        ".intermediate." in key or ".output.LayerNorm" in key or ".output.dense" in key for key in loaded.missing_keys
    )
    return model.eval()


@torch.inference_mode()
def test_the_encoder_is_blip2s(tiny: Any) -> None:
    model = tiny("visualglm")
    encoder, config = model.image_encoder.double(), model.config
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(3)).double()
    seen = vision_oracle(encoder, config).double()(pixel_values=pixels).last_hidden_state
    assert (encoder.vit(pixels) - seen).abs().max() < 1e-9
    queries = encoder.qformer.transformer.word_embeddings.weight.expand(2, -1, -1)
    told = query_oracle(encoder, config).double()(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
    assert (encoder.qformer(seen) - told).abs().max() < 1e-9
    made = encoder(pixels)
    assert made.shape == (2, config.image_length, config.hidden_size)
    assert (made - torch.nn.functional.linear(told, encoder.glm_proj.weight, encoder.glm_proj.bias)).abs().max() < 1e-9
    assert (made[0] - made[1]).abs().max() > 1e-3
