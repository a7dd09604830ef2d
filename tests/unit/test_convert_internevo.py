"""To InternEvo and back: the same bits for every cut, files that torch itself reads, and going on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hanlin.checkpoints import convert_directory
from hanlin.checkpoints.convert import convert
from hanlin.checkpoints.source import open_source
from hanlin.checkpoints.weights import Weights
from hanlin.errors import CheckpointError, ConfigError
from hanlin.models.registry import build, read_config
from hf_directory import TOKENIZER, make_directory
from internevo_directory import make_internevo


def model(path: Path, **changes: Any) -> Path:
    values = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, **changes}
    return make_directory(path, tokenizer="small", **values)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].numpy(force=True).tobytes() == other[name].numpy(force=True).tobytes()
        if one[name].dtype is not torch.bfloat16
        else torch.equal(one[name].view(torch.int16), other[name].view(torch.int16))
        for name in one
    )


@pytest.mark.parametrize("adapt_hf", [True, False])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_there_and_back(tmp_path: Path, tp: int, pp: int, adapt_hf: bool) -> None:
    first = model(tmp_path / "a", bias=tp == 2)
    evo = convert(first, tmp_path / "evo", to="internevo", tp=tp, pp=pp, adapt_hf=adapt_hf)
    files = {f"model_tp{t}_pp{p}.pt" for t in range(tp) for p in range(pp)} | {"model_config.pt"}
    assert {file.name for file in evo.glob("*.pt")} == files
    back = convert(evo, tmp_path / "back", to="hf")
    assert same(weights(first), weights(back))
    before, after = (json.loads((path / "config.json").read_text()) for path in (first, back))
    assert {**before, "auto_map": None} == {**after, "auto_map": None}
    assert (back / "tokenizer.model").read_bytes() == (first / "tokenizer.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "back", "evo"]


@pytest.mark.parametrize("adapt_hf", [True, False])
def test_torch_reads_what_an_independent_cut_gives(tmp_path: Path, adapt_hf: bool) -> None:
    first = model(tmp_path / "a")
    evo = convert(first, tmp_path / "evo", to="internevo", tp=2, pp=3, adapt_hf=adapt_hf)
    values = json.loads((first / "config.json").read_text())
    theirs = make_internevo(tmp_path / "b", weights(first), {**values, "_kind": "w"}, tp=2, pp=3, adapt_hf=adapt_hf)
    for file in theirs.glob("model_tp*.pt"):
        want, have = torch.load(file), torch.load(evo / file.name, weights_only=True)
        assert same(want, have), file.name
    said = torch.load(evo / "model_config.pt", weights_only=True)
    for name, value in torch.load(theirs / "model_config.pt").items():
        assert said[name] == value, name
    assert said["norm_head"] is False and said["dtype"] is torch.bfloat16


def test_mapped_and_checked_by_torch(tmp_path: Path) -> None:
    evo = convert(model(tmp_path / "a"), tmp_path / "evo", to="internevo")
    torch.serialization.set_crc32_options(True)
    mapped = torch.load(evo / "model_tp0_pp0.pt", mmap=True, weights_only=True)
    assert all(value.data_ptr() % 64 == 0 for value in mapped.values())


def test_internlm_1_and_llama(tmp_path: Path) -> None:
    config = {
        "model_type": "internlm",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "bias": True,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(config))
    names = build(read_config(config), dtype=torch.float32).named_parameters()
    state = {name: torch.randn(parameter.shape).half() for name, parameter in names}
    save_file(state, old / "model.safetensors", metadata={"format": "pt"})
    evo = convert(old, tmp_path / "evo", to="internevo", tp=2, pp=2)
    assert same(weights(convert(evo, tmp_path / "back", to="hf")), state)
    want = make_internevo(tmp_path / "want", state, {**config, "_kind": "v1"}, tp=2, pp=2)
    for file in want.glob("model_tp*.pt"):
        assert same(torch.load(file), torch.load(evo / file.name)), file.name
    first = model(tmp_path / "a")
    llama = convert(first, tmp_path / "llama", to="llama")
    again = convert(convert(llama, tmp_path / "evo2", to="internevo", tp=2), tmp_path / "c", to="internlm2")
    assert same(weights(again), weights(first))


def test_from_training_to_llama_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    values = json.loads((first / "config.json").read_text())
    evo = make_internevo(tmp_path / "evo", weights(first), {**values, "_kind": "w"}, tp=2, pp=2, adapt_hf=False)
    made = convert(evo, tmp_path / "b", to="llama", lent=first / "tokenizer.model")
    assert same(weights(made), weights(convert(first, tmp_path / "c", to="llama")))
    assert json.loads((made / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert json.loads((made / "config.json").read_text())["max_position_embeddings"] == 32768
    whole = convert(evo, tmp_path / "d", to="hf", lent=first)
    assert "chat_template" in json.loads((whole / "tokenizer_config.json").read_text())
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        convert(evo, tmp_path / "e", to="hf", lent=first / "LICENSE")
    assert TOKENIZER.is_file()


def test_what_does_not_divide_is_said_at_once(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"(?s)--tp 8 does not divide 4 key.*1500 rows of the head.*--pp 9 is more"):
        convert(first, tmp_path / "b", to="internevo", tp=8, pp=9)
    with pytest.raises(ConfigError, match="for --to internevo"):
        convert(first, tmp_path / "b", to="llama", tp=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("to", ["llama", "internevo"])
@pytest.mark.parametrize("damage", [False, True])
def test_it_goes_on_where_it_stopped(tmp_path: Path, to: str, damage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_directory, "_SHARD_BYTES", 1 << 14)
    first = model(tmp_path / "a")

    def stopping(done: int, total: int) -> None:
        if done > 0.25 * total:
            raise Stop

    with pytest.raises(Stop):
        convert(first, tmp_path / "b", to=to, progress=stopping)
    hidden = tmp_path / ".b.converting"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.converting", "a"]
    kept = [path for path in hidden.rglob("*") if path.is_file() and path.stat().st_size > 1 << 13]
    assert kept
    if damage:
        with kept[0].open("r+b") as file:
            file.seek(kept[0].stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    asked: list[str] = []
    compared: list[int] = []
    load = Weights.load

    def counted(self: Weights, name: str) -> torch.Tensor:
        value = load(self, name)
        asked.extend([] if value.is_meta else [name])
        return value

    monkeypatch.setattr(Weights, "load", counted)
    monkeypatch.setattr(convert_directory.DirectoryTarget, "compare", lambda *_: compared.append(len(asked)))
    convert(first, tmp_path / "b", to=to)
    monkeypatch.undo()
    monkeypatch.setattr(convert_directory, "_SHARD_BYTES", 1 << 14)
    count = len(weights(first)) + (6 if to == "llama" else 0)  # q, k and v are asked for one by one
    assert (0 < compared[0] < count) or damage
    fresh = convert(first, tmp_path / "c", to=to)
    if to == "llama":
        assert same(weights(tmp_path / "b"), weights(fresh))
    else:
        with open_source(tmp_path / "b") as one, open_source(fresh) as other:
            assert all(torch.equal(one.load(name), other.load(name)) for name in other.infos)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in fresh.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_another_plan_begins_anew(tmp_path: Path) -> None:
    first = model(tmp_path / "a")

    def stopping(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        convert(first, tmp_path / "b", to="internevo", tp=2, progress=stopping)
    evo = convert(first, tmp_path / "b", to="internevo")
    assert [file.name for file in evo.glob("model_tp*")] == ["model_tp0_pp0.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model(tmp_path / "a")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_directory, "save_resumably", full)
    with pytest.raises(CheckpointError, match=r"(?s)No space left.*same command goes on"):
        convert(first, tmp_path / "b", to="llama")
    monkeypatch.undo()
    convert(first, tmp_path / "b", to="llama")


def test_the_verb(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    evo = tmp_path / "evo"
    words = [sys.executable, "-m", "hanlin"]
    command = [*words, "convert", str(first), str(evo), "--to", "internevo", "--tp", "2", "--no-adapt-hf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(evo)), done.stderr
    shown = subprocess.run([*words, "show", str(evo)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "internlm2" in shown.stdout, shown.stderr
    (evo / "config.json").unlink()
    bare = subprocess.run([*words, "show", str(evo), "--json"], capture_output=True, text=True, check=False)
    assert bare.returncode == 0 and "internlm2" in bare.stdout, bare.stderr
