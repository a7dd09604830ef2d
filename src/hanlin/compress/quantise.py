"""Quantise a model into a directory: layer by layer, resumable, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hanlin.checkpoints.description import read_json
from hanlin.checkpoints.quantisation import read_quantisation
from hanlin.checkpoints.quantised import QuantisedSource
from hanlin.checkpoints.row_quantised import RowQuantisedSource
from hanlin.checkpoints.safetensors_writer import save_safetensors
from hanlin.checkpoints.source import open_source
from hanlin.compress.calibration import Windows
from hanlin.compress.formats import FORMATS, Format, configuration, problems_of, tensors
from hanlin.compress.grid import Grid, RowGrid
from hanlin.compress.layers import Method, quantise_layer, watched
from hanlin.compress.report import Report, Row
from hanlin.compress.source import Original
from hanlin.compress.streams import Stream
from hanlin.errors import CheckpointError, ConfigError, problems
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions

__all__ = ["Settings", "quantise"]

Progress = Callable[[str, int, int], None]
METHODS: tuple[Method, ...] = ("rtn", "awq", "gptq", "smoothquant")
_GROUP = 128
_OWN = ("chatglm", "chatglm2")  # families with a format of their own
_HEAD_TOKENS = 64
_HEAD_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    Attributes:
        method: "rtn" rounds to nearest; "awq", "gptq" and "smoothquant" need text to calibrate on.
        group_size: columns that share a scale; None: 128, or whole rows where the format has only those.
        symmetric: no zero points; None: as the format is mostly written: GPTQ and 8 bits without, 4 bits with them.
        format: how the result is stored; None: the method's own, 8 bits without GPTQ as compressed-tensors. "chatglm"
            is what ChatGLM's `quantize` saves: one scale a row.

    Raises:
        ConfigError: all values that can't be.
    """

    method: Method = "awq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool | None = None
    format: Format | None = None

    def __post_init__(self) -> None:
        found = []
        if self.method not in METHODS:
            found.append(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.bits not in (4, 8):
            found.append(f"bits must be 4 or 8, not {self.bits!r}")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            found.append(f"group_size must be a multiple of 8, not {self.group_size!r}")
        if self.format not in (None, *FORMATS):
            found.append(f"format must be one of {', '.join(FORMATS)}, not {self.format!r}")
        if self.method == "smoothquant" and self.bits != 8:
            found.append(f"smoothquant is for 8 bits, not {self.bits!r}")
        if self.method == "smoothquant" and self.format not in (None, "compressed-tensors"):
            found.append(f"smoothquant is stored as compressed-tensors, not {self.format!r}")
        if self.format == "chatglm" and self.method != "rtn":
            found.append(f"ChatGLM's own format is for method rtn, not {self.method!r}")
        if self.rows and self.group_size is not None:
            found.append(f"group_size must be left out, not {self.group_size!r}: there is one scale a row")
        if self.rows and self.symmetric is False:
            found.append("zero points can't be stored where there is one scale a row")
        if found:
            raise ConfigError(problems("quantising", found))

    @property
    def rows(self) -> bool:
        """One scale a row."""
        return self.format == "chatglm" or self.method == "smoothquant"

    def of(self, family: str) -> Settings:
        """With the format that a family has of its own."""
        if self.format is None and self.method == "rtn" and self.group_size is None and family in _OWN:
            return replace(self, format="chatglm")
        return self

    @property
    def stored(self) -> Format:
        """The format of the result."""
        if self.format is not None or self.method == "gptq":
            return self.format or "gptq"
        return "awq" if self.bits == 4 and not self.symmetric else "compressed-tensors"

    @property
    def grid(self) -> Grid:
        symmetric = self.symmetric if self.symmetric is not None else self.bits == 8 or self.method == "gptq"
        if self.stored == "awq" and self.symmetric is None:
            symmetric = False
        if self.rows:
            return RowGrid(bits=self.bits)
        group = self.group_size or _GROUP
        return Grid(bits=self.bits, group=group, symmetric=symmetric, least_zero=int(self.stored == "gptq"))


def quantise(
    source: Path,
    target: Path,
    settings: Settings,
    *,
    windows: Windows | None = None,
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    peak_memory: Callable[[], int] | None = None,
) -> Report:
    """Write the quantised model to the new directory `target`, with a report in it.

    One layer is in memory at a time; hidden states and finished layers lie in a hidden directory beside `target`,
    from which the same call goes on after an interruption.

    Args:
        windows: text; without it only "rtn" can be done, and nothing is measured.
        files: contents by name to write beside the weights of a model that is not in a directory.
        progress: called with (what is done, steps done, steps in all).

    Raises:
        ConfigError: what can't be quantised or written so, all of it at once; no text for what needs it.
        CheckpointError: broken files, `target` exists, or a full disk.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already. Name a new directory, or remove it first.")
    with Original(source) as original, torch.inference_mode():
        settings = settings.of(original.config.model_type)
        job = _Job(original, target, settings, windows, progress or (lambda doing, done, steps: None))
        job.check()
        with _held(job.state):
            job.prepare()
            for layer in range(job.done, len(original.parts.blocks)):
                job.layer(layer)
            return job.finish(files or {}, peak_memory or (lambda: 0))


class _Job:
    def __init__(
        self, original: Original, target: Path, settings: Settings, windows: Windows | None, progress: Progress
    ) -> None:
        self.original, self.target, self.settings, self.progress = original, target, settings, progress
        self.windows, self.grid = windows, settings.grid
        self.state = target.parent / f".{target.name}.quantising"
        self.began = time.perf_counter()
        self.steps = len(original.parts.blocks) + 2
        self.streams: dict[str, Stream] = {}
        width = original.config.hidden_size
        if windows is not None:
            self.streams["calibration"] = Stream(self.state, "calibration", windows.calibration, width)
            if len(windows.evaluation):
                for name in ("before", "after"):
                    self.streams[name] = Stream(self.state, name, windows.evaluation, width)
        self.done, self.rows, self.spent = 0, list[Row](), 0.0

    def check(self) -> None:
        shapes = {}
        for block in self.original.parts.blocks:
            for linear in (*block.qkv, block.out, *block.gate_up, block.down):
                shapes[self.original.names[id(linear)]] = (linear.out_features, linear.in_features)
        found, remedy = problems_of(self.settings.stored, self.grid, shapes), ""
        if found and not self.settings.rows:
            small = next((size for size in (128, 64, 32) if all(in_ % size == 0 for _, in_ in shapes.values())), 0)
            remedy = f"--group-size {small} fits this model; " if small else ""
            remedy += "--format gptq takes a shorter last group, which not every program reads. "
        family, method = self.original.config.model_type, self.settings.method
        if family == "chatglm" and (method != "rtn" or self.windows is not None):
            found.append("ChatGLM-6B takes method rtn without text: its residual goes on from what its norms give")
        elif self.windows is None and method != "rtn":
            found.append(f"method {method!r} needs text to calibrate on")
            remedy += "--calibration FILE (.txt, or .jsonl with 'text' or 'messages') takes a few hundred kilobytes of "
            remedy += "what the model will be used for; --method rtn needs none."
        if self.settings.stored == "chatglm" and family not in _OWN:
            found.append(f"ChatGLM's own format is for {' and '.join(_OWN)}, not {family!r}")
        if found:
            raise ConfigError(problems(f"{self.original.path} as {self.settings.stored}", found, remedy))

    def _plan(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for ids in (self.windows.calibration, self.windows.evaluation) if self.windows else ():
            digest.update(np.ascontiguousarray(ids).tobytes() + str(ids.shape).encode())
        return {"settings": asdict(self.settings), "text": digest.hexdigest(), "files": self.original.fingerprint()}

    def prepare(self) -> None:
        """Go on where the same work was interrupted, or begin."""
        plan = self._plan()
        known = read_json(self.state / "plan.json", optional=True)
        if known == plan:
            past = read_json(self.state / "done.json", optional=True)
            self.done, self.spent = int(past.get("layers", 0)), float(past.get("seconds", 0.0))
            self.rows = [Row(**row) for row in past.get("rows", ())]
        if self.done == 0:
            for old in self.state.iterdir():
                if old.name != "lock":
                    old.unlink()
            if self.streams:
                embedding = self.original.load(f"{self._name(self.original.parts.embedding)}.weight")
                for stream in self.streams.values():
                    stream.begin(lambda ids: embedding[ids])
            (self.state / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        self.progress("layers", self.done + 1, self.steps)

    def layer(self, number: int) -> None:
        """Quantise one layer, write it, and take all text through it."""
        block = self.original.layers[number]
        prefix = self._name(block)
        self.original.fill(prefix, block)
        parts = self.original.parts.blocks[number]

        def run(x: Tensor) -> Tensor:
            rotation = self.original.rope(Positions(torch.arange(len(x))[None]))
            return cast(Tensor, block(0, x, rotation, PackedAttend([len(x)])))

        if "before" in self.streams:
            self.streams["before"].through(number, run)
        watching = None
        if "calibration" in self.streams:
            with watched(parts) as watching:
                for x in self.streams["calibration"].windows(number):
                    run(x)
        changes = quantise_layer(parts, watching, self.settings.method, self.grid)
        made = {}
        for change in changes:
            name = self._name(change.linear)
            self.rows.append(Row(name, change.error, change.nearest))
            for end, tensor in tensors(self.settings.stored, self.grid, change.quantised).items():
                made[f"{name}.{end}"] = tensor
        packed = {f"{self._name(change.linear)}.weight" for change in changes}
        for name, value in block.named_parameters():
            if f"{prefix}.{name}" not in packed:
                made[f"{prefix}.{name}"] = _half(f"{prefix}.{name}", value)
                value.copy_(value.half().float())
        for name in self.streams.keys() & {"calibration", "after"}:
            self.streams[name].through(number, run)
        save_safetensors(self.state, made.items(), stem=f"layer-{number}", max_shard_bytes=1 << 60)
        block.to("meta")
        self._record(number + 1)
        self.progress(f"layer {number}", number + 2, self.steps)

    def finish(self, files: Mapping[str, bytes], peak_memory: Callable[[], int]) -> Report:
        """Measure, put everything together, and give it its place."""
        settings: dict[str, Any] = {
            "method": self.settings.method,
            "format": self.settings.stored,
            "bits": self.grid.bits,
        }
        settings |= {"group size": self.grid.group or "a row", "symmetric": self.grid.symmetric}
        perplexity = (self._perplexity("before"), self._perplexity("after")) if "before" in self.streams else None
        kept = [self._name(self.original.parts.head)]
        config = self.original.configuration()
        config |= configuration(self.settings.stored, self.grid, kept)
        try:
            with tempfile.TemporaryDirectory(prefix=f".{self.target.name}-", dir=self.target.parent) as staging:
                whole = Path(staging) / "model"
                weights = save_safetensors(whole, self._tensors())
                self.original.write_others(whole, files)
                text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
                (whole / "config.json").write_text(text, encoding="utf-8")
                with open_source(whole) as written:
                    if self.settings.stored == "chatglm":
                        RowQuantisedSource(written, self.grid.bits)
                    else:
                        said = config["quantization_config"]
                        QuantisedSource(written, read_quantisation(said, whole / "config.json"))
                report = Report(
                    settings=settings,
                    rows=self.rows,
                    tokens=self._tokens(),
                    perplexity=perplexity,
                    original_bytes=sum(info.nbytes for info in self.original.source.infos.values()),
                    written_bytes=sum(path.stat().st_size for path in weights),
                    seconds=self.spent + time.perf_counter() - self.began,
                    peak_memory=peak_memory(),
                )
                report.write(whole)
                whole.rename(self.target)
        except OSError as error:
            raise CheckpointError(f"{self.target}: could not be written: {error.strerror or error}.") from error
        self.progress("done", self.steps, self.steps)
        shutil.rmtree(self.state, ignore_errors=True)
        return report

    def _tokens(self) -> tuple[int, int]:
        return (self.windows.calibration.size, self.windows.evaluation.size) if self.windows else (0, 0)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        blocks = [f"{self._name(block)}." for block in self.original.layers]
        for number in range(len(blocks)):
            with open_source(self.state / f"layer-{number}.safetensors") as part:
                for name in part.infos:
                    yield name, part.load(name)
        for name, _ in self.original.model.named_parameters():
            if not name.startswith(tuple(blocks)):
                yield name, _half(name, self.original.load(name))

    def _perplexity(self, name: str) -> float:
        """exp of the mean loss of all tokens but the first of each window."""
        stream, parts = self.streams[name], self.original.parts
        self.original.fill(self._name(parts.norm), parts.norm)
        head = self.original.load(f"{self._name(parts.embedding if parts.tied else parts.head)}.weight")
        if name == "after":
            head = head.half().float()
        loss, count = 0.0, 0
        for ids, x in zip(torch.from_numpy(stream.ids), stream.windows(len(parts.blocks)), strict=True):
            states = torch.split(parts.norm(x[:-1]), _HEAD_TOKENS)
            for rows, wanted in zip(states, torch.split(ids[1:], _HEAD_TOKENS), strict=True):
                logits = torch.cat([rows @ part.t() for part in torch.split(head, _HEAD_ROWS)], 1)
                loss += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                count += len(wanted)
        return math.exp(min(loss / count, 700))

    def _record(self, layers: int) -> None:
        seconds = self.spent + time.perf_counter() - self.began
        done = {"layers": layers, "seconds": seconds, "rows": [asdict(row) for row in self.rows]}
        fresh = self.state / "done.json.new"
        fresh.write_text(json.dumps(done), encoding="utf-8")
        fresh.replace(self.state / "done.json")

    def _name(self, module: nn.Module) -> str:
        return str(self.original.names[id(module)])


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A directory that no other process works in meanwhile."""
    from filelock import FileLock, Timeout

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"{directory}: another process is quantising there") from None


def _half(name: str, value: Tensor) -> Tensor:
    """As float16, which every program takes beside quantised weights.

    Raises:
        ConfigError: a value that float16 cannot hold.
    """
    half = value.half()
    if not bool(half.isfinite().all()):
        raise ConfigError(f"'{name}' has values that float16 cannot hold, and can't stand beside quantised weights")
    return half
