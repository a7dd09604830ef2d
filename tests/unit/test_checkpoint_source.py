"""Finding weights: files, directories, shards, caches; and what stands where weights should."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError, ModelNotFoundError, UnsafeCheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4512654\n"
NAMES = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")


def save_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("g", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shards(directory: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Three shards of two tensors each, with their index; the weight map."""
    weight_map = {}
    for number in range(3):
        name = NAMES[number].replace(".safetensors", suffix)
        tensors = {f"{letter}{number}": torch.full((2,), float(number)) for letter in "ab"}
        if suffix == ".bin":
            name = f"pytorch_{name}"
            torch.save(tensors, directory / name)
        else:
            save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index(directory, weight_map, suffix)
    return weight_map


def index(directory: Path, weight_map: object, suffix: str = ".safetensors") -> None:
    name = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))


def names(path: Path) -> list[str]:
    with open_source(path) as source:
        return list(source.infos)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised, open_source(path):
        pass
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_with_an_index(tmp_path: Path, suffix: str) -> None:
    weight_map = shards(tmp_path, suffix)
    with open_source(tmp_path) as source:
        assert sorted(source.infos) == sorted(weight_map)
        for name, shard in weight_map.items():
            assert source.infos[name].file == tmp_path / shard
            assert source.load(name).tolist() == [float(name[1])] * 2
            assert source.raw(name).tobytes() == source.load(name).numpy().tobytes()
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            source.load("c")
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            source.raw("c")


def test_shards_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert names(tmp_path) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    for name in NAMES[::2]:
        (tmp_path / name).unlink()
    message = refused(tmp_path)
    assert NAMES[0] in message and NAMES[2] in message and NAMES[1] not in message


def test_what_is_preferred(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf")
    assert names(tmp_path) == ["g"]
    torch.save({"adapter": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    assert names(tmp_path) == ["adapter"]
    shards(tmp_path, ".bin")
    assert "a0" in names(tmp_path)
    torch.save({"bin": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert names(tmp_path) == ["bin"]
    save_file({"loose": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert names(tmp_path) == ["loose"]
    (tmp_path / "other.safetensors").unlink()
    shards(tmp_path)
    assert len(names(tmp_path)) == 6
    save_file({"single": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert names(tmp_path) == ["single"]


def test_single_files_by_suffix_and_by_content(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf")
    save_file({"s": torch.zeros(1)}, tmp_path / "x.safetensors")
    torch.save({"b": torch.zeros(1)}, tmp_path / "x.bin")
    for suffix, name in ((".gguf", "g"), (".safetensors", "s"), (".bin", "b")):
        assert names(tmp_path / f"x{suffix}") == [name]
        blob = shutil.copy(tmp_path / f"x{suffix}", tmp_path / f"sha256-{name}")
        assert names(blob) == [name]
    (tmp_path / "notes").write_text("hello, I am no weights")
    assert "no format of weights that is known" in refused(tmp_path / "notes")


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """As Hugging Face lays out its cache: snapshots of links into a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shards(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    assert len(names(snapshot)) == 6
    (blobs / f"{1:064x}").unlink()
    assert "a link that leads nowhere" in refused(snapshot)
    assert "leads nowhere" in refused(snapshot / NAMES[1])


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / NAMES[2]).unlink()
    message = refused(tmp_path)
    assert NAMES[0] in message and NAMES[2] in message and "2 of 3 files" in message and NAMES[1] not in message


@pytest.mark.parametrize(
    "name",
    (
        *("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "C:x.safetensors"),
        *("C:\\x.safetensors", "..", ".", "", ".safetensors", "a\0.safetensors", "a\n.safetensors"),
        *("model.bin", "config.json", "modeling.py"),
    ),
)
def test_an_index_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    """CVE-2024-37032: names from outside are never joined to a path unchecked."""
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"y": torch.zeros(1)}, inside / "y.safetensors")
    index(inside, {"x": name, "y": "y.safetensors"})
    assert "is not a plain name of a .safetensors file" in refused(inside)


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    index(tmp_path, weight_map | {"a0": NAMES[1], "c": NAMES[2], "d": NAMES[2]})
    message = refused(tmp_path)
    assert "'a0' is listed in model-00002" in message and "is in model-00001" in message
    assert "'c' is listed, but not in model-00003" in message and "'d' is listed" in message


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = shards(tmp_path)
    save_file({"a0": torch.zeros(1), "a2": torch.zeros(1), "b2": torch.zeros(1)}, tmp_path / NAMES[2])
    index(tmp_path, weight_map)
    assert f"'a0' is in {NAMES[0]} and in {NAMES[2]}" in refused(tmp_path)


def test_all_broken_shards_are_named(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / NAMES[0]).write_bytes(POINTER)
    (tmp_path / NAMES[2]).write_bytes(b"")
    message = refused(tmp_path)
    assert "Git LFS pointer" in message and "is empty" in message and NAMES[0] in message and NAMES[2] in message


def test_one_unsafe_shard_makes_the_model_unsafe(tmp_path: Path) -> None:
    shards(tmp_path, ".bin")
    torch.save({"a0": print}, tmp_path / f"pytorch_{NAMES[0].replace('safetensors', 'bin')}")
    (tmp_path / f"pytorch_{NAMES[1].replace('safetensors', 'bin')}").write_bytes(b"")
    with pytest.raises(UnsafeCheckpointError, match="is empty"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "{"]
)
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "m.gguf",
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "blob",
    ],
)
def test_git_lfs_pointers_and_empty_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for where in (path, tmp_path) if name != "blob" else (path,):
        path.write_bytes(POINTER)
        message = refused(where)
        assert "Git LFS pointer" in message and "git lfs pull" in message and str(path) in message
        path.write_bytes(b"")
        assert "is empty" in refused(where)


def test_directories_without_weights_say_what_is_there(tmp_path: Path) -> None:
    assert "It is empty" in refused(tmp_path)
    for name in ("config.json", "modeling_x.py", "training_args.bin", "optimizer.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert "config.json, modeling_x.py, optimizer.pt, training_args.bin" in refused(tmp_path)
    for number in range(2):
        (tmp_path / f"{number}.gguf").write_bytes(b"GGUF")
    assert "several GGUF files: 0.gguf, 1.gguf" in refused(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        open_source(tmp_path / "nothing.gguf")
    with pytest.raises((CheckpointError, ModelNotFoundError)):
        open_source("a\0b.gguf")
    with pytest.raises((CheckpointError, ModelNotFoundError)):
        open_source("x" * 5000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "this is not a file" in refused(tmp_path)
    (tmp_path / "x.gguf").symlink_to("/dev/zero")
    assert "this is not a file" in refused(tmp_path / "x.gguf")
    (tmp_path / "sub.gguf").mkdir()
    assert "no weights" in refused(tmp_path / "sub.gguf")


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    path.chmod(0)
    try:
        path.open("rb").close()
    except PermissionError:
        pass
    else:  # root reads everything

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
    assert "no permission to read it" in refused(path)


def test_code_beside_the_weights_is_never_touched(tmp_path: Path) -> None:
    """CVE-2025-66448, CVE-2026-22807: a directory with `auto_map` and modules is data."""
    shards(tmp_path)
    for name in ("modeling_bait.py", "configuration_bait.py", "model.py", "__init__.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('the bait was run')\n")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_bait.BaitModel"}}')
    opened: list[str] = []
    watching = True
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if watching and event == "open" else None)
    assert len(names(tmp_path)) == 6
    watching = False
    mine = [path for path in opened if path.startswith(str(tmp_path))]
    assert len(mine) == 4 and not [path for path in mine if path.endswith((".py", "config.json"))]


def test_closing_frees_the_files_but_not_what_was_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    loaded, raw = source.load("a"), source.raw("a")
    source.close()
    source.close()
    assert loaded.tolist() == [0.0, 1.0, 2.0] and raw.size == 12
