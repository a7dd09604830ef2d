"""What `hanlin quantize` writes as compressed-tensors, loaded by Transformers: the same logits as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.quantisation import read_quantisation
from hanlin.checkpoints.quantised import QuantisedSource
from hanlin.checkpoints.source import open_source
from hanlin.compress.calibration import Windows
from hanlin.compress.quantise import Settings, quantise
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
IDS = np.random.default_rng(0).integers(3, 97, (5, 24))


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any) -> Path:
    """A tiny Llama with some loud channels."""
    path, generator = tmp_path_factory.mktemp("llama"), torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    tensors = {"model.embed_tokens.weight": random(97, 64) * 8, "lm_head.weight": random(97, 64) * 4}
    tensors["model.norm.weight"] = torch.ones(64)
    at = "model.layers.0"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{at}.{norm}.weight"] = 1 + random(64).abs() * 8
    for name, out, columns in (
        *(("self_attn.q_proj", 64, 64), ("self_attn.k_proj", 32, 64), ("self_attn.v_proj", 32, 64)),
        *(("self_attn.o_proj", 64, 64), ("mlp.gate_proj", 96, 64), ("mlp.up_proj", 96, 64)),
        ("mlp.down_proj", 64, 96),
    ):
        tensors[f"{at}.{name}.weight"] = random(out, columns)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


# Not among them: zero points, whose packed shape Transformers 5.24 refuses (docs/quantize.md tells).
CASES = [
    Settings(method="rtn", bits=8, group_size=32),
    Settings(method="rtn", bits=4, group_size=32, format="compressed-tensors", symmetric=True),
    Settings(method="awq", bits=4, group_size=32, format="compressed-tensors", symmetric=True),
    Settings(method="gptq", bits=4, group_size=32, format="compressed-tensors", symmetric=True),
    Settings(method="smoothquant", bits=8),
]


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = load_model(path, dtype=torch.float32, device=torch.device("cpu")).model
    with torch.inference_mode():
        return model.head(model(ids, Positions(torch.arange(len(ids))[None]), PackedAttend([len(ids)])))


@pytest.mark.parametrize("settings", CASES, ids=lambda given: f"{given.method}-{given.bits}-{given.symmetric}")
def test_transformers_says_what_we_say(settings: Settings, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, which is not installed")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf', which is not installed")
    quantise(source, tmp_path / "q", settings, windows=Windows(IDS[:4], IDS[4:]))
    ids = torch.from_numpy(IDS[4])
    ours = logits(tmp_path / "q", ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    schemes = [module.quantization_scheme for module in theirs.modules() if hasattr(module, "quantization_scheme")]
    assert len(schemes) == 7 and all(scheme.weights.num_bits == settings.bits for scheme in schemes)
    # They round activations where the file asks for it; we do not, so that only the weights are compared.
    assert all((scheme.input_activations is not None) == (settings.method == "smoothquant") for scheme in schemes)
    for scheme in schemes:
        scheme.input_activations = None
    with torch.inference_mode():
        found = theirs(ids[None]).logits[0].float()
    size = float(ours.abs().max())
    assert float((found - ours).abs().max()) <= 2e-4 * size
    assert float((logits(source, ids) - ours).abs().max()) > 1e-3 * size  # it was quantised


@pytest.mark.parametrize("bits", [4, 8])
def test_their_library_reads_our_zero_points(bits: int, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, which is not installed")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = Settings(method="rtn", bits=bits, group_size=32, format="compressed-tensors", symmetric=False)
    quantise(source, tmp_path / "q", settings)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    [group] = said["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "q").glob("*.safetensors"):
        stored |= load_file(file)
    names = sorted(name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed"))
    assert len(names) == 7
    with open_source(tmp_path / "q") as base:
        ours = QuantisedSource(base, read_quantisation(said, tmp_path / "q" / "config.json"))
        for name in names:
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
            assert own["weight_zero_point"].any()
            found = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
            assert torch.allclose(found.float(), ours.load(f"{name}.weight").float(), rtol=2e-3, atol=1e-5)
