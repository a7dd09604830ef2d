"""Converting to InternEvo's training checkpoints: a file for each rank of the tensor cut and each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanlin.checkpoints.base import DTYPES, TensorInfo, TensorSource
from hanlin.checkpoints.bin_writer import BinWriter, Planned, save_values
from hanlin.checkpoints.convert_directory import DirectoryTarget
from hanlin.checkpoints.internevo_names import CONFIGURATION, FAMILIES, to_pairs
from hanlin.errors import ConfigError, problems

__all__ = ["InternEvoTarget"]

Progress = Callable[[int, int], None]
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Trained:
    """A tensor of the whole model in training.

    Attributes:
        name: there.
        parts: the released tensors that it is made of.
        axis: along which ranks share it (each of its parts); None: each has all.
    """

    name: str
    parts: tuple[str, ...]
    axis: int | None


@dataclass
class InternEvoTarget(DirectoryTarget):
    """Beside it a `config.json`, for what InternEvo's own arguments don't say, the tokenizer and the template.

    Attributes:
        tp: ranks that share each layer.
        pp: stages that the layers are dealt out to, the last ones one more where it does not come out even.
        adapt_hf: leave the rotary pairs of InternLM2's q and k as released; else side by side.

    Raises:
        ConfigError: a model that so many ranks and stages can't share; all reasons at once.
    """

    tp: int = 1
    pp: int = 1
    adapt_hf: bool = True

    def __post_init__(self) -> None:
        config = self.result
        found = [] if config.model_type in FAMILIES else [f"InternEvo has no models of kind {config.model_type}"]
        counts = {
            "attention heads": config.num_heads,
            "key-value heads": config.num_kv_heads,
            "columns (hidden size)": config.hidden_size,
            "rows of the MLP (intermediate size)": config.intermediate_size,
            "rows of the head (vocabulary)": config.vocab_size,
        }
        found += [f"--tp {self.tp} does not divide {n} {what}" for what, n in counts.items() if n % self.tp]
        if self.pp > config.num_layers:
            found.append(f"--pp {self.pp} is more than {config.num_layers} layers")
        if found:
            raise ConfigError(problems(str(self.weights.source.path), found))

    def write_weights(self, path: Path, progress: Progress) -> None:
        path.mkdir(exist_ok=True)
        total = 2 * sum(info.nbytes for info in self.weights.source.infos.values())
        outlines = replace(self, weights=replace(self.weights, source=_Outlines(self.weights.source)))
        done = 0
        for stage in range(self.pp):
            names = list(self._stage(stage))
            shapes = [[outlines._share(name, rank) for name in names] for rank in range(self.tp)]
            writers = [
                BinWriter(
                    path / f"model_tp{rank}_pp{stage}.pt", [_planned(n, t) for n, t in zip(names, mine, strict=True)]
                )
                for rank, mine in enumerate(shapes)
            ]
            try:
                for number, name in enumerate(names):
                    if any(writer.ready <= number for writer in writers):
                        values = self._values(name)
                        for rank, writer in enumerate(writers):
                            if writer.ready <= number:
                                writer.write(self._cut(name, values, rank))
                    done += sum(mine[number].nbytes for mine in shapes)
                    progress(min(done, total // 2), total)
            finally:
                for writer in writers:
                    writer.close()
        (path / CONFIGURATION).unlink(missing_ok=True)
        save_values(path / CONFIGURATION, self._arguments(shapes[0][0].dtype))

    def _stage(self, stage: int) -> Iterator[_Trained]:
        """Its tensors, layers numbered from 0."""
        config = self.result
        names = FAMILIES[config.model_type]
        embedding, norm, head = names.outer.items()
        if stage == 0:
            yield _Trained(f"{embedding[0]}.weight", (f"{embedding[1]}.weight",), 1)
        each, more = divmod(config.num_layers, self.pp)
        even = self.pp - more
        start = each * stage + max(0, stage - even)
        for own in range(each + (stage >= even)):
            for part, released in self._parts():
                end = part.rpartition(".")[2]
                stem = part.removesuffix(f".{end}")
                axis: int | None = 0
                if stem in names.columns:
                    axis = 1 if end == "weight" else None
                elif "norm" in stem:
                    axis = None
                parts = tuple(f"model.layers.{start + own}.{one}.{end}" for one in released)
                yield _Trained(f"{names.layers}.{own}.{part}", parts, axis)
        if stage == self.pp - 1:
            yield _Trained(f"{norm[0]}.weight", (f"{norm[1]}.weight",), None)
            yield _Trained(f"{head[0]}.weight", (f"{(embedding if config.tied else head)[1]}.weight",), 0)

    def _parts(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The tensors of a layer in training, and the released modules that each is made of."""
        config = self.result
        names = FAMILIES[config.model_type]
        inner: dict[str, tuple[str, ...]] = {part: (released,) for part, released in names.inner.items()}
        if names.fused:
            inner[names.fused] = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
        biased = {names.fused or "attention.wqkv": config.qkv_bias, "mixer.out_proj": config.out_bias}
        biased["attention.wo"] = config.out_bias
        for part, released in inner.items():
            yield f"{part}.weight", released
            if biased.get(part):
                yield f"{part}.bias", released

    def _values(self, trained: _Trained) -> list[Tensor]:
        values = [self._value(part) for part in trained.parts]
        if not self.adapt_hf and ".attention.wqkv." in trained.name:
            return [to_pairs(value, self.result.num_heads, self.result.num_kv_heads) for value in values]
        return values

    def _cut(self, trained: _Trained, values: list[Tensor], rank: int) -> Tensor:
        if trained.axis is not None:
            values = [value.chunk(self.tp, trained.axis)[rank] for value in values]
        return torch.cat(values) if len(values) > 1 else values[0]

    def _share(self, trained: _Trained, rank: int) -> Tensor:
        return self._cut(trained, self._values(trained), rank)

    def _arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        config = self.result
        old = config.model_type == "internlm"
        return {
            "num_attention_heads": config.num_heads,
            "embed_split_hidden": True,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "norm_type": "rmsnorm",
            "layer_norm_epsilon": config.norm_eps,
            "no_bias": not config.qkv_bias,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
            **({} if old else {"num_kv_attention_heads": config.num_kv_heads}),
            "dtype": dtype,
            "norm_head": False,
            **({} if old else {"adapt_hf": self.adapt_hf}),
            "use_flash_attn": True,
            "rope_base": config.rope.base,
            "num_chunks": 1,
        }


def _planned(trained: _Trained, outline: Tensor) -> Planned:
    return Planned(trained.name, _DTYPE_NAMES[outline.dtype], tuple(outline.shape))


class _Outlines:
    """A source whose tensors have shapes and types, and no values."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def load(self, name: str) -> Tensor:
        info: TensorInfo = self._source.infos[name]
        return torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.float32), device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
