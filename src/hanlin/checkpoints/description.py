"""What a model directory or a GGUF file says about itself, read as data: configuration, template, defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanlin.checkpoints.internevo import InternEvoSource
from hanlin.checkpoints.internevo_names import CONFIGURATION
from hanlin.checkpoints.quantisation import Quantisation, read_quantisation
from hanlin.checkpoints.source import TensorSource
from hanlin.errors import CheckpointError, ConfigError
from hanlin.models.registry import FAMILIES

__all__ = ["Description", "describe_directory", "describe_gguf", "read_json"]

_MAX_JSON = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Description:
    """
    Attributes:
        values: the keys of a released `config.json`.
        permuted: the q and k rows are in GGUF's order of rotary pairs and have to be put back.
        template: the model's own Jinja chat template, if any.
        generation: the keys of `generation_config.json`.
        name: what the model calls itself.
        quantisation: how its matrices are stored, if not as they are.
    """

    values: Mapping[str, Any]
    permuted: bool = False
    template: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    quantisation: Quantisation | None = None


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file of at most 16 MiB.

    Raises:
        CheckpointError: no such file (unless optional), too large, a Git LFS pointer, or not a JSON object.
    """
    if optional and not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for a configuration file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model directory needs it beside the weights") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{path}: this is a Git LFS pointer, not the file itself. Run: git lfs pull")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def describe_directory(path: Path) -> Description:
    """Read `config.json`, `generation_config.json` and the chat template of a model directory; no code, ever.

    Where InternEvo's arguments stand instead of a `config.json`, they and the shapes of the weights say the same.
    """
    if not (path / "config.json").is_file() and (path / CONFIGURATION).is_file():
        with InternEvoSource(path) as training:
            values = training.values()
    else:
        values = read_json(path / "config.json")
    said = [values.pop(key, None) for key in ("quantization_config", "compression_config")]
    said.append(read_json(path / "quantize_config.json", optional=True))  # of old GPTQ files
    quantised = next((value for value in said if value), None)
    tokenizer = read_json(path / "tokenizer_config.json", optional=True)
    template = tokenizer.get("chat_template")
    if isinstance(template, list):  # several named ones; the one called default is the one for plain chat
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    alone = path / "chat_template.jinja"
    if not isinstance(template, str) and alone.is_file() and alone.stat().st_size <= _MAX_JSON:
        template = alone.read_text(encoding="utf-8", errors="replace")
    return Description(
        values=values,
        template=template if isinstance(template, str) else None,
        generation=read_json(path / "generation_config.json", optional=True),
        name=path.resolve().name,
        quantisation=None if quantised is None else read_quantisation(quantised, path / "config.json"),
    )


def describe_gguf(source: TensorSource) -> Description:
    """Translate GGUF key-values into the keys of a `config.json`.

    Raises:
        ConfigError: an architecture that is not here, or keys that are missing.
    """
    meta = source.metadata
    arch = meta.get("general.architecture")
    family = next((name for name, row in FAMILIES.items() if arch in row.gguf), None)
    if family is None:
        known = ", ".join(sorted(a for row in FAMILIES.values() for a in row.gguf))
        raise ConfigError(f"{source.path}: GGUF architecture {arch!r} is not supported. Supported: {known}.")

    def value(key: str) -> Any:
        return meta.get(f"{arch}.{key}")

    tokens = meta.get("tokenizer.ggml.tokens") or ()
    heads, hidden = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length") or (hidden // heads if isinstance(hidden, int) and heads else None)
    values: dict[str, Any] = {
        "model_type": family,
        "vocab_size": value("vocab_size") or len(tokens),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base") or 10000.0,
        "rope_scaling": _rope_scaling(arch, meta, source),
        "tie_word_embeddings": "output.weight" not in source.infos,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }
    if family == "internlm2":
        values["bias"] = "blk.0.attn_q.bias" in source.infos
    if family == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in source.infos
    rows = source.infos.get("token_embd.weight")
    if rows is not None and len(rows.shape) == 2:  # padded vocabularies keep their extra rows
        values["vocab_size"] = rows.shape[0]
    template = meta.get("tokenizer.chat_template")
    return Description(
        values=values,
        permuted=family in ("llama", "internlm2"),
        template=template if isinstance(template, str) else None,
        name=str(meta.get("general.name") or source.path.stem),
    )


def _rope_scaling(arch: object, meta: Mapping[str, Any], source: TensorSource) -> dict[str, Any] | None:
    if "rope_freqs.weight" in source.infos:
        raise ConfigError(
            f"{source.path}: stores per-dimension RoPE factors (rope_freqs.weight), which only the original checkpoint "
            "of this model explains; load the safetensors instead"
        )
    kind = meta.get(f"{arch}.rope.scaling.type")
    if kind in (None, "none"):
        return None
    trained = meta.get(f"{arch}.rope.scaling.original_context_length")
    scaling = {"rope_type": kind, "factor": meta.get(f"{arch}.rope.scaling.factor")}
    if kind == "yarn" and trained:
        scaling["original_max_position_embeddings"] = trained
    return scaling
