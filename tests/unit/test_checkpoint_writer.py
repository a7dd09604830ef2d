"""Writing safetensors: what is read back equals what was given, and a failure changes nothing."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from hanlin.checkpoints.base import DTYPES
from hanlin.checkpoints.safetensors_writer import save_safetensors
from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError, ConfigError


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_one_file(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"b": torch.tensor([True, False, True]), "turned": base.t(), "tied": base, "also tied": base}
    tensors |= {"名": torch.zeros(0, 2), "one": torch.tensor(3, dtype=torch.int16), "g": base.clone().requires_grad_()}
    assert save_safetensors(tmp_path / "new", tensors.items(), metadata={"k": "v"}) == [
        tmp_path / "new/model.safetensors"
    ]
    assert files(tmp_path / "new") == ["model.safetensors"]
    theirs = load_file(tmp_path / "new/model.safetensors")
    with open_source(tmp_path / "new") as source:
        assert list(source.infos) == list(tensors)
        assert dict(source.metadata) == {"format": "pt", "k": "v"}
        for name, tensor in tensors.items():
            assert torch.equal(source.load(name), tensor) and torch.equal(theirs[name], tensor)
            assert source.load(name).dtype == tensor.dtype
    with safe_open(tmp_path / "new/model.safetensors", "pt") as reference:
        assert reference.metadata() == {"format": "pt", "k": "v"}


def test_every_dtype_starts_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (16,), dtype=torch.uint8)
    tensors = {"odd": bits[:3]} | {name: bits.view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    (path,) = save_safetensors(tmp_path, tensors.items())
    with open_source(path) as source:
        start = path.read_bytes()
        for name, tensor in tensors.items():
            assert torch.equal(source.load(name).view(torch.uint8), tensor.view(torch.uint8))
        length = int.from_bytes(start[:8], "little")
        header = json.loads(start[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 100))
def test_shards(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{number}": torch.full((size,), number, dtype=torch.uint8) for number, size in enumerate(sizes)}
    written = save_safetensors(directory, tensors.items(), max_shard_bytes=limit)
    with open_source(directory) as source:
        assert set(source.infos) == set(tensors)
        assert all(torch.equal(source.load(name), tensor) for name, tensor in tensors.items())
        held = {path: [info.nbytes for info in source.infos.values() if info.file == path] for path in written}
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in held.values())
    index = directory / "model.safetensors.index.json"
    assert index.exists() == (len(written) > 1)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(sizes) and set(content["weight_map"]) == set(tensors)


def test_only_one_shard_is_held_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(50):
            tensor = torch.zeros(100, dtype=torch.uint8)
            alive.add(tensor.untyped_storage())
            most = max(most, len(alive))
            yield f"t{number}", tensor
            del tensor

    save_safetensors(tmp_path, stream(), max_shard_bytes=500)
    assert 5 <= most <= 7  # a shard's five, the next one, the one being made
    assert len(list(tmp_path.glob("*.safetensors"))) == 10


def test_older_weights_of_the_same_stem_go(tmp_path: Path) -> None:
    tensors = [(f"t{number}", torch.zeros(8)) for number in range(4)]
    save_safetensors(tmp_path, tensors, stem="adapter_model")
    save_safetensors(tmp_path, tensors, max_shard_bytes=32)
    assert len(files(tmp_path)) == 6
    save_safetensors(tmp_path, tensors, max_shard_bytes=64)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert files(tmp_path) == ["adapter_model.safetensors", *names]
    save_safetensors(tmp_path, tensors[:1])
    assert files(tmp_path) == ["adapter_model.safetensors", "model.safetensors"]
    save_safetensors(tmp_path, tensors, max_shard_bytes=64)
    assert files(tmp_path) == ["adapter_model.safetensors", *names]


def failing() -> Iterator[tuple[str, torch.Tensor]]:
    for number in range(3):
        yield f"t{number}", torch.zeros(8)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], "'a' is given twice"),
        ([("__metadata__", torch.zeros(1))], "keeps for itself"),
        ([("m", torch.zeros(1, device="meta"))], "'m' can't be stored"),
        ([("s", torch.ones(2).to_sparse())], "'s' can't be stored"),
        ([("c", torch.zeros(1, dtype=torch.complex128))], "complex128"),
    ],
)
def test_what_cannot_be_stored(tmp_path: Path, tensors: list[tuple[str, torch.Tensor]], message: str) -> None:
    save_safetensors(tmp_path, [("old", torch.ones(1))])
    with pytest.raises(CheckpointError, match=message):
        save_safetensors(tmp_path, [("first", torch.zeros(8)), *tensors], max_shard_bytes=8)
    assert files(tmp_path) == ["model.safetensors"]
    with open_source(tmp_path) as source:
        assert list(source.infos) == ["old"]


def test_an_interruption_leaves_the_old_weights(tmp_path: Path) -> None:
    save_safetensors(tmp_path, [("old", torch.ones(1))])
    with pytest.raises(KeyboardInterrupt):
        save_safetensors(tmp_path, failing(), max_shard_bytes=8)
    assert files(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_old_weights(tmp_path: Path) -> None:
    """A real refusal of the system, in the middle of the second shard: files may not grow past a limit."""
    import resource
    import signal

    save_safetensors(tmp_path, [("old", torch.ones(1))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written: .* bytes are free"):
            save_safetensors(tmp_path, [("a", torch.zeros(100)), ("b", torch.zeros(10_000))], max_shard_bytes=400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert files(tmp_path) == ["model.safetensors"]


def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_safetensors(tmp_path / "file" / "sub", [("a", torch.zeros(1))])
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        save_safetensors(tmp_path, [], max_shard_bytes=0)
