"""What every family's Transformers classes share: they run the modules of `hanlin.models` through `CacheAttend`.

A family file brings a configuration, its body's children under their released names, and one line for the registry.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from hanlin.errors import RequestError
from hanlin.hf.attend import CacheAttend
from hanlin.hf.caches import CACHE, NAMES, only_cache, renamed
from hanlin.hf.located import located
from hanlin.layers.rope import Positions, Rope
from hanlin.models.config import DecoderConfig

__all__ = ["HanlinCausalLM", "HanlinConfig", "HanlinModel", "HanlinPreTrainedModel", "plain_rope"]

logger = logging.get_logger(__name__)

# Keys of a configuration that name code in the model's directory or on a hub.
_CODE = ("auto_map", "custom_pipelines")
# Where a cache remembers the lengths that fixed the angles of its keys (dynamic RoPE).
_LENGTHS = "hanlin_rope_lengths"


def plain_rope(
    kwargs: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`, out of `rope_parameters` where Transformers 5 has written both as that."""
    parameters = kwargs.pop("rope_parameters", None)
    if isinstance(parameters, Mapping):
        theta = parameters.get("rope_theta", theta)
        rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if scaling is None and rest.get("rope_type", "default") != "default":
            scaling = rest
    return theta, scaling


class HanlinConfig(PreTrainedConfig):  # type: ignore[misc]
    """A released `config.json` under its own attribute names. Whatever names code to run is dropped as it is read."""

    keys_to_ignore_at_inference = [*NAMES]  # noqa: RUF012 - Trainer adds a list to it

    def __init__(self, **kwargs: Any) -> None:
        values = {key: value for key, value in kwargs.items() if key not in _CODE}
        # AutoModel goes through the list, and stumbles over None.
        super().__init__(**{**values, "architectures": values.get("architectures") or []})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' own, by any name that `hanlin.load` takes."""
        return super().from_pretrained(located(pretrained_model_name_or_path, kwargs), *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Transformers' own. A file's `attn_implementation`, which meant the released code's classes, says nothing
        here; the argument of that name does.
        """
        values = {key: value for key, value in config_dict.items() if key != "attn_implementation"}
        return super().from_dict(values, **kwargs)

    def to_hanlin(self) -> DecoderConfig:
        """The numbers that Hanlin's modules are built from.

        Raises:
            ConfigError: naming all values that make no sense, and every unknown key that could change numbers.
        """
        common = set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings", "bos_token_id", "eos_token_id"}
        given = self.to_dict().items()
        return self.read({k: v for k, v in given if v is not None and k not in common and k != "quantization_config"})

    def read(self, values: Mapping[str, Any]) -> DecoderConfig:
        """The family's own reading of a `config.json`."""
        raise NotImplementedError


class HanlinPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """The flags that Transformers, Accelerate and PEFT look at."""

    config_class = HanlinConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = NAMES
    _supports_sdpa = True
    # Tables that converted files may hold, and a language-model head where there is none.
    _keys_to_ignore_on_load_unexpected = (
        r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
        r"^(output|lm_head)\.weight$",
    )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' own, by any name that `hanlin.load` takes."""
        return super().from_pretrained(located(pretrained_model_name_or_path, kwargs), *args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        """To the GPU, as the cards' snippets ask for. Where torch finds none, the model stays where it is."""
        if torch.cuda.is_available():
            return super().cuda(*args, **kwargs)
        warnings.warn(
            "cuda(): torch finds no GPU here; the model stays on the CPU, where .float() is fastest for these classes, "
            "and hanlin.load() answers faster still and in less memory.",
            UserWarning,
            stacklevel=2,
        )
        return self

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers would run `custom_generate/generate.py` of the model's directory here; Hanlin never does.

        Raises:
            OSError: always, which Transformers takes for "there is none".
        """
        raise OSError("Hanlin runs no code from model directories. Pass a function of your own as custom_generate.")


class HanlinModel(HanlinPreTrainedModel):
    """A decoder's body: embedding, blocks, final norm.

    A subclass sets the children that the properties below find, then calls `post_init`.
    """

    rope: Rope

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.layers)

    @property
    def final_norm(self) -> nn.Module:
        return cast(nn.Module, self.norm)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """ids (N, S) or embeddings (N, S, D) -> hidden (N, S, D) after the final norm.

        Without `position_ids`, tokens are counted from each row's first one that `attention_mask` keeps.
        `output_hidden_states` gives what goes into each block, and the result; `output_attentions` computes the
        probabilities (N, H, S, C) of each layer the long way.

        Raises:
            RequestError: not exactly one of `input_ids` and `inputs_embeds`, or a mask of the wrong shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids and inputs_embeds")
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        checkpointing = self.gradient_checkpointing and self.training
        cache = self._cache(only_cache(cache, past_key_values), use_cache, checkpointing)

        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = x.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        places, mask, segments = self.arrange(
            input_ids, position_ids, attention_mask, (rows, length, past), cache, x.device
        )
        attend = CacheAttend(
            rows=rows,
            cache=cache,
            past=past,
            mask=mask,
            soft=self.soft_prefix(),
            segments=segments,
            eager=attentions or self.config._attn_implementation == "eager",
        )
        lengths = self._lengths(places[0], segments, cache, past)
        rotation = self.rope(Positions(places.reshape(len(places), -1), lengths))
        x = x.flatten(0, 1)
        states = []
        for index, block in enumerate(self.blocks):
            if hidden:
                states.append(x.unflatten(0, (rows, length)))
            if checkpointing:
                x = self._gradient_checkpointing_func(block.__call__, index, x, rotation, attend)
            else:
                x = block(index, x, rotation, attend)
        x = self.final_norm(x).unflatten(0, (rows, length))
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if hidden else None,
            attentions=tuple(attend.probabilities[i] for i in range(len(self.blocks))) if attentions else None,
            **{CACHE: cache},
        )
        return output if _as_dict(self, return_dict) else output.to_tuple()

    def soft_prefix(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (P, G, K) for each layer that all tokens see, see `PrefixEncoder`."""
        return []

    def arrange(
        self,
        ids: Tensor | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
        shape: tuple[int, int, int],
        cache: Cache | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Positions (rows of them, N, S), mask and segments for `CacheAttend`. `shape` is N, S, cached tokens."""
        places, segments = _places(position_ids, mask, *shape, device)
        return places[None], mask, segments

    def _cache(self, given: Cache | None, wanted: bool | None, checkpointing: bool) -> Cache | None:
        wanted = self.config.use_cache if wanted is None else wanted
        if checkpointing:
            if wanted or given is not None:
                logger.warning_once("a cache and gradient checkpointing exclude each other; use_cache is off")
            return None
        return DynamicCache(config=self.config) if wanted and given is None else given

    def _lengths(self, places: Tensor, segments: Tensor | None, cache: Cache | None, past: int) -> Tensor | None:
        """The lengths that fix the angles of dynamic RoPE, one a token; None where no sequence is that long.

        A sequence keeps the length of its prompt: keys already cached and new ones then fit together. (Transformers'
        own models move the base with every token past the trained length.) Of a prompt that comes in chunks, only the
        first is known when the angles are fixed.
        """
        config = self.rope.config
        if config.kind != "dynamic":
            return None
        if segments is None:
            lengths = (places.amax(1, keepdim=True) + 1).expand_as(places)
        else:
            ends = torch.zeros_like(places).scatter_reduce(1, segments, places, "amax")
            lengths = ends.gather(1, segments) + 1
        if cache is not None:
            if past and hasattr(cache, _LENGTHS):
                lengths = getattr(cache, _LENGTHS).to(places.device).expand_as(places)
            else:
                setattr(cache, _LENGTHS, lengths[:, :1])
        lengths = torch.where(lengths > config.trained_length, lengths, 0)
        return lengths.reshape(-1) if bool(lengths.any()) else None


class HanlinCausalLM(HanlinPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A body `self.model` and a language-model head, the module that `get_output_embeddings` names."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """ids (N, S) -> logits (N, S, V) float32, and with `labels` (N, S; -100 is left out) the next-token loss.

        `logits_to_keep` asks for the last so many places, or for the places it lists; 0 is all.
        """
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=only_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(body.last_hidden_state[:, keep]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            **{CACHE: body.get(CACHE)},
        )
        return output if _as_dict(self, return_dict) else output.to_tuple()

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As Transformers' `generate`; a `top_p` above 1, which the released tests use, means 1."""
        given = kwargs.get("top_p", getattr(generation_config or self.generation_config, "top_p", None))
        if isinstance(given, (int, float)) and given > 1:
            warnings.warn(f"top_p={given} is above 1 and keeps every token, as 1 does", UserWarning, stacklevel=2)
            kwargs["top_p"] = 1.0
        return super().generate(inputs, generation_config=generation_config, **renamed(kwargs))


def _as_dict(model: PreTrainedModel, wanted: bool | None) -> bool:
    return bool(model.config.return_dict if wanted is None else wanted)


def _places(
    given: Tensor | None, mask: Tensor | None, rows: int, length: int, past: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions (N, S), and segments (N, S) where the given positions start anew within a row and no mask says more."""
    if given is None:
        if mask is not None and mask.dim() == 2:
            kept = mask.to(device).bool()
            places = (kept.long().cumsum(-1) - 1).masked_fill(~kept, 1)  # what padding gets does not matter
            return places[:, -length:], None
        return torch.arange(past, past + length, device=device).expand(rows, -1), None
    places = given.to(device).reshape(-1, length).expand(rows, -1)
    if mask is not None or past or length == 1:
        return places, None
    starts = torch.zeros_like(places)
    starts[:, 1:] = (places[:, 1:] != places[:, :-1] + 1).long()
    return places, starts.cumsum(-1) if bool(starts.any()) else None
