"""InternLM2 logits against Transformers' Llama on the same weights, which shows that the two are one architecture.

    python benchmarks/internlm2_vs_llama.py

Weights are random, float32. Three ways through our module are compared: packed sequences as the engine scores them, the
Transformers class on one row, and the Transformers class on a batch padded on the left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hanlin.hf import InternLM2Config, InternLM2ForCausalLM
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.internlm2 import InternLM2ForCausalLM as Module

LIMIT = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape: H query heads, G query heads per key head, K head size, and the length of the longest sequence."""

    name: str
    heads: int = 4
    group: int = 2
    size: int = 16
    layers: int = 3
    inner: int = 176
    vocabulary: int = 211
    bias: bool = False
    tied: bool = False
    theta: float = 1e6
    trained: int = 2048
    scaling: tuple[tuple[str, Any], ...] = ()
    length: int = 40

    @property
    def width(self) -> int:
        return self.heads * self.size

    def internlm2(self) -> InternLM2Config:
        return InternLM2Config(
            **self._common(), bias=self.bias, rope_theta=self.theta, rope_scaling=dict(self.scaling) or None
        )

    def llama(self) -> LlamaConfig:
        rope = {("rope_type" if key == "type" else key): value for key, value in self.scaling}
        rope = {"rope_type": "default", **rope, "rope_theta": self.theta}
        return LlamaConfig(**self._common(), attention_bias=self.bias, rope_parameters=rope)

    def _common(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // self.group,
            "max_position_embeddings": self.trained,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "pad_token_id": 2,
        }


def _dynamic(factor: float) -> tuple[tuple[str, Any], ...]:
    return (("type", "dynamic"), ("factor", factor))


def _linear(factor: float) -> tuple[tuple[str, Any], ...]:
    return (("type", "linear"), ("factor", factor))


CASES = (
    *(Case(name=f"G = {g}", heads=2 * g, group=g) for g in (1, 2, 4, 6)),
    *(Case(name=f"G = {g}, bias", heads=2 * g, group=g, bias=True) for g in (1, 2, 4, 6)),
    Case(name="one key head", heads=6, group=6),
    Case(name="tied head", tied=True),
    Case(name="head size 128, 1.8B's ratios", heads=4, group=2, size=128, inner=2048, layers=2),
    Case(name="theta 5e7", theta=5e7),
    Case(name="linear 4", scaling=_linear(4.0)),
    Case(name="linear 2.5, bias", scaling=_linear(2.5), bias=True, heads=8, group=4),
    Case(name="dynamic 2, within", scaling=_dynamic(2.0)),
    Case(name="dynamic 2, at the limit", scaling=_dynamic(2.0), trained=40, length=40),
    Case(name="dynamic 2, one past", scaling=_dynamic(2.0), trained=40, length=41),
    Case(name="dynamic 2, twice as long", scaling=_dynamic(2.0), trained=32, length=64),
    Case(name="dynamic 3, ten times", scaling=_dynamic(3.0), trained=16, length=160, heads=6, group=6),
    Case(name="dynamic 2.5, bias, G = 4", scaling=_dynamic(2.5), trained=24, length=90, heads=8, group=4, bias=True),
)


def split(weights: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """InternLM2's tensors under Llama's names: the fused projection is cut group by group, nothing is permuted."""
    names = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention.wo": "self_attn.o_proj",
        "tok_embeddings": "embed_tokens",
        "output.": "lm_head.",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if "attention.wqkv" in name:
            fused = tensor.view(case.heads // case.group, case.group + 2, case.size, *tensor.shape[1:])
            for part, rows in (("q", fused[:, : case.group]), ("k", fused[:, case.group]), ("v", fused[:, -1])):
                new = name.replace("attention.wqkv", f"self_attn.{part}_proj")
                out[new] = rows.reshape(-1, *tensor.shape[1:])
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest absolute difference of logits to Llama's, and the largest logit. Each against sequences alone."""

    packed: float
    row: float
    padded: float
    largest: float

    @property
    def worst(self) -> float:
        return max(self.packed, self.row, self.padded)


@torch.no_grad()
def measure(case: Case) -> Difference:
    """Compare on three sequences of different lengths.

    Each is given alone to a Llama that has seen nothing yet: its dynamic scaling takes the length of the longest row
    of a batch for all of them, and of a longer text that it saw before. Ours goes by each sequence's own.
    """
    generator = torch.Generator().manual_seed(0)
    ours = InternLM2ForCausalLM(case.internlm2()).eval()
    for name, parameter in ours.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else noise / case.width**0.5)
    llama = LlamaForCausalLM(case.llama()).eval()
    left = llama.load_state_dict(split(ours.state_dict(), case), strict=True)
    assert not left.missing_keys and not left.unexpected_keys

    lengths = [case.length, max(1, case.length // 3), case.length - 5]
    prompts = [torch.randint(3, case.vocabulary, (n,), generator=generator) for n in lengths]
    expected = [copy.deepcopy(llama)(ids[None], use_cache=False).logits[0] for ids in prompts]

    module = Module(ours.config.to_hanlin()).eval()
    module.load_state_dict(ours.state_dict())
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    rope = module.model.rope.config
    angles = torch.cat([torch.full((n,), rope.dynamic_length(n)) for n in lengths])
    positions = Positions(places, angles if bool(angles.any()) else None)
    packed = module.head(module(torch.cat(prompts), positions, PackedAttend(lengths))).split(lengths)

    rows = [ours(ids[None]).logits[0] for ids in prompts]

    ids, mask = torch.full((3, case.length), 2), torch.zeros(3, case.length, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        ids[index, case.length - len(prompt) :] = prompt
        mask[index, case.length - len(prompt) :] = 1
    batch = ours(ids, attention_mask=mask).logits
    padded = [batch[index, case.length - n :] for index, n in enumerate(lengths)]

    def difference(got: Any) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))

    largest = max(float(logits.abs().max()) for logits in expected)
    return Difference(packed=difference(packed), row=difference(rows), padded=difference(padded), largest=largest)


def rows() -> Iterator[tuple[object, ...]]:
    """One row of the table a case."""
    for case in CASES:
        found = measure(case)
        shape = f"{case.heads} / {case.heads // case.group} / {case.size}"
        figures = (f"{value:.1e}" for value in (found.packed, found.row, found.padded))
        yield (case.name, shape, case.layers, f"{case.length} / {case.trained}", *figures, f"{found.largest:.1f}")


def main() -> None:
    import report

    head = "case, H / KV / K, layers, longest / trained, packed, one row, padded batch, largest logit".split(", ")
    report.write(
        "internlm2-vs-llama",
        "InternLM2 against Transformers' Llama on the same weights",
        f"Largest absolute difference of logits, float32, random weights; allowed is {LIMIT:.0e}. Held by "
        f"tests/golden/test_internlm2_vs_llama.py. transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads.",
        report.table(head, rows()),
    )


if __name__ == "__main__":
    main()
