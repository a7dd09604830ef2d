"""LoRA adapters as PEFT saves them: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

An adapter is read whole and checked against the model before anything is made of it. What is no plain low-rank
addition (DoRA, trained biases, initialisations that change the base weights...) is refused with the reason.

Source: PEFT's documentation of the checkpoint format; rank-stabilised scaling from Kalajdzievski 2023
(arXiv 2312.03732).
"""

from __future__ import annotations

import fnmatch
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from hanlin.checkpoints.base import fail, shown
from hanlin.checkpoints.description import read_json
from hanlin.checkpoints.source import TensorSource, open_source
from hanlin.checkpoints.stored import StoredFile
from hanlin.errors import CheckpointError, ModelNotFoundError
from hanlin.layers.linear import Linear
from hanlin.layers.lora import LowRank

__all__ = ["Base", "PeftAdapter", "read_peft"]

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MOST_PATTERNS = 2048
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*)+\$?")  # names, dots and .*; nothing that could take long to match

# Keys that say how an adapter was made, not what it computes.
_HISTORY = frozenset(
    "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode target_modules exclude_modules "
    "lora_dropout layers_to_transform layers_pattern megatron_core megatron_config loftq_config eva_config "
    "corda_config qalora_group_size runtime_config peft_version ensure_weight_tying".split()
)
_READ = frozenset(
    "r lora_alpha use_rslora rank_pattern alpha_pattern modules_to_save init_lora_weights bias use_dora "
    "fan_in_fan_out".split()
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "false")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an adapter must fit.

    Attributes:
        linears: (out, in) of every linear layer, by its released name.
        tables: shapes of the embedding and the head, by the name of their weight.
        tied: these two are one weight.
    """

    linears: Mapping[str, tuple[int, int]]
    tables: Mapping[str, tuple[int, ...]]
    tied: bool

    @classmethod
    def of(cls, model: nn.Module) -> Base:
        """Of a loaded model, or of one on the meta device."""
        parts: Any = model.parts()  # type: ignore[operator]
        homes = {id(parts.embedding): parts.embedding.weight, id(parts.head): parts.head.weight}
        named = dict(model.named_modules())
        return cls(
            linears={n: (m.out_features, m.in_features) for n, m in named.items() if isinstance(m, Linear)},
            tables={f"{n}.weight": tuple(homes[id(m)].shape) for n, m in named.items() if id(m) in homes},
            tied=bool(parts.tied),
        )


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter that fits its base.

    Attributes:
        additions: by the name of a linear layer.
        tables: whole weights in place of the embedding's or the head's, by name (PEFT's `modules_to_save`).
        files: the files that were read, and the state they were in.
    """

    path: Path
    additions: Mapping[str, LowRank]
    tables: Mapping[str, Tensor]
    files: Mapping[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        """The largest."""
        return max((low.rank for low in self.additions.values()), default=0)


def read_peft(path: str | os.PathLike[str], base: Base) -> PeftAdapter:
    """Read the adapter in a directory and check it against the model that it is for.

    Raises:
        ModelNotFoundError: there is no such directory.
        UnsafeCheckpointError: a `.bin` that wants to call something.
        CheckpointError: files that are missing or broken, an adapter of a kind that cannot be honoured, or one that
            does not fit the model; everything wrong at once.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}: there is no such directory; an adapter is a directory with {CONFIG}")
    config = read_json(path / CONFIG)
    state = _state(path / CONFIG)
    found = list(_refused(config))
    scaling = _Scaling.read(config, found)
    present = [name for name in WEIGHTS if (path / name).exists()]
    if not present:
        fail(path, [*found, f"neither {' nor '.join(WEIGHTS)} beside {CONFIG}"], "Fetch the adapter again.")
    with open_source(path / present[0]) as source:
        halves, tables = _sorted(source, base, found)
        additions = {} if scaling is None else _paired(source, halves, base, scaling, found)
        if not halves and not tables and not found:
            found.append(f"{present[0]} holds no lora_A and lora_B")
        if found:
            fail(path, found, _remedy(config, halves, base))
        return PeftAdapter(
            path=path,
            additions=MappingProxyType(additions),
            tables=MappingProxyType({name: source.load(stored) for name, stored in tables.items()}),
            files=MappingProxyType(source.state() | state),
        )


def _state(path: Path) -> dict[str, tuple[int, ...]]:
    file = StoredFile(path)
    try:
        return file.state()
    finally:
        file.close()


def _remedy(config: Mapping[str, Any], halves: Mapping[str, object], base: Base) -> str:
    if any(name not in base.linears for name in halves):
        made_for = config.get("base_model_name_or_path")
        told = f" It was made for {shown(made_for)}." if isinstance(made_for, str) and made_for else ""
        return f"The adapter belongs to another model.{told} This one has linear layers such as {_examples(base)}."
    return ""


def _examples(base: Base) -> str:
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in base.linears)
    return ", ".join(leaves)


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    """What of a configuration asks for other mathematics than low-rank additions."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        yield f"peft_type {shown(kind)} cannot be read, only 'LORA'"
        return
    if config.get("bias", "none") != "none":
        yield f"bias = {shown(config['bias'])}: trained biases cannot be honoured, only bias = 'none'"
    if config.get("use_dora"):
        yield (
            "use_dora: DoRA rescales every row of the weights by a trained length, which is no low-rank addition; "
            "merge it with PEFT (merge_and_unload) and load the merged model"
        )
    if config.get("fan_in_fan_out"):
        yield "fan_in_fan_out is for transposed weights, which this model does not have"
    start = config.get("init_lora_weights", True)
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
        yield (
            f"init_lora_weights = {shown(start)} changes the base weights too; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain adapter of it"
        )
    for key, value in config.items():
        if key not in _HISTORY and key not in _READ and value not in (None, False, [], {}, ""):
            yield f"{shown(key)} = {shown(value)} is not supported"


@dataclass(frozen=True, kw_only=True)
class _Scaling:
    """rank and alpha of each layer, as PEFT's patterns say."""

    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    stabilised: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], found: list[str]) -> _Scaling | None:
        before = len(found)
        rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        if type(rank) is not int or rank < 1:
            found.append(f"r must be a whole number >= 1, not {shown(rank)}")
        if not _finite(alpha):
            found.append(f"lora_alpha must be a number, not {shown(alpha)}")
        patterns = []
        for key, good in (("rank_pattern", lambda v: type(v) is int and v >= 1), ("alpha_pattern", _finite)):
            pattern = config.get(key) or {}
            if not isinstance(pattern, dict) or len(pattern) > _MOST_PATTERNS:
                found.append(f"{key} must map at most {_MOST_PATTERNS:,} names to numbers, not {shown(pattern)}")
                pattern = {}
            found += [f"{key}: {shown(v)} for {shown(k)} is no such number" for k, v in pattern.items() if not good(v)]
            found += [
                f"{key}: {shown(k)} cannot be matched; patterns may hold names, dots and .* only"
                for k in pattern
                if len(k) > 256 or not _PATTERN.fullmatch(k)
            ]
            patterns.append(pattern)
        if len(found) > before:
            return None
        ranks, alphas = patterns
        stabilised = bool(config.get("use_rslora"))
        return cls(rank=rank, alpha=float(alpha), ranks=ranks, alphas=alphas, stabilised=stabilised)

    def of(self, name: str) -> tuple[int, float]:
        """Rank and scale of a layer."""
        rank = int(_matched(self.ranks, name, self.rank))
        alpha = float(_matched(self.alphas, name, self.alpha))
        return rank, alpha / (math.sqrt(rank) if self.stabilised else rank)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _matched(patterns: Mapping[str, Any], name: str, default: float) -> float:
    """The first pattern that matches the whole name or an end of it, from a dot on."""
    for pattern, value in patterns.items():
        if _regex(pattern).fullmatch(name):
            return float(value)
    return default


@functools.lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    """PEFT's patterns are regular expressions; of those, names, dots and .* are left here, which fnmatch can do."""
    bare = pattern.removeprefix("^").removesuffix("$").replace("\\.", "\0").replace(".*", "*").replace(".", "?")
    whole = fnmatch.translate(bare.replace("\0", "."))
    return re.compile(whole if pattern.startswith("^") else rf"(?:.*\.)?(?:{whole})")


def _sorted(source: TensorSource, base: Base, found: list[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(for each linear layer the stored names of its A and B; for each whole table its stored name)."""
    halves: dict[str, dict[str, str]] = {}
    tables: dict[str, str] = {}
    for stored in source.infos:
        name = stored.removeprefix("base_model.model.")
        stem, mark, tail = name.rpartition(".lora_")
        side, *rest = tail.split(".")
        if mark and side in ("A", "B") and rest[-1:] == ["weight"] and len(rest) <= 2:
            pair = halves.setdefault(stem, {})
            if side in pair:
                found.append(f"{shown(stem)} has several lora_{side}: {shown(pair[side])} and {shown(stored)}")
            pair[side] = stored
        elif mark and side.startswith("embedding"):
            found.append(f"{shown(stored)}: low-rank additions to the embedding cannot be honoured")
        elif mark:
            found.append(f"{shown(stored)} is no part of a plain LoRA adapter")
        else:
            frozen = name.endswith(".base_layer.weight")  # PEFT's copy of what the additions stand beside
            whole = re.sub(r"\.(modules_to_save(\.[^.]+)?|base_layer)(?=\.weight$)", "", name)
            info = source.infos[stored]
            problem = _table_problem(whole, info.shape, info.dtype, base, frozen=frozen)
            if problem:
                found.append(f"{shown(stored)}: {problem}")
            elif not frozen:
                tables[whole] = stored
    return halves, tables


def _table_problem(name: str, shape: tuple[int, ...], dtype: str, base: Base, *, frozen: bool) -> str:
    if name not in base.tables:
        return "of whole weights (modules_to_save) only the embedding and the head can be honoured"
    if base.tied and not frozen:
        return "replaces the embedding or the head, which are one weight in this model; merge it with PEFT"
    if shape != base.tables[name]:
        return f"has shape {shape}, the model needs {base.tables[name]}"
    return "" if dtype in _FLOATS else f"is {dtype}, not floats"


def _paired(
    source: TensorSource, halves: Mapping[str, Mapping[str, str]], base: Base, scaling: _Scaling, found: list[str]
) -> dict[str, LowRank]:
    """The additions; what does not fit is added to `found`."""
    out = {}
    for name, pair in halves.items():
        if name not in base.linears:
            found.append(f"{shown(name)} is no linear layer of this model")
            continue
        if len(pair) < 2:
            found.append(f"{shown(name)} has lora_{next(iter(pair))} without the other half")
            continue
        rank, scale = scaling.of(name)
        rows, columns = base.linears[name]
        wrong = []
        for side, want in (("A", (rank, columns)), ("B", (rows, rank))):
            info = source.infos[pair[side]]
            if info.dtype not in _FLOATS:
                wrong.append(f"lora_{side} of {shown(name)} is {info.dtype}, not floats")
            elif info.shape != want:
                wrong.append(f"lora_{side} of {shown(name)} has shape {info.shape}, rank and model need {want}")
        if not wrong:
            down, up = source.load(pair["A"]), source.load(pair["B"])
            wrong = [
                f"lora_{side} of {shown(name)} holds values that are not finite"
                for side, half in (("A", down), ("B", up))
                if not half.isfinite().all()
            ]
            out[name] = LowRank(down=down, up=up, scale=scale)
        found += wrong
    return out


def check_live(adapter: PeftAdapter) -> None:
    """Raises:
    CheckpointError: the adapter replaces whole weights, which cannot differ between requests.
    """
    if adapter.tables:
        raise CheckpointError(
            f"{adapter.path}: replaces {', '.join(adapter.tables)} as a whole, which cannot differ between requests. "
            "Merge it while loading: adapter=DIR."
        )
