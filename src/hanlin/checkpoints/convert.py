"""Rewrite a model directory in another layout: InternLM2 as Llama and back, or any of their files as safetensors.

Tensors are split, joined and renamed, never recomputed, so that a way there and back gives the same bits. One is read
at a time, and no more than a shard is held. The result is read again and compared before it takes its place.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hanlin.checkpoints.base import TensorSource, fail
from hanlin.checkpoints.converted_config import converted_config, converted_tokenizer
from hanlin.checkpoints.description import describe_directory, read_json
from hanlin.checkpoints.load import check, place
from hanlin.checkpoints.names import Recipe, recipes
from hanlin.checkpoints.safetensors_writer import save_safetensors
from hanlin.checkpoints.source import open_source
from hanlin.errors import CheckpointError, ConfigError
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.config import DecoderConfig
from hanlin.models.registry import build, read_config

__all__ = ["FORMATS", "convert", "probe"]

Progress = Callable[[int, int], None]

FORMATS = ("hf", "llama", "internlm2")
_FAMILIES = ("internlm2", "llama")
_SHARD_BYTES = 1 << 30
_PROBE_LENGTH = 8
_HEAD_ROWS = 1 << 13
# Data beside the weights that the other layout needs as well. Code is left behind.
_KEPT = (
    *("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt"),
)
_TO_LLAMA = {
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_TO_INTERNLM2 = {new: old for old, new in _TO_LLAMA.items()}


def convert(
    source: Path, target: Path, *, to: str, vocab_size: int | None = None, progress: Progress | None = None
) -> Path:
    """Write the model directory `source` to the new directory `target`, whole or not at all.

    Args:
        to: "llama", "internlm2", or "hf" for the layout it has.
        vocab_size: keep so many rows of the embedding and the head; None keeps them all.
        progress: called with (bytes done, bytes in all), writing and comparing.

    Raises:
        ConfigError: a family or a configuration that the other layout can't say.
        CheckpointError: broken files, `target` exists, rows that do not fit the configuration, a full disk, or a
            result that is not what was meant; `target` is then not there.
    """
    if to not in FORMATS:
        raise ConfigError(f"can't convert to {to!r}; known: {', '.join(FORMATS)}")
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already. Name a new directory, or remove it first.")
    if not source.is_dir():
        raise CheckpointError(f"{source}: not a model directory. A GGUF file can't be converted yet.")
    description = describe_directory(source)
    family = description.values.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(f"{source}: can't convert {family!r}; known: {', '.join(_FAMILIES)}.")
    said = read_json(source / "config.json")
    if said.get("quantization_config") or (source / "quantize_config.json").is_file():
        raise ConfigError(f"{source}: its weights are quantised. Convert the original, and quantise the result.")
    with open_source(source) as stored:
        weights = _Weights.open(stored, description.values, vocab_size)
        values = converted_config(description.values, weights.config, family if to == "hf" else to, source)
        job = _Job(weights, read_config(values), progress or (lambda done, total: None))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
                whole = Path(staging) / "model"
                save_safetensors(whole, job.tensors(), max_shard_bytes=_SHARD_BYTES)
                _write_others(source, whole, values)
                job.compare(whole)
                whole.rename(target)
        except OSError as error:
            raise CheckpointError(f"{target}: could not be written: {error.strerror or error}.") from error
    return target


@dataclass(frozen=True)
class _Weights:
    """Parameters under the names of their model, out of stored tensors; embedding and head cut to the vocabulary."""

    source: TensorSource
    config: DecoderConfig
    model: nn.Module
    wanted: Mapping[str, Recipe]

    @classmethod
    def open(cls, source: TensorSource, values: Mapping[str, Any], vocab_size: int | None = None) -> _Weights:
        names = ("model.tok_embeddings.weight", "model.embed_tokens.weight", "output.weight", "lm_head.weight")
        rows = {
            name: source.infos[name].shape[0] for name in names if name in source.infos and source.infos[name].shape
        }
        said = values.get("vocab_size")
        wrong = [f"'{name}' has {count} rows" for name, count in rows.items() if count != said]
        if wrong and vocab_size is None:
            sizes = sorted({*rows.values(), *([said] if isinstance(said, int) else [])})
            remedy = f"Rows beyond the tokenizer's are often padding that training added: --vocab-size {sizes[0]} cuts."
            fail(source.path, [f"the configuration says vocab_size {said}", *wrong], remedy)
        if vocab_size is not None:
            short = [f"'{name}' has {count} rows, fewer than {vocab_size}" for name, count in rows.items()]
            short = [text for text, count in zip(short, rows.values(), strict=True) if count < vocab_size]
            if short or vocab_size < 1:
                fail(source.path, short or [f"vocab_size must be >= 1, not {vocab_size}"], "Rows can't be invented.")
        config = read_config({**values, **({"vocab_size": max(rows.values())} if rows else {})})
        if vocab_size is not None:
            config = replace(config, vocab_size=vocab_size)
        model = build(config, dtype=torch.float32)
        wanted = recipes(dict(model.named_parameters()), config, gguf=False, permuted=False)
        check(model, wanted, _Cut(source, dict.fromkeys(rows, vocab_size) if vocab_size else {}))
        return cls(source, config, model, wanted)

    def load(self, name: str) -> Tensor:
        """A parameter as it is stored: (rows, columns) or (rows,)."""
        recipe = self.wanted[name]
        value = recipe.join([self.source.load(part) for part in recipe.sources])
        return value[: self.model.get_parameter(name).shape[0]]


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


@dataclass(frozen=True)
class _Job:
    weights: _Weights
    result: DecoderConfig
    progress: Progress

    def _names(self) -> list[str]:
        return [name for name, _ in build(self.result, dtype=torch.float32).named_parameters()]

    def _steps(self) -> tuple[list[str], int]:
        # Written and compared: each byte is counted twice.
        return self._names(), 2 * sum(info.nbytes for info in self.weights.source.infos.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the result, one at a time."""
        names, total = self._steps()
        done = 0
        for name in names:
            value = self._value(name)
            done += value.nbytes
            yield name, value
            self.progress(done, total)

    def compare(self, directory: Path) -> None:
        """Read what was written: every tensor bit for bit, and the logits of a probe prompt.

        Raises:
            CheckpointError: what differs.
        """
        names, total = self._steps()
        done = total // 2
        with open_source(directory) as stored:
            written = _Weights.open(stored, read_json(directory / "config.json"))
            wrong = []
            for name in names:
                value, again = self._value(name), written.load(name)
                if value.dtype != again.dtype or not torch.equal(_bits(value), _bits(again)):
                    wrong.append(f"'{name}' does not read as it was written")
                done += value.nbytes
                self.progress(min(done, total), total)
            if wrong:
                fail(directory, wrong, "The disk or the memory of this machine is at fault. Nothing was kept.")
            before, after = probe(self.weights), probe(written)
        # The same sums in another order: the fused projection's product may be cut into other blocks.
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()), equal_nan=True):
            worst = float((before - after).abs().max())
            raise CheckpointError(f"{directory}: the logits of a probe prompt differ by {worst:.3g}. Nothing was kept.")
        self.progress(total, total)

    def _value(self, name: str) -> Tensor:
        load, there = self.weights.load, self.weights.config.model_type
        if there == self.result.model_type:
            return load(name)
        if there == "internlm2":
            return self._as_llama(name)
        stem, _, kind = name.rpartition(".")
        if not stem.endswith("attention.wqkv"):
            return load(_renamed(name, _TO_LLAMA))
        base = stem.removesuffix("attention.wqkv") + "self_attn."
        groups = self.result.num_kv_heads
        parts = [load(f"{base}{letter}_proj.{kind}") for letter in "qkv"]
        return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)

    def _as_llama(self, name: str) -> Tensor:
        stem, _, kind = name.rpartition(".")
        base, _, part = stem.rpartition("self_attn.")
        if part not in ("q_proj", "k_proj", "v_proj"):
            return self.weights.load(_renamed(name, _TO_INTERNLM2))
        config = self.result
        repeat = config.num_heads // config.num_kv_heads
        fused = self.weights.load(f"{base}attention.wqkv.{kind}")
        fused = fused.reshape(config.num_kv_heads, repeat + 2, config.head_dim, *fused.shape[1:])
        rows = {"q_proj": slice(0, repeat), "k_proj": slice(repeat, repeat + 1), "v_proj": slice(repeat + 1, None)}
        return fused[:, rows[part]].flatten(0, 2).contiguous()


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """The name in the source of a tensor of the result; `table` is from the parts of the one to those of the other."""
    stem, _, kind = name.rpartition(".")
    layer, part = "", stem
    if stem.startswith("model.layers."):
        number, _, part = stem.removeprefix("model.layers.").partition(".")
        layer = f"model.layers.{number}."
    return f"{layer}{table.get(part, part)}.{kind}"


def _bits(value: Tensor) -> Tensor:
    """Compared as bytes, so that NaN equals itself and 0 is not -0."""
    return value.contiguous().reshape(-1).view(torch.uint8)


@torch.inference_mode()
def probe(weights: _Weights) -> Tensor:
    """The logits (V,) float32 after a short prompt, with one layer in memory at a time."""
    model, body = weights.model, cast(Any, weights.model).model
    size = weights.config.vocab_size
    ids = torch.tensor([(7919 * i + 1) % size for i in range(_PROBE_LENGTH)])
    embedding = weights.load(_owner(model, cast(Any, model).parts().embedding))
    x = embedding[ids].float()
    del embedding
    rotation = body.rope(Positions(torch.arange(len(ids))[None]))
    attend = PackedAttend([len(ids)])
    for index, block in enumerate(body.layers):
        prefix = f"model.layers.{index}."
        for name, _ in list(block.named_parameters()):
            place(model, prefix + name, weights.load(prefix + name), torch.float32, torch.device("cpu"))
        x = block(index, x, rotation, attend)
        block.to("meta")
    place(model, "model.norm.weight", weights.load("model.norm.weight"), torch.float32, torch.device("cpu"))
    last = body.norm(x)[-1]
    body.norm.to("meta")
    parts = cast(Any, model).parts()
    head = weights.load(_owner(model, parts.embedding if weights.config.tied else parts.head))
    return torch.cat([rows.float() @ last for rows in torch.split(head, _HEAD_ROWS)])


def _owner(model: nn.Module, part: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is part)


def _write_others(source: Path, target: Path, values: Mapping[str, Any]) -> None:
    for name in _KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    tokenizer = read_json(source / "tokenizer_config.json", optional=True)
    sentencepiece = (source / "tokenizer.model").is_file()
    found = {"config.json": values, "tokenizer_config.json": converted_tokenizer(tokenizer, values, sentencepiece)}
    for name, content in found.items():
        if content:
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (target / name).write_text(text, encoding="utf-8")
