"""GGUF: what a good file gives, and what every way to lie in one gives."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from hanlin.checkpoints.gguf_header import _KINDS
from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError

HUGE = (1 << 64) - 1


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: str, sizes: Sequence[int] = (8,), kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    count = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def build(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + data


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return path


def refused(tmp_path: Path, content: bytes) -> str:
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError) as raised, open_source(path):
        pass
    message = str(raised.value)
    assert str(path) in message and len(message) < 5000
    return message


def test_values_and_tensors_as_the_reference_writer_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {}
    for kind, value in {
        "uint8": 200,
        "int8": -7,
        "uint16": 60000,
        "int16": -300,
        "uint32": 4_000_000_000,
        "int32": -5,
        "uint64": 1 << 60,
        "int64": -(1 << 60),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "你好",
    }.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        values[f"a.{kind}"] = value
    for name, array in [
        ("words", ["", "吃", "a b"]),
        ("numbers", [1, -2, 3]),
        ("floats", [0.5, 1.5]),
        ("flags", [True, False]),
    ]:
        writer.add_array(name, array)
        values[name] = array
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "i32": np.arange(6, dtype=np.int32).reshape(2, 3),
        "i8": np.arange(6, dtype=np.int8),
    }
    for name, array in stored.items():
        writer.add_tensor(name, array)
    weights = rng.standard_normal((4, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    bf16 = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("bf16", bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with open_source(path) as source:
        assert values.items() <= dict(source.metadata).items()
        assert list(source.infos) == [*stored, "q", "bf16"]
        for name, array in stored.items():
            loaded = source.load(name)
            assert torch.equal(loaded, torch.from_numpy(array)) and source.infos[name].shape == array.shape
            assert source.raw(name).tobytes() == array.tobytes()
        assert source.infos["q"].dtype == "Q4_1" and source.infos["q"].shape == (4, 64)
        assert source.infos["q"].nbytes == blocks.nbytes == source.raw("q").size
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        np.testing.assert_array_equal(source.load("q").numpy(), expected)
        assert torch.equal(source.load("bf16"), torch.from_numpy(weights).bfloat16())
        view = source.raw("q")
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
            source.load("nothing")
    assert view.tobytes() == blocks.tobytes()  # still valid after closing


def test_kinds_are_numbered_as_in_the_format() -> None:
    assert {kind.value: kind.name for kind in gguf.GGML_QUANT_SIZES} == dict(_KINDS)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_and_a_file_without_tensors(tmp_path: Path, version: int) -> None:
    nested = struct.pack("<IQ", 9, 2) + struct.pack("<IQHH", 2, 2, 1, 2) + struct.pack("<IQ", 8, 1) + text("x")
    path = write(tmp_path, build([key("n", 9, nested)], version=version, alignment=1))
    with open_source(path) as source:
        assert dict(source.metadata) == {"n": [[1, 2], ["x"]]}
        assert not source.infos


def test_alignment_of_the_file_is_honoured(tmp_path: Path) -> None:
    keys = [key("general.alignment", 4, struct.pack("<I", 8))]
    tensors = [tensor("a", (1,), offset=0), tensor("b", (1,), offset=8), tensor("scalar", (), offset=16)]
    path = write(tmp_path, build(keys, tensors, struct.pack("<ffffff", 1, 0, 2, 0, 3, 0), alignment=8))
    with open_source(path) as source:
        assert [source.load(name).tolist() for name in source.infos] == [[1.0], [2.0], 3.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(build(version=1), "version 1", id="version 1"),
        pytest.param(build(version=3 << 24), "big-endian", id="big-endian"),
        pytest.param(build(version=9), "version 9", id="version 9"),
        pytest.param(b"GGML" + build()[4:], "not b'GGUF'", id="magic"),
        pytest.param(b"GG", "GGUF", id="two bytes"),
        pytest.param(build()[:20], "key count", id="cut in the counts"),
        # CVE-2024-21836, CVE-2024-23605: counts multiplied into an allocation.
        pytest.param(build(tensor_count=HUGE), "tensors: 18,446,744,073,709,551,615", id="tensor count"),
        pytest.param(build(key_count=HUGE), "keys: 18,446,744,073,709,551,615", id="key count"),
        pytest.param(build(tensor_count=1 << 60), "tensors", id="tensor count times size wraps"),
        # CVE-2024-23496: the length of a string plus one wraps to zero.
        pytest.param(build([struct.pack("<Q", HUGE) + b"x" * 20]), "name of key 0", id="key length"),
        pytest.param(build([key("k", 8, struct.pack("<Q", HUGE) + b"x" * 20)]), "key 'k'", id="string length"),
        pytest.param(build([], [struct.pack("<Q", HUGE) + b"x" * 40]), "name of tensor 0", id="name length"),
        # CVE-2024-21825: elements of an array times their size.
        pytest.param(build([key("k", 9, struct.pack("<IQ", 4, 1 << 62))]), "key 'k'", id="array of numbers"),
        pytest.param(build([key("k", 9, struct.pack("<IQ", 8, 1 << 61))]), "key 'k'", id="array of strings"),
        pytest.param(build([key("k", 9, struct.pack("<IQ", 9, 1 << 61))]), "key 'k'", id="array of arrays"),
        # CVE-2025-49847, CVE-2025-52566: a token longer than an int.
        pytest.param(
            build([key("k", 9, struct.pack("<IQ", 8, 2) + text("ok") + struct.pack("<Q", (1 << 31) + 5) + b"abc")]),
            "key 'k': element 1 of 2 goes beyond the file",
            id="token length",
        ),
        # CVE-2024-21802: more dimensions than the array for them holds.
        pytest.param(build([], [tensor("t", (1,) * 5)], b"\0" * 64), "5 dimensions", id="five dimensions"),
        pytest.param(
            build([], [tensor("t", (1,), dimensions=(1 << 32) - 1)], b"\0" * 64), "dimensions", id="dimensions"
        ),
        # CVE-2025-53630, CVE-2026-27940, CVE-2026-33298: sizes whose product or sum wraps.
        pytest.param(build([], [tensor("t", (1 << 32, 1 << 32))], b"\0" * 64), "overflow", id="product wraps to zero"),
        pytest.param(build([], [tensor("t", (1 << 62,))], b"\0" * 64), "ends at byte", id="bytes wrap to zero"),
        pytest.param(
            build([], [tensor(name, ((1 << 61) - 8,), offset=(HUGE // 32) * 32) for name in "ab"], b"\0" * 64),
            "ends at byte",
            id="offset plus size wraps",
        ),
        # Found by the fuzzer: torch counts the elements beside a dimension of zero.
        pytest.param(build([], [tensor("t", (HUGE, 0))]), "overflow", id="nothing, beside a huge dimension"),
        # CVE-2026-7482: a tensor larger than the file, read from the heap behind it.
        pytest.param(build([], [tensor("t", (1 << 20,))], b"\0" * 64), "tensor 't' ends at byte", id="beyond the file"),
        pytest.param(
            build([], [tensor("t", (8,), offset=64)], b"\0" * 64), "tensor 't' ends at byte", id="offset beyond"
        ),
        pytest.param(build([], [tensor("t", (32,), 2)], b"\0" * 17), "tensor 't' ends at byte", id="last block cut"),
        pytest.param(build([], [tensor("t", (33,), 2)], b"\0" * 64), "does not divide", id="part of a block"),
        pytest.param(
            build([], [tensor("t", (64, 3), 14)], b"\0" * 640), "does not divide", id="row of part of a block"
        ),
        pytest.param(build([], [tensor("t", kind=4)], b"\0" * 64), "kind 4 is unknown", id="withdrawn kind"),
        pytest.param(build([], [tensor("t", kind=(1 << 32) - 1)], b"\0" * 64), "is unknown", id="unknown kind"),
        pytest.param(
            build([], [tensor("t", offset=1)], b"\0" * 64), "not a multiple of the alignment", id="misaligned"
        ),
        pytest.param(build([], [tensor("t"), tensor("t", offset=32)], b"\0" * 64), "stands twice", id="tensor twice"),
        pytest.param(
            build([], [tensor("a", (16,)), tensor("b", (8,), offset=32)], b"\0" * 64),
            "tensor 'b' overlaps tensor 'a' by 32 bytes",
            id="overlap",
        ),
        pytest.param(
            build([], [tensor("a", (24,)), tensor("b", (1,), offset=32), tensor("c", (1,), offset=64)], b"\0" * 96),
            "tensor 'c' overlaps tensor 'a'",
            id="overlap behind a small one",
        ),
        pytest.param(build([key("k", 7, b"\1"), key("k", 7, b"\1")]), "key 'k' stands twice", id="key twice"),
        pytest.param(build([key("k", 13, b"\1" * 8)]), "value type 13", id="value type"),
        pytest.param(build([key("k", 9, struct.pack("<IQ", 77, 0))]), "value type 77", id="element type"),
        pytest.param(build([key("k", 7, b"\2")]), "truth value", id="bool of 2"),
        pytest.param(
            build([key("k", 9, struct.pack("<IQ", 7, 2) + b"\1\3")]), "truth value", id="array with bool of 3"
        ),
        pytest.param(build([key("k", 8, text(b"\xff\xfe"))]), "not valid UTF-8", id="string"),
        pytest.param(
            build([key("k", 9, struct.pack("<IQ", 8, 1) + text(b"\xe4\xbd"))]), "not valid UTF-8", id="half a 你"
        ),
        pytest.param(build([text(b"\xff") + struct.pack("<IB", 7, 1)]), "not valid UTF-8", id="key"),
        pytest.param(
            build([key("k", 9, struct.pack("<IQ", 9, 1) * 50 + struct.pack("<IQ", 4, 0))]), "nested", id="nesting"
        ),
        *(
            pytest.param(
                build([key("general.alignment", 4, struct.pack("<I", value))]), "alignment", id=f"alignment {value}"
            )
            for value in (0, 3, 33)
        ),
        pytest.param(build([key("general.alignment", 8, text("32"))]), "alignment", id="alignment as text"),
        pytest.param(build([key("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts", id="split"),
    ],
)
def test_lies_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path, content)


def test_every_misplaced_tensor_is_named(tmp_path: Path) -> None:
    tensors = [tensor("far", (8,), offset=640), tensor("odd", (8,), offset=7), tensor("kind", kind=5), tensor("good")]
    message = refused(tmp_path, build([], tensors, b"\0" * 64))
    assert all(name in message for name in ("'far'", "'odd'", "'kind'")) and "'good'" not in message


def test_messages_stay_short(tmp_path: Path) -> None:
    tensors = [tensor(f"{number}" * 900, kind=5) for number in range(500)]
    message = refused(tmp_path, build([], tensors, b"\0" * 64))
    assert "and 480 more" in message


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = build(
        [key("a", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")), key("b", 12, struct.pack("<d", 1.5))],
        [tensor("t", (32,), 2), tensor("u", (2,), offset=32)],
        b"\1" * 40,
    )
    with open_source(write(tmp_path, whole)) as source:
        assert list(source.infos) == ["t", "u"]
    for length in range(len(whole)):
        refused(tmp_path, whole[:length])


def test_a_vocabulary_is_read_in_milliseconds_a_thousand(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(150_000)]
    path = write(tmp_path, build([key("v", 9, struct.pack("<IQ", 8, len(words)) + b"".join(map(text, words)))]))
    with open_source(path) as source:
        assert source.metadata["v"] == words
