"""Mutational fuzzing of the three readers, in process: thousands of damaged files a second, each reproducible.

The property: a damaged file either opens, and then every tensor lies in it and loads, or raises CheckpointError. Never
another exception, never a hang, never more memory than the file accounts for. A failure names its run and keeps the
file; `damaged(kind, run)` makes the same bytes again. HANLIN_FUZZ_RUNS sets the runs a reader.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import random
import re
import signal
import struct
import sys
import tempfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from hanlin.checkpoints import bin_file, gguf_header, safetensors_file
from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError

RUNS = int(os.environ.get("HANLIN_FUZZ_RUNS", "100000"))
PARTS = 4
SECONDS_A_RUN = 2.0
# The seeds are a few kilobytes; Python may spend this much on describing them, torch on loading them.
PYTHON_BYTES = 4 << 20
RESIDENT_BYTES = 100 << 20

Mutation = Callable[[random.Random, bytes], bytes]

EXTREMES = (0, 1, 2, 7, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
EXTREMES += ((1 << 48) + 1, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)


# Seeds: small good files, by the reference writers.


@cache
def seeds(kind: str) -> tuple[bytes, ...]:
    return {"safetensors": _safetensors_seeds, "gguf": _gguf_seeds, "bin": _bin_seeds}[kind]()


def _safetensors_seeds() -> tuple[bytes, ...]:
    tensors = {
        "model.a": torch.arange(6.0).reshape(2, 3),
        "model.b": torch.arange(8, dtype=torch.bfloat16).reshape(2, 2, 2),
        "model.c": torch.tensor([True, False, True]),
        "model.d": torch.zeros(0, 4, dtype=torch.int8),
        "model.e": torch.tensor(7),
    }
    return (
        safetensors.torch.save(tensors, metadata={"format": "pt", "x": "好"}),
        safetensors.torch.save({"t": torch.arange(4, dtype=torch.uint8)}),
    )


def _gguf_seeds() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    made = []
    for kinds in (("F32", "F16", "BF16", "I8", "Q8_0"), ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q2_K")):
        with tempfile.TemporaryDirectory() as directory:
            writer = gguf.GGUFWriter(Path(directory) / "x.gguf", "llama")
            writer.add_uint32("general.alignment", 32)
            writer.add_float32("llama.rope.freq_base", 10000.0)
            writer.add_bool("flag", True)
            writer.add_uint64("wide", 1 << 40)
            writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "好", ""])
            writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
            writer.add_array("flags", [True, False])
            for number, kind in enumerate(kinds):
                elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
                width = 8 if elements == 1 else elements
                blocks = rng.integers(0, 256, (2, width // elements * nbytes), dtype=np.uint8)
                writer.add_tensor(f"blk.{number}.w", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            made.append((Path(directory) / "x.gguf").read_bytes())
    return tuple(made)


def _bin_seeds() -> tuple[bytes, ...]:
    base = torch.arange(12.0).reshape(3, 4)
    model = torch.nn.BatchNorm1d(3)
    values: tuple[Any, ...] = (
        {"a": base, "b": base.t(), "c": torch.ones(2, dtype=torch.bool), "n": 3, "s": "x"},
        model.state_dict(),
        {"state_dict": {"p": torch.nn.Parameter(torch.ones(2).half())}, "epoch": 1, "list": [base, None, 1.5]},
    )
    made = []
    for protocol, value in zip((2, 2, 4), values, strict=True):
        torch.save(value, buffer := io.BytesIO(), pickle_protocol=protocol)
        made.append(buffer.getvalue())
    return tuple(made)


# Mutations that know nothing of the format.


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    start = _place(rng, len(data))
    count = rng.choice((1, 2, 4, 8, 32))
    return (
        data[:start]
        + bytes(rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256))) for _ in range(count))
        + data[start + count :]
    )


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: _place(rng, len(data))]


def extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.choice((1, 7, 32, 300)))


def number(rng: random.Random, data: bytes) -> bytes:
    """A whole number in place, most likely one that looks like a length or a count, becomes an extreme one."""
    width = rng.choice((1, 2, 4, 8, 8))
    for _ in range(30):
        start = _place(rng, max(1, len(data) - width))
        old = int.from_bytes(data[start : start + width], "little")
        if width == 1 or old < 1 << (8 * width - 9):
            break
    near = (old + 1, old - 1, old * 2, old // 2, old + 32, old - 32, len(data), len(data) - start, len(data) + 1)
    new = rng.choice(EXTREMES if rng.random() < 0.5 else near)
    return data[:start] + (new % (1 << 8 * width)).to_bytes(width, "little") + data[start + width :]


def splice(rng: random.Random, data: bytes) -> bytes:
    """A piece is copied, moved over another, taken out or doubled."""
    start, target = _place(rng, len(data)), _place(rng, len(data))
    piece = data[start : start + rng.choice((1, 4, 8, 16, 40, 64, 200))]
    way = rng.randrange(3)
    if way == 0:
        return data[:target] + piece + data[target:]
    if way == 1:
        return data[:target] + piece + data[target + len(piece) :]
    return data[:start] + data[start + len(piece) :]


def _place(rng: random.Random, size: int) -> int:
    """A position, headers more often than the bytes of tensors."""
    return rng.randrange(max(1, min(size, rng.choice((40, 200, 600, size, size)))))


BLIND: tuple[Mutation, ...] = (flip, overwrite, cut, extend, number, number, splice)


# Mutations that know the format, and leave intact what would hide them.


def rewrite_json(rng: random.Random, data: bytes) -> bytes:
    """Safetensors: change the header's values, keep its length right."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        entries = [entry for entry in header.values() if isinstance(entry, dict) and "shape" in entry]
    except (ValueError, AttributeError):
        return data
    rest = data[8 + length :]
    if entries:
        entry, other = rng.choice(entries), rng.choice(entries)
        numbers = (*EXTREMES, -1, 1.5, True, None, "8", [], 1 << 70, 10**300, len(rest), len(rest) + 1)
        match rng.randrange(8):
            case 0:
                entry["dtype"] = rng.choice([*safetensors_file.DTYPES, "Q4", "", None, 3, ["F32"]])
            case 1:
                entry["shape"] = [rng.choice(numbers) for _ in range(rng.choice((0, 1, 2, 3, 65)))]
            case 2:
                entry["shape"] = entry["shape"][::-1] if isinstance(entry["shape"], list) else 0
            case 3:
                near = rng.choice((numbers, range(len(rest) + 2)))
                entry["data_offsets"] = [rng.choice(near) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
            case 4:
                entry |= {
                    key: other.get(key) for key in rng.choice((["data_offsets"], ["dtype", "shape", "data_offsets"]))
                }
            case 5:
                del entry[rng.choice(list(entry))]
            case 6:
                header[rng.choice(("__metadata__", "new", "\ud800"))] = rng.choice(
                    (entry, {"a": 1}, {"a": "b"}, [], None)
                )
            case 7:
                entry |= {"dtype": rng.choice(("U8", "I8", "BOOL")), "shape": [rng.randrange(len(rest) + 1)]}
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        names = re.findall(rb'"model\.\w"', text)
        if names:
            text = text.replace(rng.choice(names), rng.choice(names))
    return len(text).to_bytes(8, "little") + text + rest


def rewrite_tensor_list(rng: random.Random, data: bytes) -> bytes:
    """GGUF: change a tensor's name, dimensions, kind or offset where they stand."""
    found = [match.start() for match in re.finditer(rb"blk\.\d\.w", data)]
    if not found:
        return data
    start = rng.choice(found)
    match rng.randrange(5):
        case 0:
            return data[:start] + b"blk.%d.w" % rng.randrange(8) + data[start + 7 :]
        case 1:
            return _put(data, start + 7, struct.pack("<I", rng.choice((0, 1, 2, 3, 4, 5, 1 << 31))))
        case 2:
            at, value = start + 11 + 8 * rng.randrange(2), rng.choice((*EXTREMES, 8, 32, 64, 256, 512))
            return _put(data, at, struct.pack("<Q", value % (1 << 64)))
        case 3:
            return _put(data, start + 27, struct.pack("<I", rng.choice((*range(44), 99))))
        case _:
            return _put(data, start + 31, struct.pack("<Q", rng.choice((*range(0, 1024, 32), *EXTREMES))))


def rewrite_pickle(rng: random.Random, data: bytes) -> bytes:
    """PyTorch: change the program in `data.pkl` and keep the archive and its checksum right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # an earlier mutation broke it, and zipfile has many ways to say so
        return data
    for name, content in contents.items():
        if name.endswith("data.pkl"):
            contents[name] = rng.choice((change_operation, change_operation, *BLIND))(rng, content or b".")
        elif rng.random() < 0.1:
            contents[name] = rng.choice((cut, extend))(rng, content or b".")
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def change_operation(rng: random.Random, program: bytes) -> bytes:
    try:
        starts = [position for _, _, position in pickletools.genops(program) if position is not None]
    except Exception:  # already damaged
        return splice(rng, program)
    if len(starts) < 4:
        return program
    one = rng.randrange(len(starts) - 1)
    other = rng.randrange(len(starts) - 1)
    operation = program[starts[one] : starts[one + 1]]
    way = rng.randrange(6)
    if way == 5:
        taken = program[starts[other] : starts[other + 1]]
        return program[: starts[one]] + taken + program[starts[one + 1] :]
    if way == 0:
        return program[: starts[one]] + program[starts[one + 1] :]
    if way == 1:
        return program[: starts[other]] + operation + program[starts[other] :]
    if way == 2:
        made = rng.choice(
            (b"K\xff", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"N", b")", b"]", b"}", b"\x88")
        )
        return program[: starts[one]] + made + program[starts[one + 1] :]
    if way == 3:
        codes = [code.code.encode("latin-1") for code in pickletools.opcodes]
        return program[: starts[one]] + rng.choice(codes) + program[starts[one] + 1 :]
    made = rng.choice(
        (b"cos\nsystem\n", b"cbuiltins\neval\n", b"R", b"b", b"Q", b"\x93", b"\x81", b"(", b"t", b"u", b"s", b"e")
    )
    return program[: starts[one]] + made + program[starts[one] :]


def _put(data: bytes, start: int, value: bytes) -> bytes:
    return data[:start] + value + data[start + len(value) :]


KNOWING: dict[str, Mutation] = {"safetensors": rewrite_json, "gguf": rewrite_tensor_list, "bin": rewrite_pickle}


def damaged(kind: str, run: int) -> bytes:
    """The file of this run: a seed with one to three things wrong."""
    rng = random.Random(f"{kind} {run}")
    data = rng.choice(seeds(kind))
    for _ in range(rng.choice((1, 1, 2, 3))):
        mutation = KNOWING[kind] if rng.random() < 0.5 else rng.choice(BLIND)
        data = mutation(rng, data or b"\0")
    return data


# The property.


class Hanging(BaseException):
    """No reader can swallow it by mistake."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Processor time, so that a busy machine changes nothing."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise Hanging(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def read_all(path: Path, size: int) -> str:
    """Open and load everything; what was refused, or "" when nothing was."""
    try:
        source = open_source(path)
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 20_000
        return message
    refused = ""
    with source:
        for name, info in source.infos.items():
            assert info.nbytes <= size, (name, info)
            assert source.raw(name).size == info.nbytes
            try:
                loaded = source.load(name)
            except CheckpointError as error:
                refused = str(error)
                assert "can't be decoded" in refused
            else:
                assert tuple(loaded.shape) == info.shape and loaded.is_contiguous()
        if not isinstance(source, bin_file.BinFile):  # whose tensors may share a storage
            assert sum(info.nbytes for info in source.infos.values()) <= size
    return refused


def fuzz(kind: str, runs: range, keep: Path) -> Counter[str]:
    """What was refused, how often, numbers and names left out."""
    outcomes: Counter[str] = Counter()
    memory = Path("/dev/shm")
    fast = memory if os.access(memory, os.W_OK) else None
    resident = _resident()
    with tempfile.TemporaryDirectory(dir=fast) as directory:
        path = Path(directory) / f"x.{kind}"
        for run in runs:
            data = damaged(kind, run)
            path.write_bytes(data)
            watched = run % 100 == 0
            if watched:
                tracemalloc.start()
            try:
                with at_most(SECONDS_A_RUN):
                    outcome = read_all(path, len(data))
                if watched:
                    peak = tracemalloc.get_traced_memory()[1]
                    assert peak < PYTHON_BYTES, f"{peak:,} bytes"
            except (Exception, Hanging) as error:
                kept = keep / f"{kind}-{run}.{kind}"
                kept.write_bytes(data)
                raise AssertionError(f"damaged({kind!r}, {run}), kept in {kept}: {error!r}") from error
            finally:
                if watched:
                    tracemalloc.stop()
            outcomes[re.sub(r"'.*?'|[\d,]+", "", outcome.replace(str(path), ""))[:100]] += 1
    grown = _resident() - resident
    assert grown < RESIDENT_BYTES, f"{grown:,} bytes more than before"
    return outcomes


def _resident() -> int:
    """The most memory this process ever held."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


REACHED = {
    "safetensors": (
        "overlaps",
        "leaves a hole",
        "dtype",
        "shape",
        "twice",
        "data_offsets hold",
        "not valid JSON",
        "behind",
    ),
    "gguf": (
        "overlaps",
        "stands twice",
        "does not divide",
        "is unknown",
        "ends at byte",
        "overflow",
        "alignment",
        "UTF-",
    ),
    "bin": (
        "overlap",
        "beyond its storage",
        "the pickle is broken",
        "the pickle asks for",
        "not in the archive",
        "compressed",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KNOWING)
def test_damaged_files_are_read_or_refused(kind: str, part: int, tmp_path: Path) -> None:
    share = RUNS // PARTS
    outcomes = fuzz(kind, range(part * share, (part + 1) * share), tmp_path)
    # A fuzzer that never gets past the first check, or always does, proves nothing.
    assert share * 0.05 < outcomes[""] < share * 0.8
    assert len(outcomes) > 20
    if share >= 5000:
        text = "\n".join(outcomes)
        assert not [words for words in REACHED[kind] if words not in text]


@pytest.mark.parametrize("kind", KNOWING)
def test_good_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    for seed in seeds(kind):
        path.write_bytes(seed)
        assert read_all(path, len(seed)) == ""


@pytest.mark.parametrize(
    ("kind", "module", "check", "without"),
    [
        ("safetensors", safetensors_file, "_misplaced", lambda *_: []),
        ("gguf", gguf_header, "_misplaced", lambda *_: []),
        ("bin", bin_file, "_wrong", lambda *_: None),
    ],
)
def test_a_missing_check_is_found(
    kind: str, module: Any, check: str, without: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fuzzer can fail: take one check away, and it names the run and keeps the file."""
    monkeypatch.setattr(module, check, without)
    with pytest.raises(AssertionError, match=rf"damaged\('{kind}', \d+\), kept in") as raised:
        fuzz(kind, range(2000), tmp_path)
    (kept,) = tmp_path.iterdir()
    run = int(re.search(r"(\d+)\)", str(raised.value))[1])  # type: ignore[index]
    assert kept.read_bytes() == damaged(kind, run)
