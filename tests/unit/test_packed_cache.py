"""The cache of packed weights: a file is exactly what a load would make, or it is not used."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hanlin import assembly
from hanlin.checkpoints import base, stored
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.safetensors_writer import save_safetensors
from hanlin.engine.lowering import Lowering
from hanlin.errors import ConfigError
from hanlin.kernels import packed_cache
from hanlin.kernels.native import Arena, Context, add_sums, available, unavailable_reason
from hanlin.kernels.packed_cache import PAGE, PackedCache, PackedKey, digest_of_files
from hanlin.options import EngineConfig

pytestmark = pytest.mark.skipif(not available(), reason=f"the native library: {unavailable_reason()}")

KEY = PackedKey.of("model", "state", ["form"])
PAGES = 600


@pytest.mark.parametrize("shape", [(0, 512), (1, 1), (3, 5), (7, 512)])
def test_sums_of_rows_and_columns_are_those_of_whole_numbers(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng()
    words, before = (rng.integers(0, 2**64, size, np.uint64) for size in (shape, shape[1]))
    rows, columns = np.full(shape[0], 7, np.uint64), before.copy()
    add_sums(words, rows, columns)
    exact = words.astype(object)
    assert rows.tolist() == [sum(row) % 2**64 for row in exact.tolist()]
    assert columns.tolist() == [sum(c, int(b)) % 2**64 for c, b in zip(exact.T.tolist(), before, strict=True)]


def test_sums_name_an_array_that_does_not_fit() -> None:
    words = np.zeros((2, 3), np.uint64)
    with pytest.raises(ConfigError, match=r"rows: shape must be \(2,\), not \(3,\)"):
        add_sums(words, np.zeros(3, np.uint64), np.zeros(3, np.uint64))
    with pytest.raises(ConfigError, match="columns: dtype must be uint64, not int64"):
        add_sums(words, np.zeros(2, np.uint64), np.zeros(3, np.int64))


def filled(pages: int = PAGES, seed: int = 0) -> Arena:
    arena = Arena(pages * PAGE)
    arena.whole[:] = np.random.default_rng(seed).bytes(arena.size)
    return arena


def stored_in(folder: Path, key: PackedKey = KEY, arena: Arena | None = None, **options: Any) -> Path:
    cache = PackedCache(folder, **options)
    cache.store(key, arena or filled())
    cache.close()
    return folder / key.name


def held(folder: Path, key: PackedKey = KEY, pages: int = PAGES) -> bytes | None:
    found = PackedCache(folder).find(key, pages * PAGE)
    return bytes(found.arena.whole) if found and found.sound() else None


# ---- a file and what can happen to it -------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 7, 8, 9, PAGES, 4096 + 3])
@pytest.mark.parametrize("piece", [None, 8 * PAGE])
def test_what_was_stored_is_found(
    tmp_path: Path, pages: int, piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if piece:
        monkeypatch.setattr(packed_cache, "_PIECE", piece)
        monkeypatch.setattr(packed_cache, "_CHUNK", piece // 4)
    arena = filled(pages)
    path = stored_in(tmp_path, arena=arena)
    assert held(tmp_path, pages=pages) == bytes(arena.whole)
    assert not stat.S_IMODE(path.stat().st_mode) & 0o077 or sys.platform == "win32"
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name != ".lock") == [KEY.name]


def test_found_memory_is_private(tmp_path: Path) -> None:
    arena = filled()
    stored_in(tmp_path, arena=arena)
    found = PackedCache(tmp_path).find(KEY, arena.size)
    assert found is not None and found.sound()
    found.arena.whole[:8] = b"\0" * 8
    assert held(tmp_path) == bytes(arena.whole)


@pytest.mark.parametrize("change", ["model", "state", "form"])
def test_another_key_is_not_found(tmp_path: Path, change: str) -> None:
    path = stored_in(tmp_path)
    other = replace(KEY, **{change: b"x" * 16})
    assert held(tmp_path, other) is None and path.exists()
    path.rename(tmp_path / other.name)  # nor does the name alone decide
    assert held(tmp_path, other) is None and not (tmp_path / other.name).exists()


def test_a_key_tells_values_and_places_apart() -> None:
    keys = [("m", "s", ["a", "b"]), ("m", "s", ["b", "a"]), ("m", "s", ["a,b"]), ("m", "s", [b"a", "b"])]
    keys += [("s", "m", ["a", "b"]), ("m", 1, ["a", "b"]), ("m", "1", ["a", "b"]), ("m", "s", ["a"])]
    assert len({PackedKey.of(*key).digest for key in keys}) == len({PackedKey.of(*key).name for key in keys}) == 8


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    arena = filled()
    path = stored_in(tmp_path, arena=arena)
    sound = path.read_bytes()
    image = (0, 1, PAGE - 1, PAGE, 7777, 1 << 20, arena.size - PAGE, arena.size - 1)
    for position in (*image, *range(arena.size, len(sound))):
        for bit in (1, 0x80):
            broken = bytearray(sound)
            broken[position] ^= bit
            path.write_bytes(broken)
            assert held(tmp_path) is None, position
            assert not path.exists(), "a broken file is removed"
    path.write_bytes(sound)
    assert held(tmp_path) == bytes(arena.whole)


def damages() -> dict[str, Callable[[np.ndarray[Any, Any]], None]]:
    """What disks and memory do to pages of 512 words of 64 bits."""

    def opposite(words: Any) -> None:  # the sum of the page stays as it is
        words[3, 10] += 1 << 40
        words[3, 20] -= 1 << 40

    def column(words: Any) -> None:  # the sum of the column stays as it is
        words[3, 10] += 1 << 40
        words[9, 10] -= 1 << 40

    def swapped_pages(words: Any) -> None:
        words[[4, 5]] = words[[5, 4]]

    def swapped_words(words: Any) -> None:
        words[4, [7, 8]] = words[4, [8, 7]]

    def swapped_pieces(words: Any) -> None:
        words[:256], words[256:512] = words[256:512].copy(), words[:256].copy()

    def zeroed(words: Any) -> None:
        words[100] = 0

    def shifted(words: Any) -> None:
        words[1:] = words[:-1].copy()

    return {f.__name__: f for f in (opposite, column, swapped_pages, swapped_words, swapped_pieces, zeroed, shifted)}


@pytest.mark.parametrize("damage", damages())
def test_damage_that_hides_from_plain_sums_is_noticed(tmp_path: Path, damage: str) -> None:
    path = stored_in(tmp_path)
    content = bytearray(path.read_bytes())
    words = np.frombuffer(content, np.uint64, PAGES * PAGE // 8).reshape(PAGES, -1)
    damages()[damage](words)
    path.write_bytes(content)
    assert held(tmp_path) is None


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGES * PAGE - 1, PAGES * PAGE, PAGES * PAGE + 5, -1])
def test_a_cut_file_is_noticed(tmp_path: Path, size: int) -> None:
    path = stored_in(tmp_path)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert held(tmp_path) is None and not path.exists()


def test_a_longer_file_is_noticed(tmp_path: Path) -> None:
    path = stored_in(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    assert held(tmp_path) is None


def test_a_file_of_another_size_is_not_taken(tmp_path: Path) -> None:
    stored_in(tmp_path)
    assert held(tmp_path, pages=PAGES - 1) is None


def test_a_file_of_another_version_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored_in(tmp_path)
    monkeypatch.setattr(packed_cache, "_VERSION", 2)
    assert held(tmp_path) is None and not path.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_something_else_of_that_name_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / KEY.name)
    assert held(tmp_path) is None
    (tmp_path / KEY.name).mkdir()
    assert held(tmp_path) is None


def test_a_disk_that_cannot_deliver_a_page_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(piece: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for huge in (True, False):  # where it is noticed
        path = stored_in(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(packed_cache, "huge_pages", lambda huge=huge: huge)
            patch.setattr(packed_cache, "_populate", broken)
            assert held(tmp_path) is None and not path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(MADV_POPULATE_READ) is Linux's")
def test_a_file_that_is_cut_while_it_is_checked_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored_in(tmp_path)
    mapped = packed_cache._mapped(path, KEY, PAGES * PAGE)
    assert mapped is not None
    if packed_cache._advise(mapped[0], packed_cache._POPULATE_READ) == errno.EINVAL:
        pytest.skip("this Linux is older than 5.14")
    monkeypatch.setattr(packed_cache, "huge_pages", lambda: False)
    os.truncate(path, 16 * PAGE)
    assert not packed_cache.Found(path, *mapped).sound()


@pytest.mark.parametrize("huge", [True, False])
def test_small_pages_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, huge: bool) -> None:
    arena = filled()
    stored_in(tmp_path, arena=arena)
    monkeypatch.setattr(packed_cache, "_in_small_pages", lambda image: not huge)
    monkeypatch.setattr(packed_cache, "_PIECE", 7 * PAGE)
    found = PackedCache(tmp_path).find(KEY, arena.size)
    assert found is not None and found.sound() and bytes(found.arena.whole) == bytes(arena.whole)
    assert (found.arena._memory is not None) == huge


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
def test_the_pages_of_a_map_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of one small page is never a huge one; and where fresh memory gets none either, nothing is copied."""
    arena = filled(1)
    path = stored_in(tmp_path, arena=arena)
    for granted in (True, False):
        monkeypatch.setattr(packed_cache, "huge_pages", lambda granted=granted: granted)
        mapped = packed_cache._mapped(path, KEY, PAGE)
        assert mapped is not None and packed_cache._in_small_pages(mapped[0]) == granted


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_small_arenas_are_not_stored(tmp_path: Path) -> None:
    assert not stored_in(tmp_path, least=PAGES * PAGE + 1).exists()
    assert stored_in(tmp_path, least=PAGES * PAGE).exists()


def keys(count: int) -> list[PackedKey]:
    return [PackedKey.of(f"model {n}", "state", []) for n in range(count)]


def test_the_least_recently_used_files_go_first(tmp_path: Path) -> None:
    first, second, third = keys(3)
    size = stored_in(tmp_path, first).stat().st_size
    stored_in(tmp_path, second)
    for age, key in ((200, first), (100, second)):
        os.utime(tmp_path / key.name, (time.time() - age,) * 2)
    assert held(tmp_path, first) is not None  # used last now
    stored_in(tmp_path, third, limit=2 * size + 100)
    assert [(tmp_path / key.name).exists() for key in (first, second, third)] == [True, False, True]


def test_what_is_larger_than_the_limit_removes_nothing(tmp_path: Path) -> None:
    small, large = keys(2)
    stored_in(tmp_path, small, filled(2))
    assert not stored_in(tmp_path, large, limit=PAGES * PAGE - 1).exists()
    assert (tmp_path / small.name).exists()


def test_files_of_a_changed_model_go_at_once(tmp_path: Path) -> None:
    old = stored_in(tmp_path, PackedKey.of("model", "old", ["int4"]))
    other = stored_in(tmp_path, PackedKey.of("other", "old", ["int4"]))
    new = [stored_in(tmp_path, PackedKey.of("model", "new", [kind])) for kind in ("int4", "int8")]
    assert not old.exists() and other.exists() and all(path.exists() for path in new)


def test_forms_of_one_model_fall_out_in_turn(tmp_path: Path) -> None:
    paths = []
    for n in range(5):
        paths.append(stored_in(tmp_path, PackedKey.of("model", "state", [f"version {n}"])))
        os.utime(paths[-1], (1000 + n,) * 2)
    assert [path.exists() for path in paths] == [False, False, True, True, True]


def test_what_others_keep_there_stays(tmp_path: Path) -> None:
    names = ["notes.txt", "x.packed", "a-b.packed"]
    for name in names:
        (tmp_path / name).write_text("mine")
    stored_in(tmp_path)
    assert held(tmp_path) is not None and all((tmp_path / name).read_text() == "mine" for name in names)


def test_a_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = 0, 64 << 30
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=total))
    free = PAGES * PAGE + total // 20 - 1
    assert not stored_in(tmp_path).exists()
    free += 1
    assert stored_in(tmp_path).exists()


CHILD = """
import resource, sys, threading
import numpy as np
from pathlib import Path
from hanlin.kernels import packed_cache
from hanlin.kernels.native import Arena
from hanlin.kernels.packed_cache import PackedCache, PackedKey
folder, pages, action = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
arena = Arena(pages * 4096)
arena.whole[:] = np.random.default_rng(0).bytes(arena.size)
if action == "limit":  # the system itself refuses to write more
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if action == "hang":
    write = packed_cache._write_all
    def slowly(file, data):
        write(file, data[: len(data) // 2])
        print("writing", flush=True)
        threading.Event().wait()
    packed_cache._write_all = slowly
cache = PackedCache(folder)
cache.store(PackedKey.of("model", "state", ["form"]), arena)
cache.close()
print("done", flush=True)
"""


def child(folder: Path, action: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder), str(PAGES), action]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")
def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    assert child(tmp_path, "limit").communicate() == ("done\n", None)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != ".lock"] == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")
def test_a_killed_writer_leaves_nothing_that_is_used_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    with child(tmp_path, "hang") as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        busy = stored_in(tmp_path)
        assert not busy.exists(), "only one writes at a time"
        assert len(list(tmp_path.glob("*.part"))) == 1 and held(tmp_path) is None
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob("*.part"))) == 1 and held(tmp_path) is None
    arena = filled()
    stored_in(tmp_path, arena=arena)
    assert held(tmp_path) == bytes(arena.whole) and not list(tmp_path.glob("*.part"))


def write_and_read(folder: Path, start: Any, rounds: int, results: Any) -> None:
    expected = bytes(filled().whole)
    start.wait()
    for n in range(rounds):
        stored_in(folder)
        if n % 3 == 2:
            (folder / KEY.name).unlink(missing_ok=True)
        found = held(folder)
        if found is not None and found != expected:
            results.put("wrong")
    results.put("right")


@pytest.mark.slow
def test_processes_at_once_do_not_collide(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Event(), spawn.Queue()
    writers = [spawn.Process(target=write_and_read, args=(tmp_path, start, 12, results)) for _ in range(3)]
    for writer in writers:
        writer.start()
    start.set()
    assert [results.get(timeout=120) for _ in writers] == ["right"] * 3
    for writer in writers:
        writer.join()
    stored_in(tmp_path)
    assert held(tmp_path) is not None and not list(tmp_path.glob("*.part"))


def nowhere(tmp_path: Path) -> Iterator[Path]:
    """Folders that can't be made, or written to."""
    (tmp_path / "file").write_text("")
    yield tmp_path / "file" / "packed"
    yield Path("/proc/hanlin/packed")
    (tmp_path / "closed").mkdir(mode=0o500)
    yield tmp_path / "closed" / "packed"


def test_without_a_folder_there_is_just_no_file(tmp_path: Path) -> None:
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    for folder in nowhere(tmp_path):
        path = stored_in(folder)
        if not (root and folder.parent.name == "closed"):  # nothing is closed to root
            assert not path.exists() and held(folder) is None


def test_an_interrupted_wait_gives_the_file_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PackedCache(tmp_path)
    write = packed_cache._write_all
    begun = []

    def slowly(file: Any, data: Any) -> None:
        write(file, data)
        begun.append(True)
        while not cache._stop.is_set():
            time.sleep(0.001)

    monkeypatch.setattr(packed_cache, "_write_all", slowly)
    monkeypatch.setattr(packed_cache, "_CHUNK", 1 << 20)
    cache.store(KEY, filled())
    writer = cache._writer
    assert writer is not None

    def interrupted() -> None:
        while not begun:
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.close()
    monkeypatch.undo()
    writer.join()
    assert held(tmp_path) is None and not list(tmp_path.glob("*.part"))


def test_digests_of_programs_see_content_and_missing_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("1")
    without = digest_of_files([a, b])
    b.write_text("2")
    assert len({without, digest_of_files([a, b]), digest_of_files([a])}) == 3
    assert digest_of_files([a, b]) == digest_of_files([b, a])


# ---- loading through it ---------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "internlm2": {"model_type": "internlm2", "num_key_value_heads": 2, "bias": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
}


def write_model(path: Path, model: Any, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_safetensors(path, model.named_parameters())
    (path / "config.json").write_text(json.dumps({**SIZES, **config}))
    return path


def lowered(path: Path, weights: str, cache: PackedCache | None) -> Lowering:
    """A load from beginning to end."""
    made: list[Lowering] = []

    def taker(model: Any) -> Lowering:
        made.append(Lowering(model, weights=weights, context=context, cache=cache))
        return made[0]

    with Context(1) as context:
        load_model(path, dtype=torch.float32, device=torch.device("cpu"), taker=taker)
    if cache:
        cache.close()
    assert made[0].sound()
    return made[0]


def content(lowering: Lowering) -> list[bytes]:
    """Everything that a runner computes with."""
    out = [bytes(slot.weight.memory) for slot in lowering.slots if slot.weight is not None]
    out += [slot.bias.tobytes() for slot in lowering.slots if slot.bias is not None]
    if lowering.table is not None:
        out.append(lowering.table.view(torch.uint8).numpy().tobytes())
    return out


@pytest.mark.parametrize("weights", ["auto", "float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_load_is_the_load(tiny: Any, tmp_path: Path, kind: str, weights: str) -> None:
    path = write_model(tmp_path / "m", tiny(kind, **SIZES, **KINDS[kind]), KINDS[kind])
    plain = lowered(path, weights, None)
    first, second = (lowered(path, weights, PackedCache(tmp_path / "packed")) for _ in range(2))
    assert (plain.cached, first.cached, second.cached) == (False, False, True)
    assert content(plain) == content(first) == content(second)
    assert plain.nbytes == second.nbytes and len(content(plain)) == (14 if kind == "internlm2" else 9)
    assert any(np.frombuffer(part, np.uint8).any() for part in content(plain))


def test_a_cached_load_reads_no_packed_weight(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["internlm2"]
    path = write_model(tmp_path / "m", tiny("internlm2", **SIZES, **kind), kind)
    lowered(path, "int8", PackedCache(tmp_path / "packed"))
    read: list[tuple[int, ...]] = []
    dense = base.FileSource._dense
    monkeypatch.setattr(
        base.FileSource, "_dense", lambda self, at, shape, dtype: (read.append(shape), dense(self, at, shape, dtype))[1]
    )
    assert lowered(path, "int8", PackedCache(tmp_path / "packed")).cached
    assert set(read) == {(64,)}, "the gains of the norms only"


def test_gguf_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    plain = lowered(path, "auto", None)
    first, second = (lowered(path, "auto", PackedCache(tmp_path / "packed")) for _ in range(2))
    assert not first.cached and second.cached
    assert content(plain) == content(first) == content(second)


def write_gguf(path: Path) -> Path:
    """A Llama of Q4_0 blocks with a Q8_0 embedding; the norms are floats."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(96)])
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    quants = gguf.GGMLQuantizationType
    for name, shape in {"token_embd": (96, 64), **{f"blk.0.{n}": s for n, s in shapes.items()}}.items():
        kind = quants.Q8_0 if name == "token_embd" else quants.Q4_0
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def other_weights(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


@pytest.mark.parametrize("how", ["in place", "replaced", "touched"])
def test_changed_files_are_packed_again(tiny: Any, tmp_path: Path, how: str) -> None:
    """Another model of the same name, shape, size and time of modification."""
    kind = KINDS["internlm2"]
    model = tiny("internlm2", **SIZES, **kind)
    path = write_model(tmp_path / "m", model, kind)
    weights = path / "model.safetensors"
    before, cache = content(lowered(path, "int8", PackedCache(tmp_path / "packed"))), tmp_path / "packed"
    about = weights.stat()
    if how != "touched":
        write_model(tmp_path / "other", other_weights(model), kind)
        other = tmp_path / "other" / "model.safetensors"
        if how == "replaced":
            other.replace(weights)
        else:
            weights.write_bytes(other.read_bytes())
        assert weights.stat().st_size == about.st_size
        os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    else:
        os.utime(weights)
    again = lowered(path, "int8", PackedCache(cache))
    assert not again.cached
    assert content(again) == content(lowered(path, "int8", None))
    assert (content(again) == before) == (how == "touched")
    assert lowered(path, "int8", PackedCache(cache)).cached
    assert len(list(cache.glob("*.packed"))) == 1, "the old one is of no use any more"


def test_files_that_change_while_they_are_read_are_not_kept(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS["llama"]
    path = write_model(tmp_path / "m", tiny("llama", **SIZES, **kind), kind)
    state, times = stored.StoredFile.state, iter(range(100))
    monkeypatch.setattr(
        stored.StoredFile, "state", lambda self: {name: (*now, next(times)) for name, now in state(self).items()}
    )
    assert not lowered(path, "int8", PackedCache(tmp_path / "packed")).cached
    assert not list(tmp_path.glob("packed/*.packed"))


def test_a_configuration_that_orders_rows_otherwise_does_not_share(tiny: Any, tmp_path: Path) -> None:
    kind, folder = KINDS["internlm2"], tmp_path / "packed"
    path = write_model(tmp_path / "m", tiny("internlm2", **SIZES, **kind), kind)
    before = lowered(path, "int8", PackedCache(folder))
    # The fused projection has as many rows with twice the heads of half the size; q, k and v stand elsewhere in it.
    changed = {**SIZES, **kind, "num_attention_heads": 8, "num_key_value_heads": 4}
    (path / "config.json").write_text(json.dumps(changed))
    again = lowered(path, "int8", PackedCache(folder))
    assert not again.cached and content(again) == content(lowered(path, "int8", None)) != content(before)


@pytest.mark.parametrize("other", ["weights", "isa", "program", "torch"])
def test_another_kind_cpu_or_version_does_not_share(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    kind = KINDS["llama"]
    path, folder = write_model(tmp_path / "m", tiny("llama", **SIZES, **kind), kind), tmp_path / "packed"
    lowered(path, "int8", PackedCache(folder))
    if other == "isa":
        monkeypatch.setenv("HANLIN_CPU_ISA", "portable")
    elif other == "program":
        monkeypatch.setattr("hanlin.engine.lowering.digest_of_files", lambda paths: b"another")
    elif other == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0.0")
    again = lowered(path, "int4" if other == "weights" else "int8", PackedCache(folder))
    assert not again.cached and len(list(folder.glob("*.packed"))) == 2


def test_the_program_that_packs_is_in_the_key(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def digest(paths: Any) -> bytes:
        seen.extend(str(path.relative_to(Path(assembly.__file__).parent)) for path in paths)
        return digest_of_files(paths)

    monkeypatch.setattr("hanlin.engine.lowering.digest_of_files", digest)
    kind = KINDS["llama"]
    lowered(write_model(tmp_path / "m", tiny("llama", **SIZES, **kind), kind), "int8", PackedCache(tmp_path / "packed"))
    library = next(name for name in seen if "hanlin_cpu." in name)
    wanted = {"engine/lowering.py", "checkpoints/names.py", "checkpoints/blocks.py", "models/llama.py", library}
    assert wanted <= set(seen)


def test_the_switch_and_the_place(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["internlm2"]
    path = write_model(tmp_path / "m", tiny("internlm2", **SIZES, **kind), kind)
    monkeypatch.setenv("HANLIN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(assembly, "_LEAST_PACKED", 0)

    def load(**options: Any) -> assembly.Placement:
        placement = assembly.place(EngineConfig(weights="int4", runner="native", threads=1, **options))
        assembly.load(path, placement)
        assert placement.context is not None and placement.lowering is not None
        placement.context.close()
        if placement.cache:
            placement.cache.close()
        return placement

    assert load(packed_cache=False).cache is None and not (tmp_path / "home").exists()
    placements = [load(), load(), load(packed_cache=False)]
    assert [p.lowering.cached for p in placements if p.lowering] == [False, True, False]
    assert len(list((tmp_path / "home" / "packed").glob("*.packed"))) == 1


@pytest.mark.parametrize("where", [0, 5000, -200, -1])
def test_weights_of_a_damaged_file_are_packed_again_before_they_are_used(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int
) -> None:
    kind = KINDS["internlm2"]
    path = write_model(tmp_path / "m", tiny("internlm2", **SIZES, **kind), kind)
    monkeypatch.setenv("HANLIN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(assembly, "_LEAST_PACKED", 0)
    settings = EngineConfig(weights="int8", runner="native", threads=1, cache_bytes=1 << 20)

    def packed() -> Lowering:
        placement = assembly.place(settings)
        loaded = assembly.load(path, placement)
        assembly._runner(loaded, settings, placement, loaded.config.rope, 8).close()
        assert placement.cache and placement.lowering
        placement.cache.close()
        return placement.lowering

    first = packed()
    (file,) = (tmp_path / "home" / "packed").glob("*.packed")
    broken = bytearray(file.read_bytes())
    broken[where] ^= 16
    file.write_bytes(broken)
    second, third = packed(), packed()
    assert (first.cached, second.cached, third.cached) == (False, False, True)
    assert content(first) == content(second) == content(third)
