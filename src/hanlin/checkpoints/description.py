"""What a model directory or a GGUF file says about itself, read as data: configuration, template, defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hanlin.checkpoints.internevo import InternEvoSource
from hanlin.checkpoints.internevo_names import CONFIGURATION
from hanlin.checkpoints.quantisation import Quantisation, read_quantisation
from hanlin.checkpoints.source import TensorSource
from hanlin.errors import CheckpointError, ConfigError, problems
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
    template = meta.get("tokenizer.chat_template")
    name = str(meta.get("general.name") or source.path.stem)
    if family == "chatglm2":
        glm = _chatglm2(str(arch), meta, source)
        return Description(values=glm, template=template if isinstance(template, str) else None, name=name)
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
        "rms_norm_eps": _tidy(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _tidy(value("rope.freq_base")) or 10000.0,
        "rope_scaling": _rope_scaling(arch, meta, source),
        "tie_word_embeddings": "output.weight" not in source.infos,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }
    if family == "internlm2":
        values["bias"] = "blk.0.attn_q.bias" in source.infos
    if family == "llama":
        biases = {part: f"blk.0.{part}.bias" in source.infos for part in ("attn_q", "attn_output", "ffn_gate")}
        values |= {"attention_bias": biases["attn_q"], "mlp_bias": biases["ffn_gate"]}
        if biases["attn_q"] and not biases["attn_output"]:  # as a Llama of InternLM3's kind may have them
            values |= {"model_type": "internlm3", "qkv_bias": True, "bias": False}
            values = {key: value for key, value in values.items() if key not in ("attention_bias", "mlp_bias")}
    rows = source.infos.get("token_embd.weight")
    if rows is not None and len(rows.shape) == 2:  # padded vocabularies keep their extra rows
        values["vocab_size"] = rows.shape[0]
    return Description(
        values=values,
        permuted=family in ("llama", "internlm2"),
        template=template if isinstance(template, str) else None,
        name=name,
    )


def _tidy(number: Any) -> Any:
    """A float32 as the shortest number that becomes it: 1e-05 for 9.999999747378752e-06."""
    if not isinstance(number, float):
        return number
    with np.errstate(over="ignore"):  # a float64 too large for one becomes infinite, and is refused as such
        return float(str(np.float32(number)))


def _chatglm2(arch: str, meta: Mapping[str, Any], source: TensorSource) -> dict[str, Any]:
    """The keys of the `config.json` that ChatGLM2 and all later ones were released with."""
    heads, hidden = meta.get(f"{arch}.attention.head_count"), meta.get(f"{arch}.embedding_length")
    rows = source.infos.get("token_embd.weight")
    size = meta.get(f"{arch}.attention.key_length")
    size = size or (hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None)
    size = size if isinstance(size, int) else None
    dims = meta.get(f"{arch}.rope.dimension_count")
    found = [] if dims is None or size is None or dims == size // 2 else [f"{dims} of {size} dimensions rotate"]
    base = _tidy(meta.get(f"{arch}.rope.freq_base")) or 10000.0
    ratio = base / 10000.0 if isinstance(base, float) and math.isfinite(base) else 1.0
    kind, factor = (meta.get(f"{arch}.rope.scaling.{key}") for key in ("type", "factor"))
    if kind == "linear" and factor == 16 and ratio == 1:
        ratio = 16  # ChatGLM2-6B-32k, the one that divides positions
    elif kind not in (None, "none"):
        found.append(f"RoPE is scaled by {kind!r}, by {factor}")
    if "output.weight" not in source.infos:
        found.append("the head is the embedding")
    if found:
        raise ConfigError(problems(str(source.path), found, "No ChatGLM2, ChatGLM3 or GLM-4 is like that."))
    return {
        "model_type": "chatglm",
        "multi_query_attention": True,
        "padded_vocab_size": rows.shape[0] if rows is not None and rows.shape else 0,
        "hidden_size": hidden,
        "ffn_hidden_size": meta.get(f"{arch}.feed_forward_length"),
        "num_layers": meta.get(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "multi_query_group_num": meta.get(f"{arch}.attention.head_count_kv") or heads,
        "kv_channels": size,
        "seq_length": meta.get(f"{arch}.context_length"),
        "layernorm_epsilon": _tidy(meta.get(f"{arch}.attention.layer_norm_rms_epsilon")),
        "add_qkv_bias": any(f"blk.0.attn_{part}.bias" in source.infos for part in ("qkv", "q")),
        "rope_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }


def _rope_scaling(arch: object, meta: Mapping[str, Any], source: TensorSource) -> dict[str, Any] | None:
    ours = meta.get("hanlin.rope.scaling.type")
    if isinstance(ours, str):  # what GGUF has no words for
        prefix = "hanlin.rope.scaling."
        numbers = {key.removeprefix(prefix): _tidy(value) for key, value in meta.items() if key.startswith(prefix)}
        return {"rope_type" if key == "type" else key: value for key, value in numbers.items()}
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
