"""Safetensors: what a good file gives, and what every broken rule of the header gives."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hanlin.checkpoints.base import DTYPES
from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def build(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised, open_source(path):
        pass
    message = str(raised.value)
    assert str(path) in message and len(message) < 25_000
    return message


def changed(**values: Any) -> dict[str, Any]:
    return {"t": ENTRY | values}


def test_every_dtype_as_the_reference_library_writes_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (4, 48), dtype=torch.uint8, generator=generator)
    stored = {name: (bits > 127 if name == "BOOL" else bits.clone().view(dtype)) for name, dtype in DTYPES.items()}
    path = tmp_path / "m.safetensors"
    save_file({**stored, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7)}, path, metadata={"format": "pt"})
    with open_source(path) as source:
        assert dict(source.metadata) == {"format": "pt"}
        for name, tensor in stored.items():
            loaded, info = source.load(name), source.infos[name]
            assert (info.dtype, info.shape, info.file) == (name, tuple(tensor.shape), path)
            assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
            assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))
            assert source.raw(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes() and info.nbytes == 192
        assert source.load("scalar") == 3.5 and source.infos["scalar"].shape == ()
        assert source.load("empty").shape == (0, 7) and source.raw("empty").size == 0


def test_what_is_loaded_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"t": torch.arange(4.0)}, path)
    with open_source(path) as source:
        source.load("t").zero_()
        assert source.load("t").tolist() == [0.0, 1.0, 2.0, 3.0]
        raw = source.raw("t")
    assert raw.view(np.float32).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_unaligned_data_and_padding(tmp_path: Path) -> None:
    """The format allows any header length, so elements may start at odd bytes."""
    header = json.dumps(
        {"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "f": ENTRY | {"data_offsets": [1, 9]}}
    )
    path = tmp_path / "m.safetensors"
    path.write_bytes(build(header.encode() + b"   ", b"\7" + struct.pack("<ff", 1, 2)))
    with open_source(path) as source:
        assert source.load("f").tolist() == [1.0, 2.0] and source.load("b").tolist() == [7]


def test_a_bool_that_is_neither_0_nor_1_is_true(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(build({"t": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\0\1\xc8"))
    with open_source(path) as source:
        loaded = source.load("t")
    assert loaded.view(torch.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"\0" * 7, "cannot hold", id="seven bytes"),
        pytest.param(build({}, b"", length=1 << 63), "claims 9,223,372,036,854,775,808 bytes", id="length"),
        pytest.param(build(changed())[:40], "only 32 follow", id="cut in the header"),
        pytest.param(build(b"[]"), "must start with '{'", id="an array"),
        pytest.param(build(b" {}"), "must start with '{'", id="leading space"),
        pytest.param(build(b""), "must start with '{'", id="no header"),
        pytest.param(build(b'{"t": '), "not valid JSON", id="half of JSON"),
        pytest.param(build(b'{"\xff": 1}'), "not valid JSON", id="not UTF-8"),
        pytest.param(build('{"a": 1}'.encode("utf-16-le")), "not valid JSON", id="UTF-16"),
        pytest.param(build(b'{"t":' + b"[" * 100_000), "not valid JSON", id="deep"),
        pytest.param(build(b'{"t":' + b"9" * 5000 + b"}"), "not valid JSON", id="long number"),
        pytest.param(build(b'{"t":' + b"[[],[]]," * 2_000_000), "more than 4,194,304 values", id="many values"),
        pytest.param(build(b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"\\u0061":{}}'), "twice", id="twice"),
        pytest.param(build({"__metadata__": {"a": 1}}, b""), "__metadata__", id="metadata number"),
        pytest.param(build({"__metadata__": []}, b""), "__metadata__", id="metadata list"),
        pytest.param(build({"t": 5}), "must be described by an object", id="no object"),
        pytest.param(build({"\ud800": ENTRY}), "not valid Unicode", id="lone surrogate"),
        pytest.param(build(changed(dtype="Q4")), "dtype 'Q4' is not one of", id="dtype"),
        pytest.param(build(changed(dtype=["F32"])), "dtype ['F32'] is not one of", id="dtype list"),
        pytest.param(build(changed(shape=[-2])), "shape [-2]", id="negative"),
        pytest.param(build(changed(shape=[2.0])), "shape [2.0]", id="float"),
        pytest.param(build(changed(shape=[True, 2])), "shape [True, 2]", id="bool"),
        pytest.param(build(changed(shape="2")), "shape '2'", id="text"),
        pytest.param(build(changed(shape=[1] * 65)), "at most 64", id="dimensions"),
        pytest.param(build(changed(shape=[1 << 64])), "shape [18446744073709551616]", id="wide number"),
        pytest.param(build(changed(shape=[1 << 60])), "takes 4,611,686,018,427,387,904 bytes", id="bytes wrap"),
        pytest.param(build(changed(shape=[1 << 62, 4])), "overflows", id="overflow"),
        pytest.param(build(changed(shape=[1 << 32, 1 << 32])), "overflows", id="product wraps to zero"),
        pytest.param(
            build(changed(shape=[0, 1 << 62, 4], data_offsets=[0, 0]), b""),
            "overflows",
            id="nothing, beside a huge one",
        ),
        pytest.param(build(changed(shape=[3])), "takes 12 bytes, but data_offsets hold 8", id="size"),
        pytest.param(build(changed(data_offsets=[8, 0])), "hold -8", id="backwards"),
        pytest.param(build(changed(data_offsets=[0])), "data_offsets [0]", id="one offset"),
        pytest.param(
            build(changed(data_offsets=[8, 16])), "leaves a hole after the header by 8", id="hole at the start"
        ),
        pytest.param(build(changed(), b"\0" * 7), "ends 1 bytes behind the file", id="cut in the data"),
        pytest.param(build(changed(), b"\0" * 9), "1 bytes at the end", id="rest"),
        pytest.param(build({}, b"\0"), "1 bytes at the end", id="nothing but rest"),
        pytest.param(build({"a": ENTRY, "b": ENTRY}), "tensor 'b' overlaps tensor 'a' by 8", id="same place"),
        pytest.param(
            build({"a": ENTRY, "b": ENTRY | {"data_offsets": [10, 18]}}, b"\0" * 18),
            "tensor 'b' leaves a hole after tensor 'a' by 2",
            id="hole",
        ),
    ],
)
def test_broken_rules_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path, content)


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    header = {"one": ENTRY | {"dtype": "X"}, "two": ENTRY | {"shape": [9]}, "three": 0, "good": ENTRY}
    message = refused(tmp_path, build(header))
    assert all(name in message for name in ("'one'", "'two'", "'three'")) and "'good'" not in message


def test_messages_stay_short(tmp_path: Path) -> None:
    header = {f"{number}{'x' * 5000}": {"dtype": ["F" * 1000] * 100} for number in range(100)}
    assert "and 80 more" in refused(tmp_path, build(header))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = build({"a": ENTRY, "b": {"dtype": "I8", "shape": [3], "data_offsets": [8, 11]}}, b"\1" * 11)
    for length in range(len(whole)):
        refused(tmp_path, whole[:length])


def test_a_file_cut_while_it_is_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"t": torch.zeros(100_000)}, path)
    with open_source(path) as source:
        with path.open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(CheckpointError, match="cut while it was open"):
            source.load("t")
