"""Directories of packed weights: mapped, the same answers as from the original, and readable without mapping."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hanlin
from hanlin.checkpoints.packed import IMAGE_FILE, PackedSource, tile_bytes
from hanlin.checkpoints.source import open_source
from hanlin.engine import lowering
from hanlin.errors import CheckpointError, ConfigError
from hanlin.kernels.native import available
from hanlin.packing import pack_model
from hf_directory import code_ran, make_directory

pytestmark = pytest.mark.skipif(not available(), reason="the native library is not built")
PROMPT = [[1, 5, 9, 700, 33]]


def model(path: Path, **changes: Any) -> Path:
    values = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    return make_directory(path, tokenizer="small", **values)


def tokens(path: Path, **options: Any) -> tuple[list[int], bool]:
    """What it says, and whether its weights were mapped."""
    with hanlin.load(path, packed_cache=False, cache_max_entry_count=32, session_len=128, **options) as llm:
        (reply,) = llm.generate(PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
        packed = getattr(llm.engine.runner, "_lowering", None)
        return list(reply.ids), bool(packed and packed.cached)


@pytest.mark.parametrize("weights", ["int8", "int4", "bfloat16"])
def test_the_same_answers_without_the_original(tmp_path: Path, weights: str) -> None:
    first = model(tmp_path / "a", bias=weights == "int4")
    made = pack_model(first, tmp_path / "b", weights=weights)
    want, mapped = tokens(first, weights=weights)
    assert not mapped
    shutil.rmtree(first)
    assert tokens(made) == (want, True)
    assert not code_ran(made) and not list(made.rglob("*.py"))
    assert "auto_map" not in (made / "config.json").read_text() + (made / "tokenizer_config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize("weights", ["int8", "int4", "bfloat16"])
def test_another_layout_is_packed_again(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pack_model(model(tmp_path / "a", bias=True), tmp_path / "b", weights=weights)
    want, _ = tokens(made)
    monkeypatch.setattr(lowering, "LAYOUT_VERSION", 99)
    assert tokens(made) == (want, False)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_first_version_is_read_too(tmp_path: Path, weights: str) -> None:
    """It had no units before the groups of a tile."""
    made = pack_model(model(tmp_path / "a"), tmp_path / "b", weights=weights)
    want, _ = tokens(made)
    image = made / IMAGE_FILE
    with safe_open(image, "pt") as file:
        said = json.loads(file.metadata()["hanlin"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for number, slot in enumerate(said["slots"]):
        size = tile_bytes(slot["kind"], slot["group"], slot["in"])
        tiles = tensors[f"packed.{number}"][: -(-slot["out"] // 32) * size].view(-1, size)[:, 128:].flatten()
        tensors[f"packed.{number}"] = torch.nn.functional.pad(tiles, (0, -len(tiles) % 64))
    said |= {"version": 1, "layout": "00", "offset": 0, "size": 4096}
    save_file(tensors, image, {"hanlin": json.dumps(said)})
    assert tokens(made) == (want, False)


def test_torch_reads_it_too(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    made = pack_model(first, tmp_path / "b", weights="bfloat16")
    with open_source(first) as theirs, open_source(made) as base:
        ours = PackedSource(base)
        assert set(ours.infos) == set(theirs.infos)
        assert all(torch.equal(ours.load(name).float(), theirs.load(name).float()) for name in theirs.infos)
    assert tokens(made, runner="torch", dtype="float32")[0] == tokens(first, runner="torch", dtype="float32")[0]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_codes_read_by_row_are_what_the_library_unpacks(tmp_path: Path, weights: str) -> None:
    made = pack_model(model(tmp_path / "a"), tmp_path / "b", weights=weights)
    with (
        hanlin.load(made, packed_cache=False, cache_max_entry_count=32, session_len=128) as llm,
        open_source(made) as base,
    ):
        packed, runner = PackedSource(base), llm.engine.runner
        for slot in runner._lowering.slots:
            values = runner._context.unpack(slot.weight)
            for name, places in slot.places.items():
                assert np.allclose(packed.load(name).numpy(), values[places], rtol=1e-6, atol=0)


def test_damage_is_found_and_nothing_is_removed(tmp_path: Path) -> None:
    made = pack_model(model(tmp_path / "a"), tmp_path / "b", weights="int8")
    image = made / IMAGE_FILE
    with image.open("r+b") as file:
        file.seek(-9000, 2)
        byte = file.read(1)
        file.seek(-9000, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"(?s)packed\.safetensors.*damaged.*convert the model again"):
        tokens(made)
    assert image.is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.update(version=3), "version 3"),
        (lambda said: said["slots"][0].update(out=1 << 40), "packed weight 0"),
        (lambda said: said["slots"][1].update(group=64), r"packed\.1"),
        (lambda said: said["slots"].pop(), "unexpected|packed"),
        (lambda said: said.update(offset=12), "makes no sense"),
        (lambda said: said.update(size=1 << 40), "behind the file"),
        (lambda said: said["slots"][0]["weights"].append("x.weight"), r"x\.rows"),
    ],
)
def test_metadata_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    made = pack_model(model(tmp_path / "a"), tmp_path / "b", weights="int8")
    image = made / IMAGE_FILE
    data = image.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    said = json.loads(header["__metadata__"]["hanlin"])
    change(said)
    header["__metadata__"]["hanlin"] = json.dumps(said)
    text = json.dumps(header).encode()
    assert len(text) <= length
    image.write_bytes(data[:8] + text + b" " * (length - len(text)) + data[8 + length :])
    with pytest.raises(CheckpointError, match=message):
        tokens(made)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    first = model(tmp_path / "a", hidden_size=40, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="multiple of 32"):
        pack_model(first, tmp_path / "b", weights="int8")
    with pytest.raises(CheckpointError, match="exists already"):
        pack_model(first, first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_verb_and_the_file_for_others(tmp_path: Path) -> None:
    first, made = model(tmp_path / "a"), tmp_path / "b"
    words = [sys.executable, "-m", "hanlin"]
    command = [*words, "convert", str(first), str(made), "--to", "hanlin", "--weights", "int4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(made)), done.stderr
    with safe_open(made / IMAGE_FILE, "pt") as file:
        assert "packed.0" in file.keys()  # noqa: SIM118 (not a dictionary)
    shown = subprocess.run([*words, "show", str(made)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "internlm2" in shown.stdout, shown.stderr
