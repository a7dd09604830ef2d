"""Making Transformers' Auto classes choose Hanlin's, whatever a model directory or a caller says about remote code.

For configurations and models, registered classes from outside Transformers win over remote code. For tokenizers they
do not when `trust_remote_code=True`, and the choice between slow and fast is ignored; so
`AutoTokenizer.from_pretrained` is wrapped. A registered configuration also drops `auto_map`, so that no other Auto
class can follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from hanlin.hf.located import finding, located
from hanlin.models.registry import family_name

__all__ = ["WHERE", "HFFamily", "register"]

# What both readers of configurations take to find a file on the hub.
WHERE = "cache_dir force_download proxies token revision local_files_only subfolder".split()


@dataclass(frozen=True, kw_only=True)
class HFFamily:
    """One family's classes for Transformers.

    Attributes:
        model: what `AutoModel` takes when a configuration names none of the others among its `architectures`.
        others: classes beside `causal_lm` that it can name there; `AutoModel` follows the released files in that.
        fast_tokenizer: None for a family that was released with a slow one alone.
        other_tokenizers: slow ones that a directory's `tokenizer_class` can name instead.
        name: in the table of families, where other families share the `model_type`.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    classifier: type[PreTrainedModel] | None = None
    seq2seq: type[PreTrainedModel] | None = None
    others: tuple[type[PreTrainedModel], ...] = ()
    slow_tokenizer: type[PreTrainedTokenizer]
    fast_tokenizer: type[PreTrainedTokenizerFast] | None = None
    other_tokenizers: tuple[type[PreTrainedTokenizer], ...] = ()
    name: str = ""

    def has_tokenizer(self, name: object, path: object) -> bool:
        """Whether the family has the class so named, and a directory at `path` its file."""
        kinds = (self.slow_tokenizer, self.fast_tokenizer, *self.other_tokenizers)
        files = self.slow_tokenizer.vocab_files_names.values()
        here = isinstance(path, (str, Path)) and Path(path).is_dir()
        return name in [kind.__name__ for kind in kinds if kind] and (
            not here or any(Path(str(path), file).exists() for file in files)
        )


def register(*families: HFFamily) -> None:
    """Enter the families in the Auto classes; doing so again changes nothing."""
    for family in families:
        if not family.name:  # else the configuration that has the `model_type` finds out
            AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, (family.model, family.causal_lm, *family.others), exist_ok=True)
        AutoModelForCausalLM.register(family.config, family.causal_lm, exist_ok=True)
        if family.classifier is not None:
            AutoModelForSequenceClassification.register(family.config, family.classifier, exist_ok=True)
        if family.seq2seq is not None:
            AutoModelForSeq2SeqLM.register(family.config, family.seq2seq, exist_ok=True)
        AutoTokenizer.register(
            family.config,
            slow_tokenizer_class=family.slow_tokenizer,
            fast_tokenizer_class=family.fast_tokenizer,
            exist_ok=True,
        )
    AutoTokenizer.from_pretrained = classmethod(_choosing(AutoTokenizer.from_pretrained.__func__, families))
    finding(AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification)


def _choosing(original: Callable[..., Any], families: tuple[HFFamily, ...]) -> Callable[..., Any]:
    """`AutoTokenizer.from_pretrained` that takes the families' tokenizers itself and leaves all others alone."""
    if hasattr(original, "hanlin_families"):
        families = tuple(dict.fromkeys((*original.hanlin_families, *families)))
        original = getattr(original, "__wrapped__", original)

    @wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        pretrained_model_name_or_path = located(pretrained_model_name_or_path, kwargs)
        family = _family(pretrained_model_name_or_path, kwargs, families)
        if family is None:
            return original(cls, pretrained_model_name_or_path, *inputs, **kwargs)
        for name in ("config", "trust_remote_code", "code_revision", "tokenizer_type"):
            kwargs.pop(name, None)
        fast = family.fast_tokenizer if kwargs.pop("use_fast", True) is not False else None
        chosen = fast or family.slow_tokenizer
        if family.other_tokenizers:
            where = {name: kwargs[name] for name in WHERE if name in kwargs}
            named = get_tokenizer_config(pretrained_model_name_or_path, **where).get("tokenizer_class")
            chosen = next((kind for kind in family.other_tokenizers if kind.__name__ == named), chosen)
        return chosen.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    from_pretrained.hanlin_families = families  # type: ignore[attr-defined]
    return from_pretrained


def _family(path: Any, kwargs: dict[str, Any], families: tuple[HFFamily, ...]) -> HFFamily | None:
    """The family whose configuration or tokenizer class `path` names, or None; reads data only."""
    config = kwargs.get("config")
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    values = {} if config is None else config.to_dict()
    if config is None and not kwargs.get("gguf_file"):
        try:
            values = PreTrainedConfig.get_config_dict(path, **where)[0]
        except (OSError, ValueError):
            values = {}  # a directory may hold a tokenizer alone; what is truly wrong shows again below
    name = family_name(values)
    for family in families:
        if (family.name or family.config.model_type) == name:
            return family
    try:
        named = get_tokenizer_config(path, **where).get("tokenizer_class")
    except (OSError, ValueError):
        return None
    return next((family for family in families if family.has_tokenizer(named, path)), None)
