"""InternEvo's training checkpoints as a source of tensors: ranks and stages joined, under their released names.

    model_tp{t}_pp{p}.pt    rank t's share of the layers of stage p, numbered from 0 in each stage
    model_wp{w}_pp{p}.pt    the same where training cut weights ("isp"): all of them by rows
    model_config.pt         the arguments that the model was built with

What follows from the arguments: with `adapt_hf` False (its default there) the rotary pairs of q and k stand beside
each other and are put in two halves, but for InternLM 1; with `norm_head` the head's rows are used with length 1, and
come so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hanlin.checkpoints.base import DTYPES, MAX_TENSORS, TensorInfo, fail, shown
from hanlin.checkpoints.bin_file import BinFile, read_configuration
from hanlin.checkpoints.internevo_names import CONFIGURATION, FAMILIES, FILE, Names, to_halves
from hanlin.checkpoints.stored import StoredFile
from hanlin.errors import CheckpointError

__all__ = ["InternEvoSource", "is_internevo"]

_MAX_FILES = 4096
_ROWS = 1 << 13
_REMEDY = "Copy all files of one step's folder again."
# Arguments under which the model is another one than released, unless they have this value.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "norm_type": ("rmsnorm", None),
        "apply_post_layer_norm": (False, None),
        "deepnorm": (False, None),
        "use_swiglu": (True, None),
        "num_experts": (0, 1, None),
        "multiple_of": (256, None),
    }
)


def is_internevo(names: Iterable[str]) -> bool:
    """Whether a directory with files of these names holds a training checkpoint."""
    return any(FILE.fullmatch(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class _Joined:
    """
    Attributes:
        pieces: of each rank in order, the file and the name.
        axis: along which they are joined; None: each rank has all of it.
        part: 0, 1, 2 for q, k, v of a fused projection, of which a rank has a third each; None for the whole.
    """

    pieces: tuple[tuple[BinFile, str], ...]
    axis: int | None
    part: int | None = None

    @property
    def dtypes(self) -> set[str]:
        return {file.infos[name].dtype for file, name in self.pieces}

    def shape(self) -> tuple[int, ...]:
        shapes = [file.infos[name].shape for file, name in self.pieces]
        shape = list(shapes[0])
        if self.axis is not None:
            shape[self.axis] = sum(shape[self.axis] for shape in shapes)
        if self.part is not None:
            shape[0] //= 3
        return tuple(shape)

    def problem(self) -> str | None:
        shapes = [file.infos[name].shape for file, name in self.pieces]
        name = shown(self.pieces[0][1])
        axis = self.axis
        if not shapes[0] or len({len(shape) for shape in shapes}) > 1 or len(shapes[0]) > 2:
            return f"{name} has shapes {shown(shapes)}"
        rest = {shape if axis is None else shape[:axis] + shape[axis + 1 :] for shape in shapes}
        if len(rest) > 1 or len(self.dtypes) > 1:
            return f"{name} has shapes {shown(shapes)} and types {', '.join(sorted(self.dtypes))}: ranks do not fit"
        if self.part is not None and any(shape[0] % 3 for shape in shapes):
            return f"{name} has {shapes[0][0]} rows, which are not q, k and v"
        return None

    def load(self) -> Tensor:
        if self.axis is None or len(self.pieces) == 1:
            return self._piece(*self.pieces[0]).contiguous()
        (dtype,) = self.dtypes
        whole, start = torch.empty(self.shape(), dtype=DTYPES[dtype]), 0
        for piece in self.pieces:  # no more than one at a time is in memory twice
            value = self._piece(*piece)
            whole.narrow(self.axis, start, value.shape[self.axis]).copy_(value)
            start += value.shape[self.axis]
        return whole

    def _piece(self, file: BinFile, name: str) -> Tensor:
        value = file.load(name)
        return value if self.part is None else value.chunk(3)[self.part]


class InternEvoSource:
    """See `TensorSource`. `metadata` holds the arguments of `model_config.pt`.

    Attributes:
        family: "internlm2" or "internlm".

    Raises:
        UnsafeCheckpointError: a file wants to call something.
        CheckpointError: files that are missing, broken or of another model; everything wrong at once.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        by_rows, stages = _grid(directory)
        with ExitStack() as opened:
            self.metadata: Mapping[str, Any] = MappingProxyType(_arguments(directory))
            opening = [[_opened(path, opened) for path in ranks] for ranks in stages]
            self._files = [file for ranks in opening for file in ranks]
            self.family, self._joined = _layout(directory, opening, self.metadata, by_rows)
            opened.pop_all()
        self._heads = int(self.metadata["num_attention_heads"])
        self._kv_heads = int(self.metadata.get("num_kv_attention_heads") or self._heads)
        self._in_pairs = self.family == "internlm2" and not self.metadata.get("adapt_hf", False)
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(
            {name: self._info(name, joined) for name, joined in self._joined.items()}
        )

    def _info(self, name: str, joined: _Joined) -> TensorInfo:
        file, first = joined.pieces[0]
        info, shape = file.infos[first], joined.shape()
        itemsize = info.nbytes // max(1, math.prod(info.shape))
        return TensorInfo(name, shape, info.dtype, math.prod(shape) * itemsize, info.file)

    def values(self) -> dict[str, Any]:
        """The keys of a `config.json`, as far as the files say; a model's longest context they do not."""
        said, names = self.metadata, FAMILIES[self.family]
        embedding = self.infos[f"{names.outer[names.embedding[0]]}.weight"]
        inner = "feed_forward.w1" if self.family == "internlm2" else "mlp.gate_proj"
        old = self.family == "internlm"
        return {
            "architectures": ["InternLMForCausalLM" if old else "InternLM2ForCausalLM"],
            "model_type": self.family,
            "vocab_size": said.get("vocab_size") or embedding.shape[0],
            "hidden_size": embedding.shape[-1],
            "intermediate_size": self.infos[f"model.layers.0.{inner}.weight"].shape[0],
            "num_hidden_layers": self._layers(),
            "num_attention_heads": self._heads,
            **({} if old else {"num_key_value_heads": self._kv_heads}),
            "hidden_act": "silu",
            "max_position_embeddings": said.get("max_position_embeddings") or (2048 if old else 32768),
            "rms_norm_eps": said.get("layer_norm_epsilon") or 1e-5,
            "rope_theta": said.get("rope_base") or 10000,
            "rope_scaling": None,
            "bias": any(name.endswith(".bias") for name in self.infos),
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0 if old else 2,
            "torch_dtype": {"F32": "float32", "F16": "float16"}.get(embedding.dtype, "bfloat16"),
            "use_cache": True,
        }

    def _layers(self) -> int:
        return len({name.split(".")[2] for name in self.infos if name.startswith("model.layers.")})

    def load(self, name: str) -> Tensor:
        value = self._find(name).load()
        if self._in_pairs and ".attention.wqkv." in name:
            rows, per_kv = value.shape[0], self._heads // self._kv_heads + 2
            if rows % (2 * per_kv * self._kv_heads):
                fail(self.path, [f"{shown(name)} has {rows} rows, which {self._heads} heads do not divide"])
            value = to_halves(value, self._heads, self._kv_heads)
        if self.metadata.get("norm_head") and name in ("output.weight", "lm_head.weight"):
            for start in range(0, len(value), _ROWS):
                part = value[start : start + _ROWS]
                part.copy_(torch.nn.functional.normalize(part.float(), dim=-1))
        return value

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        data: npt.NDArray[np.uint8] = self.load(name).reshape(-1).view(torch.uint8).numpy()
        data.flags.writeable = False
        return data

    def forget(self) -> None:
        for file in self._files:
            file.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        arguments = StoredFile(self.path / CONFIGURATION)
        try:
            found = arguments.state()
            for file in self._files:
                found |= file.state()
            return found
        finally:
            arguments.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> InternEvoSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, name: str) -> _Joined:
        if name not in self._joined:
            raise CheckpointError(f"{self.path}: there is no tensor {shown(name)} among its {len(self.infos)}")
        return self._joined[name]


def _grid(directory: Path) -> tuple[bool, list[list[Path]]]:
    """Whether all is cut by rows; and the files of each stage, rank by rank."""
    names = [entry.name for entry in directory.iterdir()]
    matches = [match for match in map(FILE.fullmatch, names) if match]
    found = []
    if any(match["share"] for match in matches):
        found.append("the weights are in FSDP's shares (_dp): save the checkpoint without FSDP")
    cuts = {match["cut"] for match in matches}
    if len(cuts) > 1:
        found.append("files of both cuts, tp and wp, are there")
    if len(matches) > _MAX_FILES:
        found.append(f"{len(matches):,} files of weights; at most {_MAX_FILES:,} are read")
    if CONFIGURATION not in names:
        found.append(f"no {CONFIGURATION}, which says how many heads there are")
    if found:
        fail(directory, found, _REMEDY)
    there = {(int(match["stage"]), int(match["rank"])): match[0] for match in matches}
    stages, ranks = (1 + max(numbers) for numbers in zip(*there, strict=True))
    if len(there) != stages * ranks or len(there) != len(matches):
        (cut,) = cuts
        want = [(stage, rank) for stage in range(min(stages, 100)) for rank in range(min(ranks, 100))]
        missing = [f"missing file model_{cut}{rank}_pp{stage}.pt" for stage, rank in want if (stage, rank) not in there]
        fail(directory, missing or ["a rank stands twice"], _REMEDY)
    return cuts == {"wp"}, [[directory / there[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _arguments(directory: Path) -> dict[str, Any]:
    path = directory / CONFIGURATION
    said = read_configuration(path)
    found = []
    for name in ("num_attention_heads", "num_kv_attention_heads", "vocab_size", "max_position_embeddings"):
        optional = name != "num_attention_heads" and said.get(name) is None
        if not optional and not (type(said.get(name)) is int and 0 < said[name] < 1 << 31):
            found.append(f"'{name}' must be a whole number > 0, not {shown(said.get(name))}")
    for name in ("layer_norm_epsilon", "rope_base"):
        if said.get(name) is not None and (type(said[name]) not in (int, float) or not 0 < said[name] < 1e12):
            found.append(f"'{name}' must be a number > 0, not {shown(said[name])}")
    for name in ("adapt_hf", "norm_head"):
        if type(said.get(name, False)) is not bool:
            found.append(f"'{name}' must be true or false, not {shown(said[name])}")
    for name, values in _NEUTRAL.items():
        if name in said and said[name] not in values:
            found.append(f"'{name}' = {shown(said[name])}: such a model was not released, and is not read here")
    heads, kv_heads = said.get("num_attention_heads"), said.get("num_kv_attention_heads")
    if not found and kv_heads and int(heads or 0) % kv_heads:
        found.append(f"'num_attention_heads' = {heads} is not a multiple of 'num_kv_attention_heads' = {kv_heads}")
    if found:
        fail(path, found)
    return said


def _opened(path: Path, stack: ExitStack) -> BinFile:
    file = StoredFile(path)
    try:
        opened = BinFile(file)
    except BaseException:
        file.close()
        raise
    stack.callback(opened.close)
    return opened


def _layout(
    directory: Path, stages: list[list[BinFile]], said: Mapping[str, Any], by_rows: bool
) -> tuple[str, dict[str, _Joined]]:
    """The family, and what each released tensor is made of."""
    everything = {_plain(name) for ranks in stages for name in ranks[0].infos}
    telling = {"internlm2": "layers.0.attention.wqkv.weight", "internlm": "blocks.0.mixer.Wqkv.weight"}
    family = next((family for family, name in telling.items() if name in everything), None)
    if family is None:
        some = ", ".join(shown(name) for name in sorted(everything)[:5])
        fail(directory, [f"neither InternLM's nor InternLM2's tensors are there, but {some}"], "Others are not read.")
    found: list[str] = []
    ranks = len(stages[0])
    if len(stages) > 1 and (said.get("num_chunks") or 1) != 1:
        found.append(f"'num_chunks' = {shown(said['num_chunks'])}: stages with layers in turn are not read")
    if family == "internlm" and by_rows and ranks > 1:
        found.append("InternLM 1 cut by weights (wp) is not read")
    joined: dict[str, _Joined] = {}
    before = 0
    for stage, files in enumerate(stages):
        names = {_plain(name): name for name in files[0].infos if not name.endswith(".inv_freq")}
        first, count = _first_layer(names, FAMILIES[family].layers, before)
        if first is None:
            found.append(f"stage {stage} does not have its layers in a row")
            first = 0
        before += count
        found += _unlike(stage, files)
        if found:
            continue
        for plain, name in names.items():
            pieces = tuple((file, name) for file in files if name in file.infos)
            for released, one in _released(family, plain, pieces, first, by_rows, said):
                problem = one.problem()
                if problem or released in joined:
                    found.append(problem or f"{shown(name)} stands in two stages")
                joined[released] = one
        if len(joined) > MAX_TENSORS:
            found.append(f"more than {MAX_TENSORS:,} tensors")
    if not found:
        found = _lacking(family, joined)
    if found:
        fail(directory, found, _REMEDY)
    return family, joined


def _lacking(family: str, joined: Mapping[str, _Joined]) -> list[str]:
    """What `values` needs."""
    names = FAMILIES[family]
    inner = "feed_forward.w1" if family == "internlm2" else "mlp.gate_proj"
    needed = (f"{names.outer[names.embedding[0]]}.weight", f"model.layers.0.{inner}.weight")
    return [f"no '{name}' in any file" for name in needed if name not in joined]


def _unlike(stage: int, files: list[BinFile]) -> list[str]:
    """What a rank has and another one lacks. The bias of a sum over all ranks may be with the first one alone."""
    first, found = set(files[0].infos), []
    for rank, file in enumerate(files):
        lacking = {name for name in first - set(file.infos) if not name.endswith(("wo.bias", "out_proj.bias"))}
        found += [f"rank {rank} of stage {stage} lacks {shown(name)}" for name in sorted(lacking)]
        found += [f"rank 0 of stage {stage} lacks {shown(name)}" for name in sorted(set(file.infos) - first)]
    return found


def _plain(name: str) -> str:
    return name.removeprefix("model.")


def _first_layer(names: Iterable[str], layers: str, before: int) -> tuple[int | None, int]:
    """The number of a stage's first layer in the whole model, and how many it has.

    A stage counts its own from 0. Where it goes on counting from the one before, that is seen too.
    """
    parts = (name.split(".") for name in names)
    own = sorted({int(part[1]) for part in parts if len(part) > 2 and part[0] == layers and _number(part[1])})
    if not own:
        return before, 0
    if own[-1] - own[0] + 1 != len(own) or own[0] not in (0, before):
        return None, len(own)
    return before - own[0], len(own)


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 6


def _released(
    family: str, plain: str, pieces: tuple[tuple[BinFile, str], ...], first: int, by_rows: bool, said: Mapping[str, Any]
) -> list[tuple[str, _Joined]]:
    """What a tensor in training is of the released model; unknown ones keep their names, to be named as unexpected."""
    names: Names = FAMILIES[family]
    stem, _, kind = plain.rpartition(".")
    info = pieces[0][0].infos[pieces[0][1]]
    vector = len(info.shape) == 1
    if stem in names.embedding:
        hidden = said.get("hidden_size")
        whole = info.shape[-1] == hidden if hidden else not said.get("embed_split_hidden", True)
        axis = None if vector else 0 if whole else 1
        return [(f"{names.outer[names.embedding[0]]}.{kind}", _Joined(pieces=pieces, axis=axis))]
    if stem in names.outer:
        return [(f"{names.outer[stem]}.{kind}", _Joined(pieces=pieces, axis=None if vector else 0))]
    layer, _, part = stem.removeprefix(f"{names.layers}.").partition(".")
    if not stem.startswith(f"{names.layers}.") or not _number(layer):
        return [(plain, _Joined(pieces=pieces, axis=None))]
    prefix = f"model.layers.{int(layer) + first}."
    if part == names.fused:
        letters = enumerate("qkv")
        return [(f"{prefix}self_attn.{x}_proj.{kind}", _Joined(pieces=pieces, axis=0, part=n)) for n, x in letters]
    if part not in names.inner:
        return [(prefix + part + "." + kind, _Joined(pieces=pieces, axis=None))]
    axis = 0
    if part in names.columns and not by_rows:
        axis = None if vector else 1  # rank 0 adds the bias, to the sum of all
    elif "norm" in part:
        axis = None
    return [(f"{prefix}{names.inner[part]}.{kind}", _Joined(pieces=pieces, axis=axis))]
