"""Converting to a model directory: the layouts of `hf`, `llama` and `internlm2`, as safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanlin.checkpoints.base import fail
from hanlin.checkpoints.converted_config import converted_tokenizer
from hanlin.checkpoints.description import read_json
from hanlin.checkpoints.safetensors_writer import save_resumably
from hanlin.checkpoints.source import open_source
from hanlin.checkpoints.weights import Weights, as_bytes, probe
from hanlin.errors import CheckpointError
from hanlin.models.config import DecoderConfig
from hanlin.models.registry import build, read_config

__all__ = ["DirectoryTarget"]

Progress = Callable[[int, int], None]

_SHARD_BYTES = 1 << 30
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


@dataclass
class DirectoryTarget:
    """A model directory of the family that `values`, the keys of its `config.json`, name.

    Attributes:
        weights: what is converted.
        beside: the directory whose tokenizer, template and licence go along, if there is one.
        files: further files by name.
    """

    weights: Weights
    values: Mapping[str, Any]
    beside: Path | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def result(self) -> DecoderConfig:
        return read_config(self.values)

    def write(self, path: Path, progress: Progress) -> None:
        """Write the directory `path`; what an interrupted call left there and beside it is used again."""
        self.write_weights(path, progress)
        tokenizer: Mapping[str, Any] = {}
        if self.beside is not None:
            for name in _KEPT:
                if (self.beside / name).is_file():
                    shutil.copyfile(self.beside / name, path / name)
            tokenizer = read_json(self.beside / "tokenizer_config.json", optional=True)
            sentencepiece = (self.beside / "tokenizer.model").is_file()
            tokenizer = converted_tokenizer(tokenizer, self.values, sentencepiece)
        for name, content in {"config.json": self.values, "tokenizer_config.json": tokenizer}.items():
            if content:
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (path / name).write_text(text, encoding="utf-8")
        for name, data in self.files.items():
            (path / name).write_bytes(data)

    def write_weights(self, path: Path, progress: Progress) -> None:
        """The part of `write` that takes long."""
        names, total = self._steps()
        done = 0

        def written(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(min(done, total), total)

        parts = path.with_name("shards")
        save_resumably(path, names, self._value, parts=parts, max_shard_bytes=_SHARD_BYTES, written=written)

    def compare(self, path: Path, progress: Progress) -> None:
        """Read what was written: every tensor bit for bit, and the logits of a probe prompt.

        Raises:
            CheckpointError: what differs.
        """
        names, total = self._steps()
        done = total // 2
        with open_source(path) as stored:
            written = Weights.open(stored, read_json(path / "config.json"))
            wrong = []
            for name in names:
                value, again = self._value(name), written.load(name)
                if value.dtype != again.dtype or not torch.equal(as_bytes(value), as_bytes(again)):
                    wrong.append(f"'{name}' does not read as it was written")
                done += value.nbytes
                progress(min(done, total), total)
                del value, again
            if wrong:
                fail(path, wrong, "The disk or the memory of this machine is at fault. Nothing was kept.")
            before, after = probe(self.weights), probe(written)
        # The same sums in another order: the fused projection's product may be cut into other blocks.
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()), equal_nan=True):
            worst = float((before - after).abs().max())
            raise CheckpointError(f"{path}: the logits of a probe prompt differ by {worst:.3g}. Nothing was kept.")
        progress(total, total)

    def _steps(self) -> tuple[list[str], int]:
        # Written and compared: each byte is counted twice.
        names = [name for name, _ in build(self.result, dtype=torch.float32).named_parameters()]
        return names, 2 * sum(info.nbytes for info in self.weights.source.infos.values())

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
