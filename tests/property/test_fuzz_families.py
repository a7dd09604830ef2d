"""Whatever stands in the files of these families is read, or refused with an error of ours.

Configurations, what they say of quantisation, soft prefixes, tokenizers."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from chatglm2_directory import config as later_config
from chatglm2_directory import glm_config
from chatglm2_directory import tokenizer_model as later_tokenizer
from chatglm_directory import config, tokenizer_config, tokenizer_model, weights, write
from conftest import _SIZES, TINY
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.quantisation import Quantisation, read_quantisation
from hanlin.errors import CheckpointError, ConfigError, TokenizerError
from hanlin.models.config import DecoderConfig
from hanlin.models.registry import read_config
from hanlin.tokenizers import load_tokenizer
from quantised_files import CONFIGS

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "chatglm": config(),
    "chatglm2": later_config(),
    "glm": glm_config(later_config()),
    **{name: {**_SIZES, **TINY[name]} for name in ("internlm", "internlm2", "internlm3")},
    "reward": {**_SIZES, **TINY["internlm2"], "architectures": ["InternLM2ForRewardModel"], "reward_token_id": 96},
}
NUMBERS = st.one_of(st.integers(-3, 200000), st.just(1 << 70), st.floats())
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4))
WORDS = st.sampled_from(
    "type rope_type factor base dynamic linear int gptq awq nf4 weights num_bits bits group_0".split()
)
ODD = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3))
)


@pytest.mark.parametrize("family", CONFIGURATIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_configuration(family: str, data: st.DataObject) -> None:
    good = CONFIGURATIONS[family]
    assert isinstance(read_config(good), DecoderConfig)
    keys = sorted({*good, "rope_scaling", "rope_theta", "rotary", "pre_seq_len", "rope_ratio", "reward_token_id"})
    changes = data.draw(st.dictionaries(st.sampled_from(keys), ODD, min_size=1, max_size=3))
    try:
        assert isinstance(read_config({**good, **changes}), DecoderConfig)
    except ConfigError as error:
        assert len(str(error)) < 20_000


@pytest.mark.parametrize("form", CONFIGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_word_about_quantisation(form: str, data: st.DataObject) -> None:
    """Each key of the released `quantization_config`, however deep, may hold anything."""
    values = copy.deepcopy(CONFIGS[form])
    assert isinstance(read_quantisation(values, Path("config.json")), Quantisation)
    places = [(values, key) for key in values]
    for inner in (v for v in values.values() if isinstance(v, dict)):
        places += [(inner, key) for key in inner]
        places += [(deeper, key) for deeper in inner.values() if isinstance(deeper, dict) for key in deeper]
    for _ in range(data.draw(st.integers(1, 2))):
        owner, key = data.draw(st.sampled_from(places))
        if data.draw(st.booleans()):
            owner[key] = data.draw(ODD)
        else:
            owner.pop(key, None)
    try:
        assert isinstance(read_quantisation(values, Path("config.json")), Quantisation)
    except ConfigError as error:
        assert str(error).startswith("config.json") and len(str(error)) < 5000


NAMES = ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


def test_any_prefix(tmp_path: Path) -> None:
    """Names, shapes and dtypes of a prefix's tensors, some of them wrong."""
    values = config()
    model = write(tmp_path / "model", values, weights(values))
    plain = {"embedding.weight": (3, 128)}
    projected = dict(zip(NAMES, ((3, 32), (32, 32), (32,), (128, 32), (128,)), strict=True))
    rng, outcomes = random.Random(5), [0, 0]
    for number in range(40):
        shapes = dict(rng.choice((plain, projected)))
        dtype = rng.choice((torch.float32, torch.float16, torch.int8))
        for _ in range(rng.choice((0, 1, 1, 2))):
            name = rng.choice(NAMES)
            way = rng.randrange(3)
            if way == 0:
                shapes.pop(name, None)
            elif way == 1:
                shapes[name] = tuple(rng.choice((0, 1, 3, 32, 128)) for _ in range(rng.randrange(4)))
            else:
                shapes[f"{name}.more"] = (1,)
        at = "transformer.prefix_encoder." if rng.random() < 0.7 else ""
        path = tmp_path / f"prefix-{number}"
        path.mkdir()
        tensors = {f"{at}{name}": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        save_file(tensors or {"a": torch.zeros(1)}, path / "model.safetensors")
        try:
            made = load_model(model, dtype=torch.float32, device=torch.device("cpu"), prefix=path).model
            assert made.parts().prefix is not None  # type: ignore[operator]
            outcomes[0] += 1
        except (CheckpointError, ConfigError):
            outcomes[1] += 1
    assert min(outcomes) > 3


@pytest.mark.parametrize("file", ["ice_text.model", "tokenizer.model"])
def test_damaged_tokenizers(tmp_path: Path, file: str) -> None:
    first = file == "ice_text.model"
    good = tokenizer_model() if first else later_tokenizer()
    values = config() if first else later_config(padded_vocab_size=500)
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": 600}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    rng, outcomes = random.Random(3), [0, 0]
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice((0, 1, 1, 2, 6))):
            at, way = rng.randrange(len(data)), rng.randrange(3)
            if way == 0:
                data[at] = rng.randrange(256)
            elif way == 1:
                del data[at : at + rng.choice((1, 7, 200))]
            else:
                data[at:at] = data[rng.randrange(len(data)) :][:40]
        (tmp_path / file).write_bytes(data)
        try:
            tokenizer = load_tokenizer(tmp_path)
            assert isinstance(tokenizer.decode(tokenizer.encode("the cat 你好\n", add_special=True)), str)
            outcomes[0] += 1
        except TokenizerError as error:
            assert len(str(error)) < 5000
            outcomes[1] += 1
    assert min(outcomes) > 5
