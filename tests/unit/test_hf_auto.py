"""Transformers' Auto classes choose Hanlin's, and no code of a model's directory runs, whatever is asked for."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_directory import code_ran, config, make_directory, small_tokenizer_config, write_json

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

import hanlin.hf as hf  # noqa: E402 - after the check above
from hanlin.errors import ConfigError, HanlinError, TokenizerError  # noqa: E402

TRUST: list[dict[str, Any]] = [{}, {"trust_remote_code": False}, {"trust_remote_code": True}]
trusting = pytest.mark.parametrize("trust", TRUST, ids=["unsaid", "untrusted", "trusted"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("hf") / "internlm2-chat", tokenizer="small")


@pytest.fixture
def directory(made: Path) -> Iterator[Path]:
    yield made
    assert not code_ran(made)


@trusting
@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        ("AutoConfig", hf.InternLM2Config),
        ("AutoModel", hf.InternLM2ForCausalLM),  # as the released auto_map has it
        ("AutoModelForCausalLM", hf.InternLM2ForCausalLM),
        ("AutoModelForSequenceClassification", hf.InternLM2ForSequenceClassification),
    ],
)
def test_auto_classes(directory: Path, auto: str, expected: type, trust: dict[str, Any]) -> None:
    assert type(getattr(transformers, auto).from_pretrained(directory, **trust)) is expected


@trusting
@pytest.mark.parametrize(
    ("wanted", "expected", "side"),
    [
        ({}, hf.InternLM2TokenizerFast, "left"),
        ({"use_fast": True}, hf.InternLM2TokenizerFast, "left"),
        ({"use_fast": False}, hf.InternLM2Tokenizer, "right"),
    ],
)
def test_auto_tokenizer(
    directory: Path, wanted: dict[str, Any], expected: type, side: str, trust: dict[str, Any]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **wanted, **trust)
    assert type(tokenizer) is expected
    assert tokenizer.padding_side == side
    plain = tokenizer("in the", add_special_tokens=False)["input_ids"]
    assert tokenizer("in the")["input_ids"] == [1, *plain]
    assert tokenizer.decode(plain) == "in the"


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("use_fast", [True, False])
def test_padding_side_can_be_chosen(directory: Path, use_fast: bool, padding_side: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, use_fast=use_fast, padding_side=padding_side)
    assert tokenizer.padding_side == padding_side


@pytest.mark.parametrize("named", ["InternLM2Tokenizer", "InternLM2TokenizerFast", "LlamaTokenizer", None])
def test_the_configuration_decides_whatever_the_tokenizer_is_called(tmp_path: Path, named: str | None) -> None:
    path = make_directory(tmp_path / "m", tokenizer="small")
    values = small_tokenizer_config()
    values["tokenizer_class"] = named
    write_json(path / "tokenizer_config.json", {k: v for k, v in values.items() if v is not None})
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    assert type(tokenizer) is hf.InternLM2TokenizerFast
    assert not code_ran(path)


@pytest.mark.parametrize("auto_map", [["tokenization_internlm2.InternLM2Tokenizer", None], {"AutoTokenizer": []}])
@pytest.mark.parametrize("keep_config", [True, False])
def test_a_directory_with_a_tokenizer_alone(tmp_path: Path, keep_config: bool, auto_map: Any) -> None:
    path = make_directory(tmp_path / "m", tokenizer="small")
    write_json(path / "tokenizer_config.json", {**small_tokenizer_config(), "auto_map": auto_map})
    if not keep_config:
        (path / "config.json").unlink()
    for use_fast in (True, False):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True, use_fast=use_fast)
        assert isinstance(tokenizer, (hf.InternLM2Tokenizer, hf.InternLM2TokenizerFast))
    assert not code_ran(path)


def test_a_configuration_handed_in(directory: Path) -> None:
    given = hf.InternLM2Config.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, config=given, trust_remote_code=True)
    assert type(tokenizer) is hf.InternLM2TokenizerFast
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, config=given, trust_remote_code=True)
    assert type(model) is hf.InternLM2ForCausalLM
    model = transformers.AutoModelForCausalLM.from_config(given, trust_remote_code=True)
    assert type(model) is hf.InternLM2ForCausalLM


def test_other_auto_classes_cannot_follow_auto_map(directory: Path) -> None:
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(directory, trust_remote_code=True)


def test_generation_code_of_the_directory_does_not_run(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    ids = torch.tensor([[1, 984]])
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 2
    with pytest.raises(OSError, match="no code from model directories"):
        model.generate(ids, custom_generate=str(directory), trust_remote_code=True)


def test_pipeline(directory: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(directory), trust_remote_code=True, dtype=torch.float32)
    assert type(pipe.model) is hf.InternLM2ForCausalLM
    reply = pipe([{"role": "user", "content": "hi"}], max_new_tokens=3, do_sample=False)
    assert reply[0]["generated_text"][-1]["role"] == "assistant"


def test_custom_pipelines_are_dropped(tmp_path: Path) -> None:
    custom = {"bait": {"impl": "modeling_internlm2.Bait", "pt": ["AutoModelForCausalLM"]}}
    path = make_directory(tmp_path / "m", tokenizer="none")
    write_json(path / "config.json", config(custom_pipelines=custom))
    read = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert not hasattr(read, "custom_pipelines")
    assert not hasattr(read, "auto_map")
    assert not code_ran(path)


def test_other_families_stay_with_transformers(tmp_path: Path) -> None:
    """A tokenizer that is not ours goes the way it went before, errors included."""
    from tokenizers import Tokenizer, models

    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    plain.save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert not isinstance(loaded, (hf.InternLM2Tokenizer, hf.InternLM2TokenizerFast))
    assert loaded.get_vocab() == {"a": 0}
    with pytest.raises((OSError, ValueError)):
        transformers.AutoTokenizer.from_pretrained(tmp_path / "nothing")


def test_registering_again_changes_nothing(directory: Path) -> None:
    from hanlin.hf.internlm2 import FAMILY
    from hanlin.hf.register import register

    before = transformers.AutoTokenizer.from_pretrained.__func__.__wrapped__
    register(FAMILY)
    assert transformers.AutoTokenizer.from_pretrained.__func__.__wrapped__ is before
    assert type(transformers.AutoTokenizer.from_pretrained(directory)) is hf.InternLM2TokenizerFast


def test_the_files_attention_key_is_tolerated(tmp_path: Path) -> None:
    path = make_directory(tmp_path / "m", tokenizer="none", attn_implementation="flash_attention_2")
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert load(path).config._attn_implementation == "sdpa"
    for asked in ("eager", "sdpa"):
        assert load(path, attn_implementation=asked).config._attn_implementation == asked


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "auto"])
def test_dtype(directory: Path, name: str, dtype: torch.dtype | str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **{name: dtype})
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)


def test_loading_reports_nothing_odd(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    try:
        _, info = hf.InternLM2ForCausalLM.from_pretrained(directory, output_loading_info=True)
        hf.InternLM2Model.from_pretrained(directory)
    finally:
        logger.propagate = before
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_save_and_load_give_the_same_tensors(directory: Path, tmp_path: Path, tied: bool, sharded: bool) -> None:
    values = hf.InternLM2Config(**config(tie_word_embeddings=tied, vocab_size=30_000))
    model = transformers.AutoModelForCausalLM.from_config(values, dtype=torch.bfloat16)
    assert (model.output.weight is model.model.tok_embeddings.weight) == tied
    model.save_pretrained(tmp_path, max_shard_size="1MB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors").exists() != sharded
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert (again.output.weight is again.model.tok_embeddings.weight) == tied
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_scaling", "rope_theta", "bias", "num_key_value_heads", "max_position_embeddings"):
        assert saved[key] == config()[key], key
    assert "auto_map" not in saved


def test_saved_names_are_the_released_ones(directory: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    hf.InternLM2ForCausalLM.from_pretrained(directory).save_pretrained(tmp_path)
    with (
        safe_open(directory / "model.safetensors", "pt") as released,
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
    ):
        assert set(saved.keys()) == set(released.keys())
        for name in released.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(saved.get_tensor(name), released.get_tensor(name)), name


def test_stray_rotary_tables_are_skipped(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, tmp_path / "m")
    weights = load_file(directory / "model.safetensors")
    for table in ("inv_freq", "cos_cached", "sin_cached"):
        weights[f"model.layers.0.attention.rotary_emb.{table}"] = torch.ones(4)
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    _, info = hf.InternLM2ForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_transformers_5_rope_parameters(tmp_path: Path) -> None:
    values = config(rope_parameters={"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5e7})
    del values["rope_scaling"], values["rope_theta"]
    write_json(tmp_path / "config.json", values)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (read.rope_theta, read.rope_scaling) == (5e7, {"rope_type": "dynamic", "factor": 2.5})
    rope = read.to_hanlin().rope
    assert (rope.kind, rope.factor, rope.base) == ("dynamic", 2.5, 5e7)


def test_missing_keys_mean_what_the_released_code_means() -> None:
    read = hf.InternLM2Config()
    numbers = read.to_hanlin()
    assert (numbers.vocab_size, numbers.hidden_size, numbers.intermediate_size) == (103168, 4096, 11008)
    assert (numbers.num_layers, numbers.num_heads, numbers.num_kv_heads, numbers.max_positions) == (32, 32, 32, 2048)
    assert (numbers.norm_eps, numbers.qkv_bias, numbers.out_bias, numbers.rope.base) == (1e-6, True, True, 10000.0)
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"sliding_window": 4096, "use_logn_attn": True}, "use_logn_attn"),
    ],
)
def test_numbers_that_cannot_be_honoured(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    write_json(tmp_path / "config.json", config(**changes))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        transformers.AutoModelForCausalLM.from_config(read)


def test_notes_of_other_tools_do_no_harm(tmp_path: Path) -> None:
    read = hf.InternLM2Config(**config(unsloth_version="2024.9", id2label={"0": "a", "1": "b", "2": "c"}))
    read.some_note = None
    read._private = 3
    assert read.to_hanlin().hidden_size == 32
    assert read.num_labels == 3


@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:f868\nsize 1477754\n", "Git LFS"),
        (b"", "empty"),
        (b"\x0a\xff\xff\xff\xff\x0fjunk", "tokenizer.model"),
        (None, "tokenizer.model"),
    ],
    ids=["pointer", "empty", "junk", "missing"],
)
def test_broken_tokenizer_files(tmp_path: Path, content: bytes | None, named: str, use_fast: bool) -> None:
    path = make_directory(tmp_path / "m", tokenizer="small")
    (path / "tokenizer.model").unlink()
    if content is not None:
        (path / "tokenizer.model").write_bytes(content)
    with pytest.raises((TokenizerError, OSError), match=named) as caught:
        transformers.AutoTokenizer.from_pretrained(path, use_fast=use_fast, trust_remote_code=True)
    assert content is None or isinstance(caught.value, HanlinError)
    assert not code_ran(path)


def test_without_transformers_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import hanlin.hf\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MissingExtraError" in done.stdout
    assert "pip install 'hanlin[hf]'" in done.stdout
