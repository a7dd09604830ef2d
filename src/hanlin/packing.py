"""`hanlin convert --to hanlin`: a model directory whose weights lie there as the native kernels hold them.

Such a directory starts at once: its weights are mapped. The layout is the same for every CPU that the library knows; a
version with another layout reads the weights row by row and packs them again, from the same directory.
"""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hanlin.checkpoints.base import fail
from hanlin.checkpoints.description import describe_directory, read_json
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.packed import IMAGE_FILE, KEY, PACKED_VERSION, PackedSource, padded_bytes
from hanlin.checkpoints.safetensors_writer import save_safetensors
from hanlin.checkpoints.source import open_source
from hanlin.checkpoints.staging import staged
from hanlin.checkpoints.weights import Weights, probe
from hanlin.engine.lowering import Lowering, Slot
from hanlin.errors import CheckpointError, ConfigError
from hanlin.kernels.native import Context, unavailable_reason
from hanlin.kernels.packed_cache import PAGE, PackedImage, sums_of
from hanlin.models.parts import HasParts

__all__ = ["KINDS", "pack_model"]

Progress = Callable[[int, int], None]
KINDS = ("auto", "int8", "int4", "bfloat16")
_KEPT = (
    *("*.model", "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "generation_config.json", "chat_template.jinja", "LICENSE*"),
)
_SUMS = 64  # hexadecimal digits
# How far a value may be from its original, in steps of its row: half a step of its group, and what float16 rounds.
_STEPS = {"INT8": 127.0, "INT8_ROW": 127.0, "INT4": 8.0, "INT4_MIN": 7.5, "INT4_ZERO": 7.5}


def pack_model(source: Path, target: Path, *, weights: str = "auto", progress: Progress | None = None) -> Path:
    """Write the model directory `source` as the new directory `target`, whole or not at all.

    Args:
        weights: one of `KINDS`; "auto": quantised ones as they are stored, others as bfloat16.
        progress: called with (bytes done, bytes in all), packing and comparing.

    Raises:
        ConfigError: no native library, or weights that can't have the kind.
        CheckpointError: broken files, `target` exists, a full disk, or a result that is not what was meant.
    """
    if weights not in KINDS:
        raise ConfigError(f"weights must be one of {', '.join(KINDS)}, not {weights!r}")
    reason = unavailable_reason()
    if reason is not None:
        raise ConfigError(f"weights are packed by the native library, which cannot be used: {reason}")
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: exists already. Choose another name, or remove it first.")
    if not source.is_dir():
        raise ConfigError(f"{source}: not a model directory. Convert a GGUF file --to hf first.")
    with open_source(source) as stored:
        plan = {"to": "hanlin", "weights": weights, "hanlin": version("hanlin"), "source": stored.state()}
    job = _Job(source, weights, progress or (lambda done, total: None))
    with staged(target, plan) as staging:
        if not staging.written:
            staging.begin({})  # packing starts anew: it is as fast as checking what is there
            staging.begin(plan)
            job.write(staging.whole)
            staging.set_written()
        job.compare(staging.whole)
        staging.publish(target)
    return target


@dataclass
class _Job:
    source: Path
    weights: str
    progress: Progress

    def write(self, path: Path) -> None:
        path.mkdir()
        made = _Packed(path / IMAGE_FILE, self.weights)

        def packed(done: int, total: int) -> None:
            made.forget()
            self.progress(done, 2 * total)

        try:
            loaded = load_model(
                self.source,
                dtype=torch.float32,
                device=torch.device("cpu"),
                taker=made.taker,
                progress=packed,
            )
            made.finish()
        finally:
            made.close()
        rest = {name: value for name, value in loaded.model.named_parameters() if not value.is_meta}
        save_safetensors(path, [*rest.items(), *made.rows()], stem="rest")
        for pattern in _KEPT:
            for file in self.source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, path / file.name)
        values = dict(describe_directory(self.source).values)
        values["quantization_config"] = {"quant_method": "hanlin", "version": 1}
        _write_json(path / "config.json", values)
        _write_json(path / "tokenizer_config.json", read_json(self.source / "tokenizer_config.json", optional=True))

    def compare(self, path: Path) -> None:
        """Read what was written: the whole image, each matrix within half a step of its original, a probe's logits.

        Raises:
            CheckpointError: what differs.
        """
        described = describe_directory(self.source)
        with open_source(self.source) as theirs, open_source(path) as ours:
            packed = PackedSource(ours)
            image = PackedImage(**packed.image._asdict())
            found = image.find(image.layout, image.size)
            assert found is not None
            found.sound()
            del found
            if described.quantisation is not None:  # used as they are: there is nothing to round
                self.progress(1, 1)
                return
            before = Weights.open(theirs, described.values)
            after = Weights.open(packed, described.values)
            wrong = _differences(before, after, self.progress)
            if wrong:
                fail(path, wrong, "The disk or the memory of this machine is at fault. Nothing was kept.")
            one, other = probe(before), probe(after)
            if not bool(other.isfinite().all()) and bool(one.isfinite().all()):
                raise CheckpointError(f"{path}: the logits of a probe prompt are not finite. Nothing was kept.")
        self.progress(1, 1)


def _differences(before: Weights, after: Weights, progress: Progress) -> list[str]:
    total = sum(info.nbytes for info in before.source.infos.values())
    done, wrong = total, []
    for name in after.wanted:
        value, again = before.load(name), after.load(name)
        kind = after.source.infos[name].dtype.partition("/")[0]
        for start in range(0, len(value), 1 << 12):
            one, other = value[start : start + (1 << 12)].float(), again[start : start + (1 << 12)].float()
            if kind in _STEPS:
                reach = one.abs().amax(-1, keepdim=True) / _STEPS[kind]
                good = (one - other).abs() <= 0.51 * reach + 0.002 * one.abs().amax(-1, keepdim=True)
            elif kind == "BF16":
                good = one.bfloat16().float() == other
            else:
                good = (one == other) | (one.isnan() & other.isnan())
            if not bool(good.all()):
                wrong.append(f"'{name}' does not read as it was written")
                break
        done += value.nbytes
        progress(min(done, 2 * total), 2 * total)
        after.source.forget()
    return wrong


class _Packed:
    """The file with the image, mapped while it is packed into, so that it takes little memory."""

    def __init__(self, path: Path, weights: str) -> None:
        self._path, self._weights = path, weights
        self._context = Context()
        self._lowering: Lowering | None = None
        self._mapping: mmap.mmap | None = None
        self._header = b""
        self._start = self._size = 0

    def taker(self, model: nn.Module) -> Lowering:
        self._lowering = Lowering(
            cast(HasParts, model), weights=self._weights, context=self._context, memory=self._memory
        )
        return self._lowering

    def forget(self) -> None:
        """Let go of what was packed: it is the file's, and counts as memory until then."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def finish(self) -> None:
        assert self._mapping is not None and self._lowering is not None
        image = np.frombuffer(self._mapping, np.uint8, self._size, self._start)
        sums, layout = sums_of(image, self.forget).hex(), self._lowering.layout.hex()
        del image
        header = self._header.replace(b"S" * _SUMS, sums.encode()).replace(b"L" * _SUMS, layout.encode())
        with self._path.open("r+b") as file:
            file.write(header)

    def close(self) -> None:
        self._context.close()
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.flush()
            with suppress(BufferError):  # its memory goes with the last view of it
                mapping.close()

    def rows(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Which output each row of a matrix became."""
        assert self._lowering is not None
        for slot in self._lowering.slots:
            for name, places in slot.places.items():
                yield f"{name.removesuffix('.weight')}.rows", torch.from_numpy(places.copy())

    def _memory(self, size: int) -> NDArray[np.uint8]:
        """A new file with its header, and the memory of the rest."""
        self._size = size
        self._start, self._header = self._head(size)
        with self._path.open("w+b") as file:
            file.write(self._header)
            file.truncate(self._start + size)
            self._mapping = mmap.mmap(file.fileno(), self._start + size)
        return np.frombuffer(self._mapping, np.uint8, size, self._start)

    def _head(self, size: int) -> tuple[int, bytes]:
        """Where the image starts, at a whole page, and all before it, with room for the sums and the layout."""
        lowering = self._lowering
        assert lowering is not None
        tensors: dict[str, Any] = {}
        end = 0

        def add(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
            nonlocal end
            tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes

        slots = list(lowering.slots)
        for number, slot in enumerate(slots):
            nbytes = padded_bytes(slot.kind.name, slot.group, slot.out, slot.in_)
            add(f"packed.{number}", "U8", [nbytes], nbytes)
        for number, slot in enumerate(slots):
            if slot.biases:
                nbytes = -(-4 * slot.out // 64) * 64
                add(f"packed.{number}.bias", "U8", [nbytes], nbytes)
        if lowering.table_form is not None:
            name, dtype, shape = lowering.table_form
            add(name, dtype, list(shape), (4 if dtype == "F32" else 2) * shape[0] * shape[1])
        if end < size:
            add("packed.padding", "U8", [size - end], size - end)
        said = {
            "version": PACKED_VERSION,
            "slots": [_described(slot) for slot in slots],
            "offset": 0,
            "size": size,
            "sums": "S" * _SUMS,
            "layout": "L" * _SUMS,
        }
        start = PAGE
        while True:
            metadata = {"format": "pt", KEY: json.dumps({**said, "offset": start})}
            text = json.dumps({"__metadata__": metadata, **tensors}).encode()
            if 8 + len(text) <= start:
                text += b" " * (start - 8 - len(text))
                return start, len(text).to_bytes(8, "little") + text
            start = -(-(8 + len(text)) // PAGE) * PAGE


def _described(slot: Slot) -> dict[str, Any]:
    weights = list(slot.places)
    biases = [f"{name.removesuffix('weight')}bias" for name in weights]
    return {
        "kind": slot.kind.name,
        "group": slot.group,
        "out": slot.out,
        "in": slot.in_,
        "weights": weights,
        "biases": [name for name in biases if name in slot.biases],
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    kept = {key: value for key, value in values.items() if key != "auto_map"}
    if kept:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
