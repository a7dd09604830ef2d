"""Adapter files that cannot be honoured: refused with everything that is wrong, and never with another error."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load_pipeline import CONFIGS, SIZES, write, write_gguf

from adapter_directory import halves, linears_of, write_adapter
from hanlin.adapters import Adapters
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.peft import Base, read_peft
from hanlin.engine.runner import TorchRunner
from hanlin.errors import CheckpointError, ConfigError, HanlinError, ModelNotFoundError, RequestError

RANK = 4


@pytest.fixture
def base(tiny: Any) -> Base:
    return Base.of(tiny("internlm2"))


@pytest.fixture
def adapter(tiny: Any, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "good", halves(linears_of(tiny("internlm2")), RANK), RANK)


def changed(adapter: Path, **config: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return adapter


def told(path: Path, base: Base) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_peft(path, base)
    return str(caught.value)


def test_a_good_one_is_read(adapter: Path, base: Base) -> None:
    found = read_peft(adapter, base)
    assert set(found.additions) == set(base.linears) and found.rank == RANK
    low = found.additions["model.layers.0.attention.wqkv"]
    assert torch.allclose(low.weight(), 2 * low.up @ low.down)
    assert sorted(Path(name).name for name in found.files) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' cannot be read"),
        ({"use_dora": True}, "DoRA rescales every row"),
        ({"bias": "lora_only"}, "trained biases cannot be honoured"),
        ({"fan_in_fan_out": True}, "transposed weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base weights too"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "'layer_replication' = "),
        ({"something_new": 3}, "'something_new' = 3 is not supported"),
        ({"r": 0}, "r must be a whole number >= 1, not 0"),
        ({"lora_alpha": "many"}, "lora_alpha must be a number"),
        ({"rank_pattern": {"(a+)+$": 3}}, "patterns may hold names, dots and .* only"),
        ({"rank_pattern": {"wo": -1}}, "is no such number"),
        ({"alpha_pattern": ["wo"]}, "alpha_pattern must map"),
        ({"r": 8}, "has shape (4, 32), rank and model need (8, 32)"),
    ],
)
def test_configurations_that_ask_for_more(adapter: Path, base: Base, config: dict[str, Any], says: str) -> None:
    assert says in told(changed(adapter, **config), base)


def test_everything_wrong_is_named_at_once(adapter: Path, base: Base) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0."
    del tensors[f"{stem}attention.wo.lora_B.weight"]
    tensors[f"{stem}feed_forward.w1.lora_A.weight"] = torch.zeros(RANK, 31)
    tensors[f"{stem}feed_forward.w2.lora_B.weight"][3, 1] = float("nan")
    tensors[f"{stem}feed_forward.w3.lora_A.weight"] = torch.zeros(RANK, 32, dtype=torch.int32)
    tensors[f"{stem}attention_norm.weight"] = torch.zeros(32)
    tensors[f"{stem}attention.wqkv.lora_magnitude_vector"] = torch.zeros(64)
    tensors["base_model.model.model.tok_embeddings.lora_embedding_A"] = torch.zeros(RANK, 97)
    tensors["base_model.model.output.modules_to_save.weight"] = torch.zeros(98, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    text = told(changed(adapter, use_dora=True), base)
    for says in (
        "DoRA",
        "'model.layers.0.attention.wo' has lora_A without the other half",
        "lora_A of 'model.layers.0.feed_forward.w1' has shape (4, 31)",
        "lora_B of 'model.layers.0.feed_forward.w2' holds values that are not finite",
        "lora_A of 'model.layers.0.feed_forward.w3' is I32, not floats",
        "attention_norm.weight': of whole weights",
        "lora_magnitude_vector' is no part of a plain LoRA adapter",
        "low-rank additions to the embedding cannot be honoured",
        "has shape (98, 32), the model needs (97, 32)",
    ):
        assert says in text


def test_another_models_adapter(tiny: Any, tmp_path: Path, base: Base) -> None:
    other = write_adapter(
        tmp_path / "other", halves(linears_of(tiny("llama")), RANK), RANK, base_model_name_or_path="meta/llama"
    )
    text = told(other, base)
    assert "'model.layers.0.self_attn.q_proj' is no linear layer of this model" in text
    assert "It was made for 'meta/llama'. This one has linear layers such as wqkv, wo, w1" in text


def test_missing_files(tmp_path: Path, adapter: Path, base: Base) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no such directory"):
        read_peft(tmp_path / "nowhere", base)
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json: no such file" in told(tmp_path / "empty", base)
    (adapter / "adapter_model.safetensors").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in told(adapter, base)
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    assert "'x': of whole weights" in told(adapter, base)
    save_file({}, adapter / "adapter_model.safetensors")
    assert "holds no lora_A and lora_B" in told(adapter, base)


def test_names(tiny: Any, adapter: Path) -> None:
    model = tiny("internlm2")
    known = Adapters(model)
    known.runner = TorchRunner(model, blocks=4, block_size=16, invariant=False)
    made = known.load("math", adapter)
    linears = linears_of(model).values()
    assert (made.rank, made.path) == (RANK, adapter)
    assert made.nbytes == sum(4 * 16 * (rows + columns) for rows, columns in linears)  # ranks are filled up to 16
    with pytest.raises(ConfigError, match="'math' is loaded already"):
        known.load("math", adapter)
    for wrong in ("", "a\nb", "x" * 300):
        with pytest.raises(ConfigError, match="printable characters"):
            known.load(wrong, adapter)
    with pytest.raises(RequestError, match=r"no adapter 'maths' is loaded, only: math\."):
        known.get("maths")
    known.unload("math")
    with pytest.raises(RequestError, match="only: none"):
        known.unload("math")
    assert known.get(None) is None and known.loaded == {}


def test_whole_weights_are_not_live(tiny: Any, tmp_path: Path) -> None:
    model = tiny("internlm2")
    tensors = {"base_model.model.output.weight": torch.zeros(97, 32)}
    path = write_adapter(tmp_path / "head", tensors, RANK, modules_to_save=["output"])
    known = Adapters(model)
    known.runner = TorchRunner(model, blocks=4, block_size=16, invariant=False)
    with pytest.raises(CheckpointError, match=r"replaces output\.weight as a whole"):
        known.load("head", path)


def test_damaged_files_are_refused_as_such(adapter: Path, base: Base) -> None:
    """Bytes of either file changed, cut or doubled: read, or refused; no other error."""
    rng = random.Random(5)
    files = {name: (adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    header = 8 + int.from_bytes(files["adapter_model.safetensors"][:8], "little")
    refused = 0
    for number in range(1500):
        name = rng.choice(sorted(files))
        data = bytearray(files[name])
        for _ in range(rng.choice((1, 1, 3))):
            place, kind = rng.randrange(min(len(data), header)), rng.randrange(4)
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[place : place + rng.randrange(9)] = rng.choice((b"0", b"null", b"-1e999", b"[[", b'"A"'))
            elif kind == 2:
                del data[place + 1 :]
            else:
                data[place:place] = data[place : place + rng.randrange(20)]
        (adapter / name).write_bytes(data)
        try:
            found = read_peft(adapter, base)
        except HanlinError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"run {number}: {name} = {bytes(data[:300])!r}") from error
        else:
            for layer, low in found.additions.items():
                rows, columns = base.linears[layer]
                assert low.down.shape == (low.rank, columns) and low.up.shape == (rows, low.rank)
        (adapter / name).write_bytes(files[name])
    assert refused > 700


@pytest.mark.parametrize("kind", ["internlm2", "llama"])
def test_merged_into_a_gguf_file(tiny: Any, tmp_path: Path, kind: str) -> None:
    """Whose rows of q and k are stored in another order, and whose projections are parted."""
    model = tiny(kind, **SIZES, **CONFIGS[kind])
    base = Base.of(model)
    linears = {n: shape for n, shape in linears_of(model).items() if f"{n}.weight" not in base.tables}
    adapter = write_adapter(tmp_path / "adapter", halves(linears, 3), 3)
    sources = [write(tmp_path / "m", model, CONFIGS[kind]), write_gguf(tmp_path / "m.gguf", model, kind)]
    loaded = [
        load_model(source, dtype=torch.float32, device=torch.device("cpu"), adapter=adapter).model for source in sources
    ]
    for (name, ours), (_, theirs) in zip(*(made.named_parameters() for made in loaded), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        changed = not torch.allclose(ours, model.get_parameter(name))
        assert changed == (name.removesuffix(".weight") in linears)
