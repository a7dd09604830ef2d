"""PyTorch checkpoints: tensors come out as torch wrote them, and nothing in the file ever runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError, UnsafeCheckpointError

STORAGE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0"
    + b"0X\x03\0\0\0cpuK\x04tQ"
)
TENSOR = STORAGE + b"K\0K\x04\x85K\x01\x85\x89}tR"


def archive(program: bytes, data: bytes = b"\0" * 16, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("m/data.pkl", program)
        file.writestr("m/data/0", data)
        for name, content in entries.items():
            file.writestr(f"m/{name}", content)
    return buffer.getvalue()


def program(value: bytes, key: bytes = b"t") -> bytes:
    """{key: value}, protocol 2."""
    return b"\x80\x02}X" + struct.pack("<I", len(key)) + key + value + b"s."


def tensor(offset: int = 0, shape: tuple[Any, ...] = (4,), stride: tuple[Any, ...] = (1,)) -> bytes:
    """A tensor in a storage of four float32."""
    arguments = pickle.dumps((offset, shape, stride), 2)
    # Without the protocol, and without what makes one tuple of the three and ends.
    return STORAGE + arguments[2 : arguments.rindex(b"\x87")] + b"\x89}tR"


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    return path


def refused(tmp_path: Path, content: bytes, kind: type[CheckpointError] = CheckpointError) -> str:
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError) as raised, open_source(path):
        pass
    message = str(raised.value)
    assert type(raised.value) is kind and str(path) in message and len(message) < 5000
    return message


def saved(tmp_path: Path, value: Any, **options: Any) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_as_torch_saves_them(tmp_path: Path, protocol: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    for value in (model.state_dict(), dict(model.named_parameters())):
        with open_source(saved(tmp_path, value, pickle_protocol=protocol)) as source:
            assert list(source.infos) == list(value)
            for name, expected in value.items():
                loaded = source.load(name)
                assert torch.equal(loaded, expected) and loaded.dtype == expected.dtype
                assert source.infos[name].shape == tuple(expected.shape)


def test_every_dtype(tmp_path: Path) -> None:
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    names |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    value = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in names.items()}
    value["BOOL"] = torch.tensor([True, False])
    with open_source(saved(tmp_path, value)) as source:
        assert {name: info.dtype for name, info in source.infos.items()} == {name: name for name in value}
        for name, expected in value.items():
            assert torch.equal(source.load(name), expected)
            assert source.raw(name).tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()


def test_views_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    value = {
        "base": base,
        "same": base,
        "turned": base.t(),
        "part": base[1:3, 2:5],
        "step": base[:, ::2],
        "one": base[3, 3],
    }
    value["nothing"] = torch.zeros(0, 3)
    with open_source(saved(tmp_path, value)) as source:
        for name, expected in value.items():
            loaded = source.load(name)
            assert torch.equal(loaded, expected) and loaded.is_contiguous()
            raw = source.raw(name)
            assert raw.tobytes() == expected.contiguous().numpy().tobytes() and not raw.flags.writeable
            assert source.infos[name].nbytes == raw.size


def test_wrappers_come_off_and_scalars_become_metadata(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    wrapped = {
        "epoch": 3,
        "optimizer": {"state": {0: {"m": weight}}},
        "state_dict": {"a": weight, "step": 7, "name": "x"},
    }
    with open_source(saved(tmp_path, wrapped)) as source:
        assert list(source.infos) == ["a"] and dict(source.metadata) == {"step": 7, "name": "x"}
    with open_source(saved(tmp_path, {"model": {"module": {"a": weight}}})) as source:
        assert list(source.infos) == ["a"]
    with open_source(saved(tmp_path, {"b": {"c": weight, "d": [weight, None]}, "model": weight})) as source:
        assert list(source.infos) == ["b.c", "b.d.0", "model"] and dict(source.metadata) == {"b.d.1": None}
    with open_source(saved(tmp_path, {"state_dict": {"a": weight}, "model": {"b": weight}})) as source:
        assert list(source.infos) == ["state_dict.a", "model.b"]


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (_Calls(os.system, "exit 1"), "system"),
        (_Calls(eval, "1/0"), "eval"),
        (_Calls(subprocess.Popen, ["false"]), "Popen"),
        (_Calls(getattr, "x", "upper"), "getattr"),
        (_Calls(torch.load, "x"), "torch.serialization.load"),
        (torch.ones(2).to_sparse(), "_rebuild_sparse_tensor"),
        (collections.Counter(), "Counter"),
        (torch.float16, "torch.float16"),
        (print, "print"),
    ],
)
def test_whatever_is_not_a_tensor_is_refused_by_name(tmp_path: Path, value: Any, named: str, protocol: int) -> None:
    """CVE-2025-67729, CVE-2025-32434, CVE-2026-24747: torch.load is no boundary, and neither is weights_only."""
    path = saved(tmp_path, {"weight": torch.zeros(2), "bait": value}, pickle_protocol=protocol)
    with pytest.raises(UnsafeCheckpointError, match=named) as raised, open_source(path):
        pass
    assert "safetensors" in str(raised.value)


def test_nothing_in_the_file_runs(tmp_path: Path) -> None:
    """In a fresh process that watches every import, file and process: the bait's target is never touched."""
    touched = tmp_path / "touched"
    path = saved(tmp_path, {"bait": _Calls(os.system, f"touch {touched}"), "more": _Calls(__import__, "antigravity")})
    script = (
        "import sys, torch, hanlin.checkpoints.source as source\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments))))\n"
        f"try: source.open_source({str(path)!r})\n"
        "except Exception as error: print(type(error).__name__)\n"
        "bad = [e for e in seen if e[0].startswith(('os.system', 'subprocess', 'exec', 'compile', 'pickle'))]\n"
        "print(bad, 'antigravity' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["UnsafeCheckpointError", "[] False"], done.stderr
    assert not touched.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(b"(ios\nsystem\n", "INST", id="INST"),
        pytest.param(b"(N(o", "OBJ", id="OBJ"),
        pytest.param(b"N)\x81", "NEWOBJ", id="NEWOBJ"),
        pytest.param(b"N)}\x92", "NEWOBJ_EX", id="NEWOBJ_EX"),
        pytest.param(b"\x82\x01", "EXT1", id="EXT1"),
        pytest.param(b"P0\n", "PERSID", id="PERSID"),
        pytest.param(b"X\x01\0\0\0x)R", "a call of str", id="call of a string"),
        pytest.param(b"ctorch\nFloatStorage\n)R", "a call of", id="call of a storage"),
        pytest.param(b"cos\nsystem\n", "os.system", id="mere mention"),
        pytest.param(b"X\x02\0\0\0osX\x06\0\0\0system\x93", "os.system", id="STACK_GLOBAL"),
        pytest.param(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__", id="dotted"),
    ],
)
def test_programs_that_build_objects_are_unsafe(tmp_path: Path, value: bytes, message: str) -> None:
    assert message in refused(tmp_path, archive(program(value)), UnsafeCheckpointError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "in the middle", id="nothing"),
        pytest.param(b"\x80\x09.", "protocol 9", id="protocol"),
        pytest.param(b"\x80\x02}", "in the middle", id="no end"),
        pytest.param(b"\x80\x02}}.", "one value", id="two values"),
        pytest.param(b"\x80\x02(}.", "one value", id="open mark"),
        pytest.param(b"\x80\x02.", "one value", id="no value"),
        pytest.param(b"\x80\x02]." , "holds a list", id="a list"),
        pytest.param(program(b"\x8f"), "0x8f", id="EMPTY_SET"),
        pytest.param(program(b"\xff"), "0xff", id="unknown"),
        pytest.param(program(b"X\xff\xff\xff\xff"), "in the middle", id="string length"),
        pytest.param(program(b"X\x01\0\0\0\xff"), "not valid UTF-8", id="string"),
        pytest.param(program(b"ctorch\nFloat"), "in the middle", id="half a global"),
        pytest.param(program(b"h\x07"), "memo 7", id="memo"),
        pytest.param(b"\x80\x02q\0.", "a value is missing", id="put of nothing"),
        pytest.param(b"\x80\x02\x85.", "a value is missing", id="tuple of nothing"),
        pytest.param(b"\x80\x02u.", "a mark is missing", id="no mark"),
        pytest.param(b"\x80\x02N(u.", "a dict is missing", id="items of None"),
        pytest.param(b"\x80\x02a.", "a value is missing", id="append to nothing"),
        pytest.param(b"\x80\x02}Na.", "a list is missing", id="append to a dict"),
        pytest.param(b"\x80\x02}(Nu.", "a key without a value", id="odd items"),
        pytest.param(b"\x80\x02}NNs.", "neither a string nor", id="None as key"),
        pytest.param(b"\x80\x02})Ns.", "neither a string nor", id="tuple as key"),
        pytest.param(b"\x80\x02}\x8a\x09" + b"\1" * 9 + b"Ns.", "neither a string nor", id="wide number as key"),
        pytest.param(b"\x80\x02}J\xff\xff\xff\xffNs.", "neither a string nor", id="negative key"),
        pytest.param(program(b"NNb"), "a dict is missing", id="attributes of None"),
        pytest.param(program(b"ccollections\nOrderedDict\nN\x85R"), "ORDERED_DICT", id="arguments"),
        pytest.param(program(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "TENSOR", id="no arguments"),
        pytest.param(program(b"ctorch._utils\n_rebuild_parameter\n(N\x88}tR"), "PARAMETER", id="parameter of None"),
        pytest.param(program(b"NQ"), "not described as", id="storage None"),
        pytest.param(program(b"NN\x93"), "must be a string", id="global of None"),
        pytest.param(program(tensor(shape=[4], stride=(1,))), "not a tuple", id="shape list"),
        pytest.param(program(tensor(shape=(-4,))), "whole numbers", id="negative shape"),
        pytest.param(program(tensor(stride=(-1,))), "whole numbers", id="negative stride"),
        pytest.param(program(tensor(shape=(4.0,))), "whole numbers", id="float shape"),
        pytest.param(program(tensor(offset=-1)), "do not fit together", id="negative offset"),
        pytest.param(program(tensor(shape=(2, 2))), "do not fit together", id="stride missing"),
        pytest.param(program(tensor(shape=(1,) * 65, stride=(1,) * 65)), "a few numbers", id="dimensions"),
    ],
)  # fmt: skip
def test_broken_programs_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path, archive(content))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        pytest.param(tensor(shape=(5,)), "beyond its storage", id="shape"),
        pytest.param(tensor(offset=1), "beyond its storage", id="offset"),
        pytest.param(tensor(shape=(2, 2), stride=(3, 1)), "beyond its storage", id="stride"),
        pytest.param(tensor(shape=(2,), stride=(1 << 62,)), "beyond its storage", id="wide stride"),
        pytest.param(tensor(offset=1 << 200), "beyond its storage", id="wide offset"),
        pytest.param(tensor(shape=(1 << 40,), stride=(0,)), "more elements than its storage", id="expanded"),
        pytest.param(
            tensor(shape=(0, 1 << 62, 4), stride=(1, 1, 1)), "overflows", id="nothing, beside a huge dimension"
        ),
        pytest.param(TENSOR.replace(b"K\x04tQ", b"K\x05tQ"), "claims 5 elements", id="storage larger than its entry"),
        pytest.param(TENSOR.replace(b"Float", b"Double"), "claims 4 elements of F64", id="wider dtype"),
        pytest.param(
            TENSOR.replace(b"\0\0\x000X", b"\0\0\x007X"), "storage '7' is not in the archive", id="no such storage"
        ),
    ],
)
def test_tensors_stay_in_their_storage(tmp_path: Path, made: bytes, message: str) -> None:
    found = refused(tmp_path, archive(program(made)))
    assert message in found and "tensor 't'" in found


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    items = b"".join(
        b"X\x01\0\0\0" + name + made
        for name, made in [(b"a", tensor(offset=1)), (b"b", tensor()), (b"c", tensor(shape=(9,)))]
    )
    message = refused(tmp_path, archive(b"\x80\x02}(" + items + b"u."))
    assert "'a'" in message and "'c'" in message and "'b'" not in message


def test_parts_that_hold_each_other_end(tmp_path: Path) -> None:
    """A list of ten times a list of ten times...: small on disk, endless to walk."""
    laughs = b"]q\x00" + b"".join(b"](" + (b"h" + bytes([n])) * 10 + b"eq" + bytes([n + 1]) for n in range(12))
    whole = b"\x80\x02(" + laughs + b"t"
    assert "more than" in refused(tmp_path, archive(b"\x80\x02}X\1\0\0\0x(" + laughs + b"ts."))
    assert "holds a tuple" in refused(tmp_path, archive(whole + b"."))
    assert "nested" in refused(tmp_path, archive(b"\x80\x02}q\0X\1\0\0\0xh\0s."))
    deep = b"\x80\x02}X\1\0\0\0x" + b"]" * 50_000 + b"a" * 49_999 + b"s."
    assert "nested" in refused(tmp_path, archive(deep))
    assert "operations" in refused(tmp_path, archive(b"\x80\x02" + b"N" * 2_100_000 + b"."))


def test_names_cannot_grow_without_end(tmp_path: Path) -> None:
    long = b"X" + struct.pack("<I", 100_000) + b"k" * 100_000
    program = b"\x80\x02}" + long + b"](" + b"N" * 2000 + b"es."
    assert "letters" in refused(tmp_path, archive(program))


def test_one_name_twice(tmp_path: Path) -> None:
    items = b"X\3\0\0\0a.b" + TENSOR + b"X\1\0\0\0a}X\1\0\0\0b" + TENSOR + b"s"
    assert "'a.b' stands twice" in refused(tmp_path, archive(b"\x80\x02}(" + items + b"u."))


def zip_with(change: Callable[[bytearray], None]) -> bytes:
    content = bytearray(archive(program(TENSOR)))
    change(content)
    return bytes(content)


def set_at(content: bytearray, mark: bytes, offset: int, value: bytes, nth: int = 0) -> None:
    start = -1
    for _ in range(nth + 1):
        start = content.index(mark, start + 1)
    content[start + offset : start + offset + len(value)] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c.__delitem__(slice(-30, None)), "no table of contents", id="cut"),
        pytest.param(lambda c: c.extend(b"rest"), "end is broken", id="bytes behind the end"),
        pytest.param(lambda c: set_at(c, b"PK\5\6", 4, b"\1"), "end is broken", id="disks"),
        pytest.param(lambda c: set_at(c, b"PK\5\6", 12, b"\xf0\xff\xff\xff"), "bytes", id="table size"),
        pytest.param(lambda c: set_at(c, b"PK\5\6", 16, b"\xf0\xff\xff\xff"), "beyond its end", id="table offset"),
        pytest.param(lambda c: set_at(c, b"PK\5\6", 10, b"\3"), "ends after 2 of 3", id="count"),
        pytest.param(lambda c: set_at(c, b"PK\1\2", 0, b"XXXX"), "table is broken", id="entry mark"),
        pytest.param(lambda c: set_at(c, b"PK\1\2", 8, b"\1"), "compressed or encrypted", id="encrypted"),
        pytest.param(lambda c: set_at(c, b"PK\1\2", 10, b"\x08"), "compressed or encrypted", id="compressed"),
        pytest.param(lambda c: set_at(c, b"PK\1\2", 24, b"\xff\xff"), "compressed or encrypted", id="sizes differ"),
        pytest.param(lambda c: set_at(c, b"PK\1\2", 20, b"\xff\xff\xff\0" * 2), "goes beyond it", id="size"),
        pytest.param(lambda c: set_at(c, b"PK\1\2", 42, b"\7"), "not where the zip table says", id="offset"),
        pytest.param(lambda c: set_at(c, b"PK\3\4", 30, b"X"), "not where the zip table says", id="other name"),
        pytest.param(lambda c: set_at(c, b"PK\1\2", 16, b"\0\0\0\0"), "checksum of data.pkl", id="checksum"),
        pytest.param(
            lambda c: set_at(c, b"PK\1\2", 42, b"\0\0\0\0", 1), "not where the zip table says", id="same place"
        ),
    ],
)
def test_broken_archives_are_refused(tmp_path: Path, change: Callable[[bytearray], None], message: str) -> None:
    assert message in refused(tmp_path, zip_with(change))


def test_entries_twice_overlapping_or_compressed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for content in (b"one", b"two"):
            file.writestr("m/data.pkl", content)
    assert "'m/data.pkl' stands twice" in refused(tmp_path, buffer.getvalue())
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", b"\0" * 10_000_000)
    assert "compressed" in refused(tmp_path, buffer.getvalue())
    # The second entry, whole, inside the first one's bytes.
    inner = archive(b"")
    inner = inner[: inner.index(b"PK\1\2")]
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("m/data.pkl", inner)
        file.writestr("m/data/0", b"\0" * 16)
    content = bytearray(buffer.getvalue())
    start = content.index(b"m/data/0")
    set_at(content, b"PK\1\2", 42, struct.pack("<I", start - 30), nth=1)
    assert "overlap" in refused(tmp_path, bytes(content))


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("readme", b"x")
    assert "has one data.pkl; this one has 0" in refused(tmp_path, buffer.getvalue())
    assert "this one has 2" in refused(tmp_path, archive(program(TENSOR), **{"x/data.pkl": b""}))
    assert "not little-endian" in refused(tmp_path, archive(program(TENSOR), byteorder=b"big"))
    with open_source(write(tmp_path, archive(program(TENSOR), byteorder=b"little", version=b"3\n"))) as source:
        assert source.load("t").tolist() == [0.0] * 4


def test_old_formats_name_the_remedy(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6") as raised, open_source(path):
        pass
    assert "Save it again" in str(raised.value)
    assert "tar archive" in refused(tmp_path, b"x" * 257 + b"ustar" + b"\0" * 300)
    assert "not a PyTorch checkpoint" in refused(tmp_path, b"hello")


def test_archives_with_64_bit_tables(tmp_path: Path) -> None:
    """As PyTorch writes them past 4 GB: the same archive, its numbers moved to the wide fields."""
    plain = archive(program(TENSOR))
    directory = plain.index(b"PK\1\2")
    entries = bytearray()
    position = directory
    while plain[position : position + 4] == b"PK\1\2":
        fields = list(struct.unpack_from("<4sHHHHHHIIIHHHHHII", plain, position))
        name = plain[position + 46 : position + 46 + fields[10]]
        wide = struct.pack("<HHHHQQQ", 9, 0, 1, 24, fields[9], fields[8], fields[16])
        position += 46 + fields[10] + fields[11] + fields[12]
        fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
        fields[11], fields[12] = len(wide), 0
        entries += struct.pack("<4sHHHHHHIIIHHHHHII", *fields) + name + wide
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(entries), directory)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, directory + len(entries), 1)
    closing = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    content = plain[:directory] + bytes(entries) + end64 + locator + closing
    with open_source(write(tmp_path, content)) as source:
        assert list(source.infos) == ["t"] and source.load("t").shape == (4,)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = archive(program(TENSOR))
    for length in range(len(whole)):
        refused(tmp_path, whole[:length])
