"""An InternEvo training checkpoint out of a released state dict, cut as its own converters cut, by torch alone."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_V1 = {
    "self_attn.o_proj": "mixer.out_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w2",
    "mlp.down_proj": "mlp.w3",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
}
_OUTER = {"model.embed_tokens": "embedding", "lm_head": "head", "model.norm": "norm"}


def make_internevo(
    path: Path,
    state: dict[str, Tensor],
    config: dict[str, Any],
    *,
    tp: int = 1,
    pp: int = 1,
    cut: str = "tp",
    adapt_hf: bool | None = True,
    prefix: str = "",
    embed_split: bool = True,
    as_config: bool = False,
    **arguments: Any,
) -> Path:
    """Write `state`, under released names, as `tp` ranks and `pp` stages. `as_config`: as training itself saves it."""
    path.mkdir(parents=True)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    layers = config["num_hidden_layers"]
    per_stage = -(-layers // pp)
    for stage in range(pp):
        mine = range(stage * per_stage, min(layers, (stage + 1) * per_stage))
        ranks: list[dict[str, Tensor]] = [{} for _ in range(tp)]
        for name, value in state.items():
            first, last = stage == 0, stage == pp - 1
            if name.startswith("model.layers."):
                number, _, rest = name.removeprefix("model.layers.").partition(".")
                if int(number) not in mine:
                    continue
                new, pieces = _inner(rest, value, state, name, tp, cut, heads, kv_heads, adapt_hf)
                new = f"{'layers' if 'w' in config['_kind'] else 'blocks'}.{int(number) - mine[0]}.{new}"
            else:
                embedding = "embed" in name
                if not (first if embedding else last):
                    continue
                stem, _, end = name.rpartition(".")
                new = f"{_OUTER.get(stem, stem.removeprefix('model.'))}.{end}"
                axis = 1 if embedding and embed_split else 0
                pieces = [value] * tp if value.ndim == 1 else list(value.chunk(tp, axis))
            for rank, piece in zip(ranks, pieces, strict=True):
                if piece.numel():
                    rank[prefix + new] = piece.clone()
        for number, rank in enumerate(ranks):
            torch.save(rank, path / f"model_{cut}{number}_pp{stage}.pt")
    said: dict[str, Any] = {
        "num_attention_heads": heads,
        "embed_split_hidden": embed_split,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": layers,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": config["rms_norm_eps"],
        "no_bias": not config.get("bias"),
        "mlp_ratio": 2,
        "dtype": torch.bfloat16,
        "rope_base": config.get("rope_theta", 10000),
        "num_chunks": 1,
        **arguments,
    }
    if config["_kind"] == "w":
        said["num_kv_attention_heads"] = kv_heads
        if adapt_hf is not None:
            said["adapt_hf"] = adapt_hf
    torch.save(_config_class()(said) if as_config else said, path / "model_config.pt")
    return path


def _inner(
    rest: str,
    value: Tensor,
    state: dict[str, Tensor],
    name: str,
    tp: int,
    cut: str,
    heads: int,
    kv: int,
    hf: bool | None,
) -> tuple[str, list[Tensor]]:
    part, _, end = rest.rpartition(".")
    if part.startswith("self_attn.") and part != "self_attn.o_proj":
        if not part.endswith("q_proj"):
            return f"mixer.Wqkv.{end}", [value[:0]] * tp  # came with q
        every = [state[name.replace("q_proj", f"{x}_proj")].chunk(tp, 0) for x in "qkv"]
        return f"mixer.Wqkv.{end}", [torch.cat(thirds, 0) for thirds in zip(*every, strict=True)]
    if part == "attention.wqkv" and not hf:
        head_dim = value.shape[0] // (heads + 2 * kv)
        grouped = value.view(kv, heads // kv + 2, head_dim, *value.shape[1:]).clone()
        half = head_dim // 2
        paired = grouped.clone()
        paired[:, :-1, 0::2], paired[:, :-1, 1::2] = grouped[:, :-1, :half], grouped[:, :-1, half:]
        value = paired.view(value.shape)
    columns = part in ("attention.wo", "feed_forward.w2", "self_attn.o_proj", "mlp.down_proj")
    if "norm" in part or (columns and value.ndim == 1 and cut == "tp"):
        return f"{_V1.get(part, part)}.{end}", [value] * tp
    return f"{_V1.get(part, part)}.{end}", list(value.chunk(tp, 1 if columns and cut == "tp" else 0))


def _config_class() -> Any:
    """The class of dictionaries that training configurations are; its module exists only to be pickled by name."""
    name = "internlm.core.context.parallel_context"
    if name not in sys.modules:
        for end in range(1, 5):
            part = ".".join(name.split(".")[:end])
            sys.modules[part] = types.ModuleType(part)
        kind = type("Config", (dict,), {"__module__": name})
        sys.modules[name].Config = kind  # type: ignore[attr-defined]
    return sys.modules[name].Config  # type: ignore[attr-defined]
