"""Quantised checkpoints of other programs: their values, their packed layouts, and every mismatch at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hanlin
from hanlin.checkpoints.bits import pack, pack_awq, unpack, unpack_awq
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.quantisation import read_quantisation
from hanlin.checkpoints.quantised import QuantisedSource
from hanlin.checkpoints.source import open_source
from hanlin.engine.lowering import Lowering
from hanlin.errors import CheckpointError, ConfigError
from hanlin.kernels.native import Context, Kind, available
from hf_directory import make_directory
from quantised_files import CONFIGS, make, stream

SHAPE = (16, 96)
# How each appears to the loader.
DTYPES = {
    "awq": "INT4_ZERO/32",
    "gptq": "INT4_ZERO/32",
    "gptq_v2": "INT4/32",
    "gptq_order": "FEW_BITS",
    "gptq_3": "INT4_ZERO/32",
    "gptq_8": "INT8/32",
    "compressed": "INT4_ZERO/32",
    "compressed_8": "INT8_ROW",
    "nf4": "FEW_BITS",
    "nf4_twice": "FEW_BITS",
    "int8": "INT8_ROW",
}
KINDS = {"INT4_ZERO/32": Kind.INT4_ZERO, "INT4/32": Kind.INT4, "INT8/32": Kind.INT8, "INT8_ROW": Kind.INT8_ROW}


@contextmanager
def opened(path: Path, form: str, tensors: dict[str, torch.Tensor], **config: Any) -> Iterator[QuantisedSource]:
    save_file(tensors, path / "model.safetensors")
    with open_source(path) as base:
        yield QuantisedSource(base, read_quantisation({**CONFIGS[form], **config}, path / "config.json"))


def refused(path: Path, form: str, tensors: dict[str, torch.Tensor], **config: Any) -> str:
    with pytest.raises(CheckpointError) as raised, opened(path, form, tensors, **config):
        pass
    return str(raised.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_out_of_words_as_they_went_in(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 37))
    assert unpack(stream(codes, bits), bits, 37).tolist() == codes.tolist()
    if bits in (4, 8):
        assert torch.equal(pack(torch.from_numpy(codes).byte(), bits), stream(codes, bits))
    codes = torch.randint(0, 16, (3, 16), dtype=torch.uint8)
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


@pytest.mark.parametrize("form", CONFIGS)
def test_values_are_those_of_the_format(form: str, tmp_path: Path) -> None:
    tensors, values = make(form, SHAPE)
    plain = torch.ones(3)
    files = {"norm.weight": plain} | {f"a.{end}": tensor for end, tensor in tensors.items()}
    with opened(tmp_path, form, files) as source:
        assert {name: (info.shape, info.dtype) for name, info in source.infos.items()} == {
            "norm.weight": ((3,), "F32"),
            "a.weight": (SHAPE, DTYPES[form]),
        }
        assert torch.equal(source.load("norm.weight"), plain)
        torch.testing.assert_close(source.load("a.weight"), values, rtol=1e-6, atol=1e-8)


def directory(path: Path, form: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny InternLM2 with every matrix of its blocks stored in `form`, and the values of them."""
    make_directory(path, tokenizer="small", hidden_size=128, intermediate_size=192)
    with open_source(path) as source:
        weights = {name: source.load(name) for name in source.infos}
    values: dict[str, torch.Tensor] = {}
    for number, name in enumerate([name for name in weights if "layers" in name and "norm" not in name]):
        shape = tuple(weights.pop(name).shape)
        tensors, values[name] = make(form, (shape[0], shape[1]), seed=number)
        weights |= {f"{name.removesuffix('.weight')}.{end}": tensor for end, tensor in tensors.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[form]}))
    return path, values


@pytest.mark.skipif(not available(), reason="the native kernels are not built")
@pytest.mark.parametrize("form", CONFIGS)
def test_a_quantised_internlm2_is_packed_as_it_is_stored(form: str, tmp_path: Path) -> None:
    path, values = directory(tmp_path / "m", form)
    takers = []
    with Context(1) as context:

        def taker(model: Any) -> Lowering:
            takers.append(Lowering(model, weights="auto", context=context))
            return takers[0]

        load_model(path, dtype=torch.float32, device=torch.device("cpu"), taker=taker)
        (lowering,) = takers
        checked = 0
        for block in lowering.blocks:
            for slot in block[:4]:
                assert slot.weight is not None
                assert slot.weight.kind is KINDS.get(DTYPES[form], Kind.INT8)
                for name, places in slot.places.items():
                    # Exact but for how a product is rounded; what no layout holds has 8 bits for 32 columns.
                    exact = DTYPES[form] != "FEW_BITS"
                    error = 1e-6 if exact else float(values[name].abs().max()) / 127
                    packed = torch.from_numpy(context.unpack(slot.weight, np.ascontiguousarray(places)))
                    torch.testing.assert_close(packed, values[name], rtol=1e-5 if exact else 0, atol=error)
                    checked += 1
    assert checked == len(values) == 10


@pytest.mark.skipif(not available(), reason="the native kernels are not built")
@pytest.mark.parametrize("form", ["awq", "gptq_order", "int8"])
def test_native_and_torch_score_alike(form: str, tmp_path: Path) -> None:
    path, _ = directory(tmp_path / "m", form)
    prompt = list(range(3, 40))
    with hanlin.load(path, cache_bytes=1 << 20) as llm:
        native = llm.score(prompt)[0].total
    with hanlin.load(path, runner="torch", dtype="float32", cache_bytes=1 << 20) as llm:
        assert llm.score(prompt)[0].total == pytest.approx(native, abs=0.15)


def test_biases_of_zeros_in_old_gptq_files_are_forgotten(tmp_path: Path) -> None:
    path, values = directory(tmp_path / "m", "gptq")
    with open_source(path) as source:
        weights = {name: source.load(name) for name in source.infos}
    for name, value in values.items():
        weights[name.replace(".weight", ".bias")] = torch.zeros(len(value), dtype=torch.float16)
    save_file(weights, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    del config["quantization_config"]  # AutoGPTQ kept it in a file of its own
    (path / "config.json").write_text(json.dumps(config))
    model = load_model(path, dtype=torch.float32, device=torch.device("cpu")).model
    name, value = next(iter(values.items()))
    torch.testing.assert_close(model.get_parameter(name).data, value)
    weights[next(iter(values)).replace(".weight", ".bias")] += 1
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor .*\.bias"):
        load_model(path, dtype=torch.float32, device=torch.device("cpu"))


def test_all_mismatches_are_named_at_once(tmp_path: Path) -> None:
    a, b = make("awq", SHAPE)[0], make("awq", SHAPE)[0]
    a["scales"] = a["scales"][:, :8].contiguous()
    del b["qzeros"]
    files = {f"a.{end}": tensor for end, tensor in a.items()} | {f"b.{end}": tensor for end, tensor in b.items()}
    said = refused(tmp_path, "awq", files)
    assert "'a.scales' is F16 (3, 8), not F16 or BF16 or F32 (3, 16)" in said and "missing tensor 'b.qzeros'" in said


@pytest.mark.parametrize(
    ("form", "change", "config", "says"),
    [
        ("awq", {}, {"group_size": 64}, "3 groups for 96 columns"),
        ("gptq", {}, {"bits": 8}, "not those of 96 columns of 8 bits"),
        ("gptq_order", {"g_idx": torch.full((96,), 3, dtype=torch.int32)}, {}, "groups 3 to 3, but only 3 groups"),
        ("gptq", {"scales": torch.full((3, 16), torch.inf).half()}, {}, "not a finite number"),
        ("compressed", {"weight_shape": torch.tensor([16, 1 << 40])}, {}, "words a row"),
        ("compressed", {"weight_shape": torch.tensor([-16, 96])}, {}, "is said to have the shape"),
        ("int8", {"SCB": torch.ones(15)}, {}, "a.SCB"),
        ("int8", {"weight_format": torch.tensor(1, dtype=torch.uint8)}, {}, "order of a GPU's tiles"),
        ("nf4", {"weight.absmax": torch.ones(3)}, {}, "not F32 (24,)"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)}, {}, "JSON"),
    ],
)
def test_what_does_not_fit_is_told(form: str, change: Any, config: Any, says: str, tmp_path: Path) -> None:
    tensors = {**make(form, SHAPE)[0], **change}
    assert says in refused(tmp_path, form, {f"a.{end}": tensor for end, tensor in tensors.items()}, **config)


def test_a_configuration_without_quantised_tensors_is_told(tmp_path: Path) -> None:
    assert "no tensor is quantised as awq" in refused(tmp_path, "awq", {"a.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "fp8"}, ["'quant_method' = 'fp8'", "hanlin quantize"]),
        ({"quant_method": "awq", "version": "gemv", "bits": 3, "group_size": "x"}, ["gemv", "'bits' = 3", "'x'"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, ["marlin"]),
        ({"quant_method": "bitsandbytes"}, ["load_in_4bit"]),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, ["nvfp4", "config_groups"]),
        ([1], ["must be an object"]),
    ],
)
def test_what_is_not_read_is_told_at_once(config: Any, says: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read_quantisation(config, Path("config.json"))
    assert all(part in str(raised.value) for part in says)
