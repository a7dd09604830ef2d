"""A stored model's parameters, one at a time, for whoever writes them in another form; and a probe of its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hanlin.checkpoints.base import TensorSource, fail
from hanlin.checkpoints.load import check, place
from hanlin.checkpoints.names import Recipe, recipes
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions, Rope
from hanlin.models.config import DecoderConfig
from hanlin.models.parts import HasParts
from hanlin.models.registry import build, read_config

__all__ = ["Weights", "as_bytes", "probe"]

_PROBE_LENGTH = 8
_HEAD_ROWS = 1 << 13
# The keys of a configuration that say how many rows the embedding has; the first one that is there counts.
_ROWS = ("padded_vocab_size", "vocab_size")


@dataclass(frozen=True)
class Weights:
    """Parameters under the names of their model, out of stored tensors; embedding and head cut to the vocabulary.

    Attributes:
        config: of the model, with the vocabulary that it is cut to.
        model: on the meta device.
        wanted: of what each parameter is made.
    """

    source: TensorSource
    config: DecoderConfig
    model: nn.Module
    wanted: Mapping[str, Recipe]

    @classmethod
    def open(
        cls,
        source: TensorSource,
        values: Mapping[str, Any],
        vocab_size: int | None = None,
        *,
        gguf: bool = False,
        permuted: bool = False,
    ) -> Weights:
        """The parameters of the model that the `config.json` keys `values` describe.

        Args:
            vocab_size: keep so many rows of the embedding and the head; None keeps them all.
            gguf, permuted: as `recipes` takes them.

        Raises:
            ConfigError: a configuration that would need other mathematics.
            CheckpointError: tensors that are missing, misshapen, unexpected, or have other rows than configured.
        """
        key = next((key for key in _ROWS if key in values), "vocab_size")
        config = read_config(values)
        rows = _rows(source, config, gguf=gguf, permuted=permuted)
        wrong = [f"'{name}' has {count} rows" for name, count in rows.items() if count != values.get(key)]
        if wrong and vocab_size is None:
            sizes = sorted({*rows.values(), config.vocab_size})
            remedy = f"Rows beyond the tokenizer's are often padding that training added: --vocab-size {sizes[0]} cuts."
            fail(source.path, [f"the configuration says {key} {values.get(key)}", *wrong], remedy)
        if vocab_size is not None:
            short = [f"'{name}' has {count} rows, fewer than {vocab_size}" for name, count in rows.items()]
            short = [text for text, count in zip(short, rows.values(), strict=True) if count < vocab_size]
            if short or vocab_size < 1:
                fail(source.path, short or [f"vocab_size must be >= 1, not {vocab_size}"], "Rows can't be invented.")
            config = replace(config, vocab_size=vocab_size)
        model = build(config, dtype=torch.float32)
        stored = source.infos
        wanted = recipes(dict(model.named_parameters()), config, gguf=gguf, permuted=permuted, stored=stored)
        check(model, wanted, _Cut(source, dict.fromkeys(rows, vocab_size) if vocab_size else {}))
        return cls(source, config, model, wanted)

    def load(self, name: str) -> Tensor:
        """A parameter as it is stored: (rows, columns) or (rows,)."""
        recipe = self.wanted[name]
        value = recipe.join([self.source.load(part) for part in recipe.sources])
        return value[: self.model.get_parameter(name).shape[0]]

    def rounded(self, name: str, rows: Tensor) -> Tensor:
        """Some whole rows of the embedding or the head, with the values that a target can hold: here all."""
        return rows

    def ends(self) -> tuple[str, str]:
        """The names of the embedding and the head; the same twice where they are one."""
        return _ends(self.model)


def _ends(model: nn.Module) -> tuple[str, str]:
    parts = cast(HasParts, model).parts()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    embedding = names[id(parts.embedding)]
    return embedding, embedding if parts.tied else names[id(parts.head)]


def _rows(source: TensorSource, config: DecoderConfig, *, gguf: bool, permuted: bool) -> dict[str, int]:
    """The stored rows of the embedding and the head."""
    names = set(_ends(build(config, dtype=torch.float32)))
    wanted = recipes(dict.fromkeys(names), config, gguf=gguf, permuted=permuted, stored=source.infos)
    stored = [part for recipe in wanted.values() for part in recipe.sources]
    return {name: source.infos[name].shape[0] for name in stored if name in source.infos and source.infos[name].shape}


class _Cut:
    """A source, described as if some tensors had fewer rows."""

    def __init__(self, source: TensorSource, rows: Mapping[str, int]) -> None:
        self._source = source
        self.infos = {
            name: replace(info, shape=(rows[name], *info.shape[1:])) if name in rows else info
            for name, info in source.infos.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def as_bytes(value: Tensor) -> Tensor:
    """Its bytes (n,) uint8, for comparing: NaN equals itself then, and 0 is not -0."""
    return value.contiguous().reshape(-1).view(torch.uint8)


@torch.inference_mode()
def probe(weights: Weights) -> Tensor:
    """The logits (V,) float32 after a short prompt, with one layer in memory at a time."""
    model = weights.model
    parts = cast(HasParts, model).parts()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(parts.blocks))
    names = {id(module): name for name, module in model.named_modules()}
    ids = torch.tensor([(7919 * i + 1) % weights.config.vocab_size for i in range(_PROBE_LENGTH)])
    first, last = weights.ends()
    x = weights.rounded(first, weights.load(first)[ids]).float()
    rotation = Rope(weights.config.rope)(Positions(torch.arange(len(ids))[None]))
    attend = PackedAttend([len(ids)])
    for index, block in enumerate(layers):
        with _filled(weights, block, names[id(block)]):
            x = block(index, x, rotation, attend)
    with _filled(weights, parts.norm, names[id(parts.norm)]):
        row = parts.norm(x)[-1]
    head = weights.load(last)
    logits = torch.cat([weights.rounded(last, rows).float() @ row for rows in torch.split(head, _HEAD_ROWS)])
    bias = last.removesuffix("weight") + "bias"
    return logits + weights.load(bias).float() if bias in weights.wanted else logits


class _filled:  # noqa: N801 - used as a context manager
    """A part of the meta model with its parameters in memory, for as long as it is needed."""

    def __init__(self, weights: Weights, module: nn.Module, prefix: str) -> None:
        self._weights, self._module, self._prefix = weights, module, prefix

    def __enter__(self) -> None:
        for name, _ in list(self._module.named_parameters()):
            whole = f"{self._prefix}.{name}"
            place(self._weights.model, whole, self._weights.load(whole), torch.float32, torch.device("cpu"))

    def __exit__(self, *_: object) -> None:
        self._module.to("meta")
