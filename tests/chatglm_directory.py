"""ChatGLM-6B directories as released: configurations, tensor names, shards in .bin, quantised weights, prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanlin.tokenizers.chatglm import ADDED
from hanlin.tokenizers.spm_model import CONTROL, NORMAL, UNIGRAM, UNKNOWN, USER_DEFINED, SpmModel

__all__ = [
    "PIECES",
    "config",
    "make_directory",
    "quantised",
    "read_golden",
    "tokenizer_config",
    "tokenizer_model",
    "weights",
    "write",
]

_WORDS = (
    "▁the ▁cat ▁sat ▁on ing 你 好 你好 问 答 训练时间 训练 时间 年 。 , ! : ; ? "
    "▁[ [ ] Round ▁print ( ) ' \" - + = . # _ / < > |"
)
PIECES: tuple[tuple[str, int], ...] = (
    ("<unk>", UNKNOWN),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    ("<pad>", CONTROL),
    ("<n>", USER_DEFINED),
    ("▁", NORMAL),
    *((word, NORMAL) for word in dict.fromkeys((*_WORDS.split(), *"abcdefghijklmnopqrstuvwxyz0123456789ABR"))),
    *ADDED,
)


def tokenizer_model() -> bytes:
    """An `ice_text.model` of the second layout's make, with a few hundred pieces."""
    names = [piece for piece, _ in PIECES]
    return SpmModel(
        pieces=names,
        scores=[-float(12 - len(name)) if kind == NORMAL else 0.0 for name, kind in PIECES],
        kinds=[kind for _, kind in PIECES],
        algorithm=UNIGRAM,
        remove_extra_spaces=True,
    ).serialize()


def tokenizer_config(**changes: Any) -> dict[str, Any]:
    """The released `tokenizer_config.json`."""
    return {
        "name_or_path": "THUDM/chatglm-6b",
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "end_token": "</s>",
        "gmask_token": "[gMASK]",
        "mask_token": "[MASK]",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "num_image_tokens": 0,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        **changes,
    }


def config(**changes: Any) -> dict[str, Any]:
    """The keys of the released `config.json`, of a tiny model."""
    return {
        "_name_or_path": "THUDM/chatglm-6b",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "bos_token_id": 92,
        "eos_token_id": 93,
        "mask_token_id": 90,
        "gmask_token_id": 91,
        "pad_token_id": 3,
        "hidden_size": 32,
        "inner_hidden_size": 128,
        "layernorm_epsilon": 1e-05,
        "max_sequence_length": 2048,
        "model_type": "chatglm",
        "num_attention_heads": 4,
        "num_layers": 2,
        "position_encoding_2d": True,
        "torch_dtype": "float16",
        "transformers_version": "4.23.1",
        "use_cache": True,
        "vocab_size": 97,
        **changes,
    }


def weights(values: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the released names, the rotary tables that the files hold included."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, rows = values["hidden_size"], values["inner_hidden_size"], values["vocab_size"]

    def random(*shape: int, scale: float = 0.2, center: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + center

    out = {"transformer.word_embeddings.weight": random(rows, width, scale=1.0)}
    for layer in range(values["num_layers"]):
        at = f"transformer.layers.{layer}"
        out[f"{at}.attention.rotary_emb.inv_freq"] = torch.ones(width // values["num_attention_heads"] // 4).half()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}.{norm}.weight"], out[f"{at}.{norm}.bias"] = random(width, center=1.0), random(width)
        for name, rows_, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", inner, width),
            ("mlp.dense_4h_to_h", width, inner),
        ):
            out[f"{at}.{name}.weight"], out[f"{at}.{name}.bias"] = random(rows_, columns), random(rows_)
    out["transformer.final_layernorm.weight"] = random(width, center=1.0)
    out["transformer.final_layernorm.bias"] = random(width)
    out["lm_head.weight"] = random(rows, width, scale=0.5)
    return out


def quantised(tensors: dict[str, Tensor], bits: int, *, ends: bool = False) -> dict[str, Tensor]:
    """The tensors as the released `quantize` stores them: the linear layers of all blocks in `bits` bits, by row.

    `ends` adds the table of embeddings and the head, as in chatglm-6b-int4-qe.
    """
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not (ends or ".layers." in name):
            out[name] = tensor.half()
            continue
        most = 2 ** (bits - 1) - 1
        scale = (tensor.abs().amax(1) / most).half()
        numbers = (tensor / scale.float()[:, None]).round().clamp(-most, most).to(torch.int8)
        if bits == 4:
            numbers = (numbers[:, 0::2] << 4) | (numbers[:, 1::2] & 15)
        out[name], out[f"{name}_scale"] = numbers, scale
    return out


def write(path: Path, values: dict[str, Any], tensors: dict[str, Tensor], shards: int = 2) -> Path:
    """A model directory with its weights in `shards` pickles and an index, as ChatGLM-6B came."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    names, where = list(tensors), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = names[number::shards]
        torch.save({name: tensors[name] for name in part}, path / file)
        where |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def make_directory(path: Path) -> Path:
    """A tiny ChatGLM-6B, tokenizer and all, whose special tokens are where its configuration says."""
    names = [piece for piece, _ in PIECES]
    roles = {"mask": "[MASK]", "gmask": "[gMASK]", "bos": "<sop>", "eos": "<eop>", "pad": "<pad>"}
    values = config(vocab_size=len(names), **{f"{role}_token_id": names.index(piece) for role, piece in roles.items()})
    write(path, values, weights(values))
    (path / "ice_text.model").write_bytes(tokenizer_model())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return path


def read_golden(path: Path, prefix: int = 0) -> tuple[dict[str, Tensor], Tensor | None, list[tuple[Tensor, Tensor]]]:
    """(weights by released name, prefix (layers, 2, P, heads, size) or None, (ids, hidden) of three steps)."""
    data, at = path.read_bytes(), 0

    def take(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        nonlocal at
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(bytearray(data), dtype=dtype, count=count, offset=at).view(shape)
        at += count * dtype.itemsize
        return tensor.clone()

    soft = take(1, 2, 8, prefix, 4, dtype=torch.float16).float().transpose(2, 3) if prefix else None
    shapes = {
        "transformer.word_embeddings.weight": (5, 32),
        "transformer.layers.0.input_layernorm.weight": (32,),
        "transformer.layers.0.input_layernorm.bias": (32,),
        "transformer.layers.0.attention.query_key_value.weight": (96, 32),
        "transformer.layers.0.attention.query_key_value.bias": (96,),
        "transformer.layers.0.attention.dense.weight": (32, 32),
        "transformer.layers.0.attention.dense.bias": (32,),
        "transformer.layers.0.post_attention_layernorm.weight": (32,),
        "transformer.layers.0.post_attention_layernorm.bias": (32,),
        "transformer.layers.0.mlp.dense_h_to_4h.weight": (128, 32),
        "transformer.layers.0.mlp.dense_h_to_4h.bias": (128,),
        "transformer.layers.0.mlp.dense_4h_to_h.weight": (32, 128),
        "transformer.layers.0.mlp.dense_4h_to_h.bias": (32,),
        "transformer.final_layernorm.weight": (32,),
        "transformer.final_layernorm.bias": (32,),
    }
    tensors = {name: take(*shape) for name, shape in shapes.items()}
    steps = [(take(count, dtype=torch.int32), take(count, 32)) for count in (3, 1, 1)]
    assert at == len(data)
    return tensors, soft, steps
