"""InternLM2 as Llama and back: the same bits, the same logits, and nothing left behind by a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hanlin.checkpoints import convert_directory as module
from hanlin.checkpoints.convert import convert
from hanlin.checkpoints.load import load_model
from hanlin.errors import CheckpointError, ConfigError
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.tokenizers import load_tokenizer
from hf_directory import make_directory


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(path: Path) -> torch.Tensor:
    model: Any = load_model(path, dtype=torch.float32, device=torch.device("cpu")).model
    ids = torch.arange(3, 15)
    return model.head(model(ids, Positions(torch.arange(12)[None]), PackedAttend([12])))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_there_and_back_gives_the_same_bits(tmp_path: Path, kv_heads: int, bias: bool) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small", num_key_value_heads=kv_heads, bias=bias)
    convert(first, tmp_path / "b", to="llama")
    convert(tmp_path / "b", tmp_path / "c", to="internlm2")
    before, after = weights(first), weights(tmp_path / "c")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)
    assert torch.allclose(logits(first), logits(tmp_path / "b"), atol=1e-5)
    values = json.loads((first / "config.json").read_text())
    again = json.loads((tmp_path / "c" / "config.json").read_text())
    same = values.keys() - {"auto_map", "attn_implementation", "pretraining_tp"}
    assert {key: again[key] for key in same} == {key: values[key] for key in same}


def test_transformers_runs_the_llama_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers)")
    first = make_directory(tmp_path / "a", tokenizer="small", bias=True)
    convert(first, tmp_path / "b", to="llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.inference_mode():
        theirs = model(torch.arange(3, 15)[None]).logits[0]
    assert torch.allclose(theirs, logits(first), atol=1e-5)


def test_tokens_stay_and_code_does_not(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    convert(first, tmp_path / "b", to="llama")
    text = "Hello 你好\n  two"
    assert load_tokenizer(tmp_path / "b").encode(text) == load_tokenizer(first).encode(text)
    assert not list((tmp_path / "b").rglob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "b" / name).read_text()


def padded(path: Path, rows: int) -> Path:
    """The same model with more rows than its configuration says, as merged adapters leave it."""
    make_directory(path, tokenizer="small")
    held = weights(path)
    for name in ("model.tok_embeddings.weight", "output.weight"):
        held[name] = torch.cat([held[name], torch.zeros(rows, 32, dtype=torch.bfloat16)])
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_extra_rows_are_named_and_cut_when_asked(tmp_path: Path) -> None:
    first = padded(tmp_path / "a", 6)
    with pytest.raises(CheckpointError, match=r"(?s)1500.*1506 rows.*--vocab-size 1500"):
        convert(first, tmp_path / "b", to="llama")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    convert(first, tmp_path / "b", to="llama", vocab_size=1500)
    assert weights(tmp_path / "b")["lm_head.weight"].shape == (1500, 32)
    with pytest.raises(CheckpointError, match="fewer than 1507"):
        convert(first, tmp_path / "c", to="llama", vocab_size=1507)


def test_what_reads_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    save = module.save_resumably

    def flipped(directory: Path, names: Any, load: Any, **options: Any) -> Any:
        return save(directory, names, lambda name: -load(name) if "k_proj" in name else load(name), **options)

    monkeypatch.setattr(module, "save_resumably", flipped)
    with pytest.raises(CheckpointError, match=r"k_proj.weight' does not read as it was written"):
        convert(first, tmp_path / "b", to="llama")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_wrong_cut_shows_in_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    target, right = module.DirectoryTarget, module.DirectoryTarget._as_llama
    monkeypatch.setattr(target, "_as_llama", lambda self, name: right(self, name.replace("k_proj", "v_proj")))
    with pytest.raises(CheckpointError, match="logits of a probe prompt differ"):
        convert(first, tmp_path / "b", to="llama")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_internlm2_cannot_say_is_refused_at_once(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    convert(first, tmp_path / "b", to="llama")
    values = json.loads((tmp_path / "b" / "config.json").read_text())
    values["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    (tmp_path / "b" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="yarn"):
        convert(tmp_path / "b", tmp_path / "c", to="internlm2")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(first, tmp_path / "b", to="llama")


def test_the_verb(tmp_path: Path) -> None:
    first = make_directory(tmp_path / "a", tokenizer="small")
    command = [sys.executable, "-m", "hanlin", "convert", str(first), str(tmp_path / "b"), "--to", "llama"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "b")), done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "exists already" in again.stderr
