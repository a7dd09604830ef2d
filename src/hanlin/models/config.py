"""Reading a released `config.json`: every key is either used, known to be neutral, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hanlin.errors import ConfigError, problems
from hanlin.layers.rope import RopeConfig

__all__ = ["DecoderConfig", "Reader"]

# Keys that change no number of a forward pass: bookkeeping, generation defaults, training-time settings, notes.
NEUTRAL = frozenset(
    """
    architectures auto_map model_type torch_dtype dtype transformers_version name_or_path use_cache initializer_range
    attn_implementation bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id bos_token eos_token pad_token output_attentions output_hidden_states return_dict
    return_dict_in_generate output_scores torchscript use_bfloat16 pruned_heads chunk_size_feed_forward
    is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens finetuning_task id2label label2id num_labels tokenizer_class prefix
    problem_type task_specific_params tf_legacy_loss attention_dropout hidden_dropout resid_pdrop embd_pdrop
    classifier_dropout use_flash_attn unsloth_version unsloth_fixed keys_to_ignore_at_inference
    is_llama_config rope_interleaved transformers.js_config max_window_layers reward_token_id
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What a decoder of the Llama kind is made of.

    Attributes:
        qkv_bias, out_bias, mlp_bias: which projections have a bias.
        tied: the head shares the embedding's weight.
        position_rows: rows of positions that share the rotary dimensions evenly; two for ChatGLM-6B.
        stop_ids: the model's own end-of-text ids.
        reward_id: ends a conversation that a reward model is to judge; None for language models.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    position_rows: int = 1
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    reward_id: int | None = None

    def __post_init__(self) -> None:
        found = []
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim"
        for name in sizes.split():
            if getattr(self, name) < 1:
                found.append(f"{name} must be >= 1, not {getattr(self, name)}")
        if not found and self.num_heads % self.num_kv_heads:
            found.append(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2 or self.rope.dims % 2 or self.rope.dims > self.head_dim:
            found.append(f"rotary dimensions {self.rope.dims} must be even and fit head_dim {self.head_dim}")
        if not 0 < self.norm_eps < 1:
            found.append(f"norm_eps must be in (0, 1), not {self.norm_eps}")
        if self.reward_id is not None and self.reward_id >= self.vocab_size:
            found.append(f"reward_token_id {self.reward_id} is not in a vocabulary of {self.vocab_size}")
        if found:
            raise ConfigError(problems(f"{self.model_type} configuration", found))


def _is_number(value: Any) -> bool:
    """A finite number that a float can hold; JSON's whole numbers may have any length."""
    return type(value) in (int, float) and -1e300 < value < 1e300


class Reader:
    """Takes typed values out of a configuration and remembers all that is wrong with it.

    Use: read every key with `whole`, `number`, `flag`, `fixed`...; then `finish()` raises once for everything.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = values
        self.name = name
        self.used: set[str] = set()
        self.found: list[str] = []

    def _take(self, key: str, default: Any, check: Callable[[Any], bool], want: str) -> Any:
        self.used.add(key)
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.found.append(f"'{key}' is missing")
                return 1
            return default
        if not check(value):
            self.found.append(f"'{key}' must be {want}, not {value!r}")
            return 1 if default is None else default
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number in 0 .. 2^31 - 1; without a default the key must be there."""
        return int(self._take(key, default, lambda v: type(v) is int and 0 <= v < 2**31, "a whole number"))

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        return float(self._take(key, default, _is_number, "a number"))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._take(key, default, lambda v: isinstance(v, bool), "true or false"))

    def raw(self, key: str) -> Any:
        self.used.add(key)
        return self.values.get(key)

    def fixed(self, key: str, *allowed: Any) -> None:
        """A key that may only say what this implementation does."""
        self.used.add(key)
        if key in self.values and self.values[key] not in allowed:
            known = ", ".join(map(repr, allowed))
            self.found.append(f"'{key}' = {self.values[key]!r} is not supported here, only {known}")

    def ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.raw(key)
        value = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            self.found.append(f"'{key}' must be an id or a list of ids, not {value!r}")
            return ()
        return tuple(v for v in value if v >= 0)

    def rope(self, *, dims: int, base: float, max_positions: int) -> RopeConfig:
        """RoPE as `rope_scaling`, as Transformers 5's `rope_parameters`, or as InternLM 1's `rotary`."""
        scaling, parameters, old = self.raw("rope_scaling"), self.raw("rope_parameters"), self.raw("rotary")
        given = self.values.get("rope_theta")
        if isinstance(parameters, Mapping):
            base = self._base("rope_parameters", "rope_theta", parameters, base)
            scaling = scaling if scaling is not None else parameters
        if isinstance(old, Mapping):
            base = self._base("rotary", "base", old, base)
            if scaling is None and old.get("type") == "dynamic":
                scaling = {"type": "dynamic", "factor": old.get("scaling_factor", 1.0)}
        if given is not None:
            base = self.number("rope_theta")
        self.used.add("rope_theta")
        plain = RopeConfig(dims=dims, base=base, max_positions=max_positions)
        try:
            return RopeConfig.parse(scaling, dims=dims, base=base, max_positions=max_positions)
        except ConfigError as error:
            self.found.append(str(error))
            return plain

    def _base(self, where: str, key: str, values: Mapping[str, Any], default: float) -> float:
        value = values.get(key)
        if value is None or _is_number(value):
            return default if value is None else float(value)
        self.found.append(f"'{key}' of '{where}' must be a number, not {value!r}")
        return default

    def finish(self) -> None:
        """Raises:
        ConfigError: everything that was wrong, and every key that is neither used nor neutral.
        """
        unknown = sorted(k for k in self.values if k not in self.used and k not in NEUTRAL and not k.startswith("_"))
        self.found += [f"unknown key '{key}' = {self.values[key]!r} could change numbers" for key in unknown]
        if self.found:
            remedy = "Remove a key that is only another tool's note; otherwise this model is not one that Hanlin has."
            raise ConfigError(problems(f"{self.name} configuration", self.found, remedy if unknown else ""))
