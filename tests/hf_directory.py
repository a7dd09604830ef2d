"""An InternLM2 directory as released: real tokenizer, configurations, random weights, and code that must not run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hanlin.models.registry import build, read_config
from hanlin.tokenizers.spm_model import SpmModel

MARK = "CODE_WAS_RUN"
TOKENIZER = Path(__file__).parent / "data" / "tokenizer_internlm2.model"
_SMALL = 1500

SPECIALS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def config(**changes: Any) -> dict[str, Any]:
    """A released `config.json`, of a tiny model."""
    names = {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_internlm2.InternLM2ForSequenceClassification",
        "AutoModelForQuestionAnswering": "modeling_internlm2.InternLM2ForQuestionAnswering",
    }
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": names,
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 32768,
        "model_type": "internlm2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.0",
        "use_cache": True,
        "vocab_size": 92544,
        **changes,
    }


def tokenizer_config(specials: Mapping[int, str] = SPECIALS) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": content, **flags} for i, content in specials.items()},
        "additional_special_tokens": [content for i, content in specials.items() if i > 2],
        "auto_map": {
            "AutoTokenizer": [
                "tokenization_internlm2.InternLM2Tokenizer",
                "tokenization_internlm2_fast.InternLM2TokenizerFast",
            ]
        },
        "bos_token": "<s>",
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
        "eos_token": "</s>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "sp_model_kwargs": None,
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def make_directory(path: Path, *, tokenizer: str = "whole", **changes: Any) -> Path:
    """Write the directory; `changes` go into its `config.json`.

    `tokenizer` is "whole", "none", or "small": the first pieces of the real one, which load fast. The model's
    vocabulary is small too, unless it is "whole".
    """
    path.mkdir(parents=True)
    bait = (
        f"import pathlib\npathlib.Path({str(path / MARK)!r}).touch()\nraise RuntimeError('code of the directory ran')\n"
    )
    for name in ("configuration", "modeling", "tokenization"):
        (path / f"{name}_internlm2.py").write_text(bait)
    (path / "tokenization_internlm2_fast.py").write_text(bait)
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(bait)
    values = config(**({"vocab_size": _SMALL} if tokenizer != "whole" else {}), **changes)
    write_json(path / "config.json", values)
    write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 92542], "pad_token_id": 2})
    if tokenizer == "whole":
        shutil.copyfile(TOKENIZER, path / "tokenizer.model")
        write_json(path / "tokenizer_config.json", tokenizer_config())
    elif tokenizer == "small":
        (path / "tokenizer.model").write_bytes(_small_tokenizer())
        write_json(path / "tokenizer_config.json", small_tokenizer_config())
    model = build(read_config(values), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = (1 + 0.1 * noise if "norm" in name else 0.3 * noise).bfloat16()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def small_tokenizer_config() -> dict[str, Any]:
    return tokenizer_config({i: content for i, content in SPECIALS.items() if i < _SMALL})


def _small_tokenizer() -> bytes:
    whole = SpmModel.parse(TOKENIZER.read_bytes(), TOKENIZER.name)
    lists = {name: getattr(whole, name)[:_SMALL] for name in ("pieces", "scores", "kinds")}
    return replace(whole, **lists).serialize()


def code_ran(path: Path) -> bool:
    return (path / MARK).exists()
